"""What every benchmark writes: one JSON file per machine kind, with the rows of its table and the figures asked for."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "transformers", "peft", "bitdistiller_peft")


def figure(value: float, unit: str, *, at_least: float | None = None, at_most: float | None = None) -> dict[str, Any]:
    """A number with what was asked of it, if anything; a number that falls short stays in."""
    asked = {key: limit for key, limit in (("min", at_least), ("max", at_most)) if limit is not None}
    return {"value": value, "asked": asked, "unit": unit}


def write_results(
    name: str, rows: Sequence[Mapping[str, Any]], figures: Mapping[str, dict[str, Any]], *, device: str = "cpu"
) -> Path:
    """Write `benchmarks/results/<name>.<device>.json`.

    Args:
        name: the benchmark's name.
        rows: the lines of its table, as plain values.
        figures: by name, each from `figure`.
        device: kind of machine, `"cpu"` or `"cuda"`.
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.{device}.json"
    content = {
        "name": name,
        "command": command(),
        "commit": commit(),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": machine(device),
        "versions": {"python": platform.python_version(), **_versions()},
        "rows": list(rows),
        "figures": dict(figures),
    }
    path.write_text(_compact(json.dumps(content, indent=1, allow_nan=False)) + "\n", encoding="utf-8")
    return path


def _compact(text: str) -> str:
    """JSON with every list of numbers on one line."""
    return re.sub(r"\[[\s\d.,eE+-]*\]", lambda match: " ".join(match[0].split()), text)


def command() -> str:
    """How this run was started; of paths only the last part, since folders differ from machine to machine."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {spec.name}" if spec is not None else f"python {Path(sys.argv[0]).name}"
    arguments = [Path(text).name if "/" in text else text for text in sys.argv[1:]]
    return " ".join([program, *arguments])


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Align rows of equal keys: text to the left, numbers to the right with four significant digits."""
    if not rows:
        return ""
    header = list(rows[0])
    is_text = {key: isinstance(rows[0][key], str) for key in header}
    lines = [header, *([_cell(row[key]) for key in header] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            f"{cell:{'<' if is_text[key] else '>'}{width}}"
            for key, cell, width in zip(header, line, widths, strict=True)
        ).rstrip()
        for line in lines
    )


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit that ran, with `+` if the tree had changes; empty outside of a checkout."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = [*git, "status", "--porcelain", "--untracked-files=no"]
        is_dirty = bool(subprocess.run(status, capture_output=True, text=True, check=True).stdout.strip())
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("+" if is_dirty else "")


def machine(device: str) -> str:
    """Describe where this runs: `device` is `"cpu"` or `"cuda"`."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
