"""What each stage of a chain took, time and memory, kept beside the stages; a stage that was cut off adds up."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitdistiller_peft.cli.output import write_atomically
from bitdistiller_peft.errors import CheckpointError
from bitdistiller_peft.jsonfile import is_of_kind, read_object

COSTS = "costs.json"
_PROC = Path("/proc/self")


@contextlib.contextmanager
def recorded(root: Path, stage: str) -> Iterator[None]:
    """Measure what runs inside, and add it to the file of the chain, also when it fails.

    Peak memory is that of this process alone, where the system keeps a mark that can be set back (Linux); that of the
    accelerator is what torch allocated.

    Args:
        root: folder of the chain.
        stage: name of the stage.
    """
    _restart_peaks()
    start = time.perf_counter()
    try:
        yield
    finally:
        found = {"seconds": time.perf_counter() - start, **_peaks()}
        costs = _read(root / COSTS)
        was = costs.get(stage, {})
        seconds = was.get("seconds", 0.0) + found.pop("seconds")
        costs[stage] = {"seconds": seconds, **{key: max(value, was.get(key, 0)) for key, value in found.items()}}
        write_atomically(root / COSTS, json.dumps(costs, indent=1) + "\n")


def _read(path: Path) -> dict[str, Any]:
    """What was recorded so far; nothing of a file that is damaged, since figures of cost stop no run."""
    try:
        costs = read_object(path, "")
    except CheckpointError:
        return {}
    parts = {key: value for key, value in costs.items() if isinstance(value, dict)}
    return {key: {name: v for name, v in part.items() if is_of_kind(v, float)} for key, part in parts.items()}


def _restart_peaks() -> None:
    with contextlib.suppress(OSError):
        (_PROC / "clear_refs").write_text("5", encoding="ascii")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peaks() -> dict[str, int]:
    """Peak memory since the restart, in bytes; what cannot be known is left out."""
    peaks: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = (_PROC / "status").read_text(encoding="ascii", errors="replace").splitlines()
        peaks["peak_memory_bytes"] = 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        peaks["peak_accelerator_bytes"] = torch.cuda.max_memory_allocated()
    return peaks
