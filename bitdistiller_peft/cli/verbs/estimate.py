"""`bitdistiller estimate`: memory, disk and size before anything is run; what cannot fit is refused with what would."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bitdistiller_peft.cli import memory
from bitdistiller_peft.cli.schema import STAGES
from bitdistiller_peft.cli.shapes import measure
from bitdistiller_peft.cli.tables import table
from bitdistiller_peft.cli.verb import Console, Settings, Verb
from bitdistiller_peft.errors import DoesNotFitError

_GIB = 2**30
PEAKS: dict[str, Callable[[memory.Sizes, dict[str, Any]], int]] = {
    "calibrate": memory.calibrate_peak,
    "generate": memory.generate_peak,
    "distill": memory.distill_peak,
    "eval": memory.eval_peak,
}
SAVINGS: dict[str, tuple[tuple[str, Any], ...]] = {
    "calibrate": (("batch_size", 1), ("num_samples", 32)),
    "generate": (("batch_size", 1), ("max_new_tokens", 128)),
    "distill": (
        ("gradient_checkpointing", True),
        ("per_device_train_batch_size", 1),
        ("optim", "adamw_8bit"),
        ("max_length", 256),
    ),
    "eval": (("batch_size", 1),),
}
"""What makes a stage smaller, mildest first."""


def run(settings: Settings, console: Console) -> dict[str, Any]:
    """Show the table, then refuse what does not fit.

    Raises:
        DoesNotFitError: a stage needs more memory, or the chain more disk, than there is; the setting that would do is
            named.
    """
    settings.need("model")
    sizes = measure(settings)
    chosen = [stage for stage in STAGES if stage in settings["run.stages"] and stage in PEAKS]
    where, limit = _capacity(settings)
    runtime = memory.RUNTIME if where == "memory" else 0
    peaks = {stage: PEAKS[stage](sizes, settings.section(stage)) + runtime for stage in chosen}
    disk, free = _disk(settings, sizes, chosen)
    result = {
        "weights": sizes.weights,
        "quantized_weights": sizes.quantized,
        "packed_bytes": sizes.packed_bytes,
        "bits_per_weight": 8 * sizes.packed_bytes / sizes.weights,
        "peak_bytes": peaks,
        "runtime_bytes": runtime,
        "limit_bytes": limit,
        "disk_bytes": disk,
        "free_disk_bytes": free,
    }
    _show(result, console, where)
    _refuse(settings, sizes, result, runtime)
    return result


def _show(result: dict[str, Any], console: Console, where: str) -> None:
    limit = result["limit_bytes"]
    rows = [
        (stage, f"{peak / _GIB:.2f}", "yes" if peak <= limit else "no") for stage, peak in result["peak_bytes"].items()
    ]
    console.say(table(("stage", f"peak {where}, GiB", f"fits in {limit / _GIB:.1f}"), rows))
    console.say(
        f"\npacked: {result['packed_bytes'] / 2**20:,.1f} MiB, {result['bits_per_weight']:.3f} bits per weight "
        f"({result['quantized_weights']:,} of {result['weights']:,} weights quantized)\n"
        f"disk: {result['disk_bytes'] / _GIB:.2f} GiB of {result['free_disk_bytes'] / _GIB:.1f} free"
    )


def _refuse(settings: Settings, sizes: memory.Sizes, result: dict[str, Any], runtime: int) -> None:
    faults = []
    for stage, peak in result["peak_bytes"].items():
        if peak > result["limit_bytes"]:
            advice = _advice(settings, sizes, stage, result["limit_bytes"] - runtime)
            faults.append(f"{stage} needs {peak / _GIB:.1f} GiB. {advice}")
    if result["disk_bytes"] > result["free_disk_bytes"]:
        faults.append(
            f"the files need {result['disk_bytes'] / _GIB:.1f} GiB. Set distill.save_total_limit=1, or another output."
        )
    if faults:
        have = f"{result['limit_bytes'] / _GIB:.1f} GiB of memory, {result['free_disk_bytes'] / _GIB:.1f} of disk"
        raise DoesNotFitError(f"this machine has {have}: " + " ".join(faults))


def _advice(settings: Settings, sizes: memory.Sizes, stage: str, limit: int) -> str:
    """The shortest way down the list of savings that fits."""
    values, changed = settings.section(stage), []
    for key, smaller in SAVINGS[stage]:
        before = PEAKS[stage](sizes, values)
        trial = {**values, key: smaller}
        after = PEAKS[stage](sizes, trial)
        if after >= before:
            continue
        values = trial
        changed.append(f"{stage}.{key}={smaller}")
        if after <= limit:
            return f"Set {', '.join(changed)}: {after / _GIB:.1f} GiB."
    least = PEAKS[stage](sizes, values)
    return f"Even with {', '.join(changed) or 'smaller batches'} it needs {least / _GIB:.1f} GiB: take a smaller model."


def _capacity(settings: Settings) -> tuple[str, int]:
    """What the device has in all: accelerator memory, or this machine's."""
    import psutil
    import torch

    asked = settings["device"]
    if asked != "cpu" and torch.cuda.is_available():
        return "GPU memory", int(torch.cuda.mem_get_info()[1])
    return "memory", int(psutil.virtual_memory().total)


def _disk(settings: Settings, sizes: memory.Sizes, chosen: list[str]) -> tuple[int, int]:
    """Bytes that the chain leaves, and bytes that are free where it writes."""
    total = sizes.packed_bytes
    if "calibrate" in chosen:
        total += sizes.student_bytes
    if "distill" in chosen:
        values = settings.section("distill")
        total += ((values["save_total_limit"] or 1) + 1) * memory.checkpoint_bytes(sizes, values)
    place = Path(settings["output"] or ".").absolute()
    while not place.exists():
        place = place.parent
    return total, shutil.disk_usage(place).free


VERB = Verb(
    "estimate",
    "memory, disk and size before anything is run",
    run,
    sections=("",),
    dotted=("quant", "calibrate", "generate", "distill", "eval", "run"),
    epilog="""
examples:
  bitdistiller estimate -c run.yaml
  bitdistiller estimate --model MODEL --quant.bits 3 --distill.optim adamw_8bit

Every setting of the file can be given as --section.name (--help-all). Exit code 4: it does not fit.""",
)
