"""`bitdistiller verify-export`: read an exported model with the foreign reader and compare it with the packed one."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from bitdistiller_peft.cli import models
from bitdistiller_peft.cli.options import Option
from bitdistiller_peft.cli.verb import Console, Positional, Settings, Verb
from bitdistiller_peft.errors import CheckpointError, ConfigError, ExportError


def run(settings: Settings, console: Console) -> dict[str, Any]:
    """Compare codes, scales, values and logits.

    Raises:
        CheckpointError: something differs; the tensor and the position are named.
        ConfigError, ExportError: no format, none of this name, or a package that it needs is missing.
    """
    from bitdistiller_peft.export import export_format_names, get_export_format, transformers_engine, verify_export

    arguments = settings.arguments
    if arguments["format"] is None:
        raise ConfigError(f"`--format` must be given: one of {export_format_names()}.")
    chosen = get_export_format(arguments["format"])
    chosen.check_installed()
    folder, exported = models.model_folder(arguments["model"]), arguments["exported"]
    result = {"model": folder, "exported": exported, "format": chosen.name}
    if settings.is_dry_run:
        console.say(f"{exported}, read by {chosen.reader_name}, against {folder}")
        return {"dry_run": True, **result}
    engine = transformers_engine if arguments["engine"] == "transformers" else None
    try:
        report = verify_export(folder, exported, chosen.name, logits=arguments["logits"], engine=engine)
    except ExportError as error:  # here it is the file that is wrong, not a setting
        raise CheckpointError(str(error)) from error
    console.say(report)
    return {**result, "ok": True, **asdict(report)}


VERB = Verb(
    "verify-export",
    "compare an exported model with the packed one, code for code",
    run,
    positionals=(
        Positional("model", "packed model that was exported"),
        Positional("exported", "folder that `export` wrote, or a copy of it"),
    ),
    own=(
        Option("format", "text", "format of the exported model: gguf, compressed-tensors, ..."),
        Option("logits", "bool", "also compare logits on a fixed prompt; needs the memory of the fp32 model", True),
        Option("engine", "text", "also compare the logits of this engine", "none", ("none", "transformers")),
    ),
    epilog="""
Codes, scales and values must be equal. Logits may differ by 8 roundings of the reader's dtype (fp32: 1e-5, float16:
3.9e-3, bfloat16: 3.1e-2 of their root mean square), those of an engine by 5e-2. Exit code 3: something differs.

example: bitdistiller verify-export out/distill/packed out/export/gguf --format gguf""",
)
