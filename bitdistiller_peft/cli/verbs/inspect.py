"""`bitdistiller inspect`: what a model folder holds, from its headers alone."""

from __future__ import annotations

from typing import Any

from bitdistiller_peft.cli.folder import Folder, bits_per_weight, parts, read_folder
from bitdistiller_peft.cli.tables import table
from bitdistiller_peft.cli.verb import Console, Positional, Settings, Verb

_SHOWN = ("grid", "bits", "group_size", "scale_dtype", "zero_point_range", "packing", "written_by", "format_version")


def run(settings: Settings, console: Console) -> dict[str, Any]:
    """Show kind, grids, size by part, and provenance."""
    folder = read_folder(settings.arguments["model"])
    rows = parts(folder)
    quantization = folder.quantization
    result = {
        "folder": str(folder.path),
        "kind": folder.kind,
        "architecture": (folder.config.get("architectures") or [None])[0],
        "quantization": {key: quantization[key] for key in _SHOWN if key in quantization},
        "overrides": quantization.get("overrides") or {},
        "not_converted": quantization.get("modules_to_not_convert") or [],
        "provenance": _provenance(folder),
        "parts": rows,
        "bytes": sum(row["bytes"] for row in rows),
        "weights": sum(row["weights"] for row in rows),
        "bits_per_weight": round(bits_per_weight(folder), 4),
        "has_manifest": (folder.path / "bitdistiller.json").is_file(),
    }
    _show(result, console)
    return result


def _provenance(folder: Folder) -> dict[str, Any]:
    if folder.kind == "adapter":
        return {"base_model": folder.config.get("base_model_name_or_path"), "revision": folder.config.get("revision")}
    return dict(folder.quantization.get("provenance") or {})


def _show(result: dict[str, Any], console: Console) -> None:
    console.say(f"{result['folder']}: {result['kind']}, {result['architecture'] or 'no architecture named'}")
    for title in ("quantization", "provenance"):
        shown = {key: value for key, value in result[title].items() if value is not None}
        if shown:
            console.say(f"{title}: " + ", ".join(f"{key}={value}" for key, value in shown.items()))
    for name, override in result["overrides"].items():
        console.say(f"  {name}: {override}")
    if result["not_converted"]:
        console.say(f"in full precision: {', '.join(map(str, result['not_converted']))}")
    lines = [
        (row["part"], f"{row['tensors']}", f"{row['weights']:,}", f"{row['bytes']:,}", _bits(row))
        for row in result["parts"]
    ]
    total = ("total", "", f"{result['weights']:,}", f"{result['bytes']:,}", f"{result['bits_per_weight']:.3f}")
    console.say()
    console.say(table(("part", "tensors", "weights", "bytes", "bits/weight"), [*lines, total]))
    if not result["has_manifest"] and result["kind"] in ("packed", "latent"):
        console.say("\nno bitdistiller.json: damage would go unnoticed")


def _bits(row: dict[str, Any]) -> str:
    return f"{8 * row['bytes'] / row['weights']:.3f}" if row["weights"] else ""


VERB = Verb(
    "inspect",
    "what a model folder holds: size by part, true bits per weight",
    run,
    positionals=(Positional("model", "packed, latent, adapter or full-precision folder"),),
    epilog="example: bitdistiller inspect out/distill/packed",
)
