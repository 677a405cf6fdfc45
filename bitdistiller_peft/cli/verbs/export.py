"""`bitdistiller export`: write a packed model in other formats, each read back and compared code for code."""

from __future__ import annotations

from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from bitdistiller_peft.cli import models, output, stages
from bitdistiller_peft.cli.verb import Console, Positional, Settings, Verb
from bitdistiller_peft.errors import ConfigError, UnknownNameError


def run(settings: Settings, console: Console) -> dict[str, Any]:
    """Export the folder that was named, or the packed model of the chain."""
    source = settings.arguments["folder"]
    if source is None:
        found = stages.packed_folder(settings)
        if found is None:
            raise ConfigError("`FOLDER` must be given, or `output` in the file of --config hold a packed model.")
        source = str(found)
    return execute(stages.placed(settings, "export"), console, source)


def execute(settings: Settings, console: Console, source: str) -> dict[str, Any]:
    """Write one folder per format into `output`.

    Args:
        settings: `export.formats`, and `export.options` for each of them.
        console: gets the reports.
        source: folder of a packed model.

    Returns:
        The report of each format.

    Raises:
        ExportError: a format cannot hold the model, or a folder is not empty.
        UnknownNameError: no such format; all are checked before the first is written.
    """
    from bitdistiller_peft.export import export_model

    formats, root = check_formats(settings), Path(settings.need("output"))
    folder = models.model_folder(source)
    if settings.is_dry_run:
        output.check(root, settings, ("export",), {"model": folder})
        console.say("\n".join(f"{folder} -> {root / name}" for name in formats))
        return {"dry_run": True, "folder": folder, "formats": formats}
    done = output.begin(root, settings, ("export",), {"model": folder})
    if done is not None:
        console.say(f"exported before: {root}")
        return done
    reports: dict[str, Any] = {}
    for name in formats:
        if (root / name).is_dir() and any((root / name).iterdir()):  # it appears only when everything was compared
            reports[name] = "written before"
            continue
        report = export_model(folder, name, root / name, **(settings["export.options"] or {}))
        console.say(report)
        reports[name] = asdict(report) if is_dataclass(report) else str(report)
    return output.finish(root, {"folder": folder, "reports": reports})


def check_formats(settings: Settings) -> list[str]:
    """The formats of `export:`, each of them known, and what writes it installed.

    Raises:
        UnknownNameError: no format has this name.
        ExportError: a package is missing; it is named.
    """
    from bitdistiller_peft.export import export_format_names, get_export_format

    formats, known = list(settings.need("export.formats")), list(export_format_names())
    for name in formats:
        if name not in known:
            raise UnknownNameError("export.formats", name, known)
        get_export_format(name).check_installed()
    return formats


VERB = Verb(
    "export",
    "write a packed model in another format, verified",
    run,
    sections=("", "export"),
    positionals=(Positional("folder", "packed model; default: what the chain of --config made", "?"),),
    hidden=("model", "revision", "device", "dtype", "seed"),
    epilog="example: bitdistiller export out/distill/packed --formats gguf --output out/export",
)
