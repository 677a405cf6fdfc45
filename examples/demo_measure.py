"""What the demo measures of every stage, and how it shows it: one row each, one table, one JSON file."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

PEAK_RESET = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


@dataclass
class Row:
    """One model of the comparison.

    Attributes:
        name: ``"full_precision"``, ``"rtn"``, ``"clip"`` or ``"distilled"``.
        perplexity: on the evaluation text.
        protocol: id of the evaluation; only rows with the same id compare.
        bits_per_weight: of the whole model, scales and embeddings included.
        file_bytes: size of the weight files.
        seconds: wall-clock to make and evaluate the model.
        peak_rss_bytes: largest resident memory meanwhile.
    """

    name: str
    perplexity: float = float("nan")
    protocol: str = ""
    bits_per_weight: float = float("nan")
    file_bytes: int = 0
    seconds: float = 0.0
    peak_rss_bytes: int = 0


@contextmanager
def measured(name: str, rows: list[Row]) -> Iterator[Row]:
    """Time a stage and note its peak memory; the row joins `rows` when the stage is done."""
    row = Row(name)
    say(f"\n== {name.replace('_', ' ')} ==")
    reset_peak()
    start = time.perf_counter()
    yield row
    row.seconds = time.perf_counter() - start
    row.peak_rss_bytes = peak_rss()
    rows.append(row)
    say(f"perplexity {row.perplexity:,.2f} after {row.seconds:.0f} s")


def reset_peak() -> None:
    """Let the kernel count the peak from here, where it can."""
    if PEAK_RESET.exists():
        try:
            PEAK_RESET.write_text("5")
        except OSError:
            return  # a sandbox may forbid it; the peak then is that of the whole run


def peak_rss() -> int:
    """Largest resident set since `reset_peak`, in bytes."""
    if STATUS.exists():
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def weight_bytes(folder: Path) -> int:
    """Bytes of the safetensors files in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def table(rows: list[Row]) -> str:
    """The closing table."""
    header = ("model", "perplexity", "bits/weight", "file MB", "seconds", "peak GB")
    lines = [
        (
            row.name.replace("_", " "),
            f"{row.perplexity:,.2f}",
            f"{row.bits_per_weight:.2f}",
            f"{row.file_bytes / 1e6:.1f}",
            f"{row.seconds:.0f}",
            f"{row.peak_rss_bytes / 1e9:.1f}",
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
    drawn = [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in (header, *lines)
    ]
    drawn.insert(1, "-" * len(drawn[0]))
    return "\n".join(drawn)


def write_summary(path: Path, rows: list[Row], **more: object) -> None:
    """Write the file that the next step can read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"rows": [asdict(row) for row in rows], **more}, indent=2) + "\n", encoding="utf-8")


def say(text: str) -> None:
    """Print a line now, also into a pipe."""
    print(text, flush=True)
