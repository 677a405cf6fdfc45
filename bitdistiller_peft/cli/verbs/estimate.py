"""`bitdistiller estimate`: memory, time, disk and size before anything is run; what cannot fit is refused."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bitdistiller_peft.cli import memory, models
from bitdistiller_peft.cli.options import Option
from bitdistiller_peft.cli.probe import seconds_of
from bitdistiller_peft.cli.schema import STAGES
from bitdistiller_peft.cli.shapes import measure
from bitdistiller_peft.cli.tables import table
from bitdistiller_peft.cli.texts import load_prompts, load_training_data
from bitdistiller_peft.cli.verb import Console, Settings, Verb
from bitdistiller_peft.errors import DoesNotFitError

_GIB = 2**30
PEAKS: dict[str, Callable[[memory.Sizes, dict[str, Any]], int]] = {
    "calibrate": memory.calibrate_peak,
    "generate": memory.generate_peak,
    "cache": memory.cache_peak,
    "distill": memory.distill_peak,
    "eval": memory.eval_peak,
}
SAVINGS: dict[str, tuple[tuple[str, Any], ...]] = {
    "calibrate": (("batch_size", 1), ("num_samples", 32)),
    "generate": (("batch_size", 1), ("max_new_tokens", 128)),
    "cache": (("batch_size", 1),),
    "distill": (
        ("gradient_checkpointing", True),
        ("quantize_once", False),
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
    device = models.choose_device(settings, console)
    where, limit = _capacity(device)
    sizes = replace(measure(settings, device), tile=memory.CPU_TILE if where == "memory" else memory.GPU_TILE)
    chosen = [stage for stage in STAGES if stage in settings["run.stages"] and stage in PEAKS]
    whole = memory.process_bytes if where == "memory" else int
    peaks = {stage: whole(PEAKS[stage](sizes, _values(settings, stage))) for stage in chosen}
    disk, free = _disk(settings, sizes, chosen)
    amounts = {stage: _amounts(settings, stage) for stage in chosen}
    result: dict[str, Any] = {
        "weights": sizes.weights,
        "quantized_weights": sizes.quantized,
        "packed_bytes": sizes.packed_bytes,
        "bits_per_weight": 8 * sizes.packed_bytes / sizes.weights,
        "peak_bytes": peaks,
        "runtime_bytes": whole(0),
        "limit_bytes": limit,
        "disk_bytes": sum(disk.values()),
        "disk": disk,
        "free_disk_bytes": free,
        "seconds": {},
    }
    fits = max(peaks.values(), default=0) <= limit and result["disk_bytes"] <= free
    if fits and settings.arguments["probe"]:
        result["seconds"] = _seconds(settings, device, amounts)
    _show(result, console, where)
    _refuse(settings, sizes, result, whole)
    return result


def _values(settings: Settings, stage: str) -> dict[str, Any]:
    """The settings of a stage; those of `cache` with the length of documents."""
    values = settings.section(stage)
    return {**values, "max_length": settings["distill.max_length"]} if stage == "cache" else values


def _amounts(settings: Settings, stage: str) -> tuple[float, float | None]:
    """The work of one go of a stage, for `seconds_of`, and how many goes; `None` where the data does not say."""
    values = settings.section(stage)
    match stage:
        case "calibrate":
            return values["num_samples"], 1.0
        case "generate":
            prompts = _num_prompts(settings)
            return values["max_new_tokens"], None if prompts is None else math.ceil(prompts / values["batch_size"])
        case "distill":
            return values["per_device_train_batch_size"] * values["max_length"], _num_steps(settings)
    return 0.0, None


def _num_prompts(settings: Settings) -> int | None:
    source, most = settings["generate.prompts"], settings["generate.max_prompts"]
    if source is None:
        return most
    return len(load_prompts(source, "text", has_template=False, max_prompts=most))


def _num_examples(settings: Settings) -> int | None:
    """Rows of the training data; those that `generate` will write, where it comes first."""
    if settings["distill.data"] is not None:
        return len(load_training_data(settings["distill.data"]))
    return _num_prompts(settings) if "generate" in settings["run.stages"] else None


def _num_steps(settings: Settings) -> float | None:
    """Forward and backward passes of the training."""
    values = settings.section("distill")
    if values["max_steps"] > 0:
        return float(values["max_steps"] * values["gradient_accumulation_steps"])
    rows = _num_examples(settings)
    return (
        None if rows is None else math.ceil(rows / values["per_device_train_batch_size"]) * values["num_train_epochs"]
    )


def _seconds(
    settings: Settings, device: str, amounts: dict[str, tuple[float, float | None]]
) -> dict[str, dict[str, float | None]]:
    """Seconds of one go and of the whole stage, by stage."""
    found: dict[str, dict[str, float | None]] = {}
    for stage, (amount, goes) in amounts.items():
        each = seconds_of(stage, settings, device, amount)
        if each is not None:
            found[stage] = {"each": each, "all": None if goes is None else each * goes}
    return found


def _show(result: dict[str, Any], console: Console, where: str) -> None:
    limit = result["limit_bytes"]
    rows = [
        (stage, f"{peak / _GIB:.2f}", "yes" if peak <= limit else "no", _time(result["seconds"].get(stage)))
        for stage, peak in result["peak_bytes"].items()
    ]
    console.say(table(("stage", f"peak {where}, GiB", f"fits in {limit / _GIB:.1f}", "time, about"), rows))
    console.say(
        f"\npacked: {result['packed_bytes'] / 2**20:,.1f} MiB, {result['bits_per_weight']:.3f} bits per weight "
        f"({result['quantized_weights']:,} of {result['weights']:,} weights quantized)\n"
        f"disk: {result['disk_bytes'] / _GIB:.2f} GiB of {result['free_disk_bytes'] / _GIB:.1f} free ({_parts(result)})"
    )


def _parts(result: dict[str, Any]) -> str:
    return ", ".join(f"{name} {size / _GIB:.2f}" for name, size in result["disk"].items())


def _time(seconds: dict[str, float | None] | None) -> str:
    if seconds is None or seconds["each"] is None:
        return ""
    total = seconds["all"]
    if total is None:
        return f"{seconds['each']:.2g} s a step"
    hours, minutes = total / 3600, total / 60
    return f"{hours:.1f} h" if hours >= 1 else f"{minutes:.1f} min" if minutes >= 1 else f"{total:.1f} s"


def _refuse(settings: Settings, sizes: memory.Sizes, result: dict[str, Any], whole: Callable[[int], int]) -> None:
    faults = []
    for stage, peak in result["peak_bytes"].items():
        if peak > result["limit_bytes"]:
            advice = _advice(settings, sizes, stage, result["limit_bytes"], whole)
            faults.append(f"{stage} needs {peak / _GIB:.1f} GiB. {advice}")
    if result["disk_bytes"] > result["free_disk_bytes"]:
        faults.append(
            f"the files need {result['disk_bytes'] / _GIB:.1f} GiB. Set distill.save_total_limit=1, or another output."
        )
    if faults:
        have = f"{result['limit_bytes'] / _GIB:.1f} GiB of memory, {result['free_disk_bytes'] / _GIB:.1f} of disk"
        raise DoesNotFitError(f"this machine has {have}: " + " ".join(faults))


def _advice(settings: Settings, sizes: memory.Sizes, stage: str, limit: int, whole: Callable[[int], int]) -> str:
    """The mildest savings that fit: down the list until they do, and then without those that are not needed."""
    values = _values(settings, stage)

    def peak(changed: dict[str, Any]) -> int:
        return whole(PEAKS[stage](sizes, {**values, **changed}))

    def say(changed: dict[str, Any]) -> str:
        return ", ".join(f"{stage}.{key}={value}" for key, value in changed.items())

    changed: dict[str, Any] = {}
    for key, smaller in SAVINGS[stage]:
        trial = {**changed, key: smaller}
        if peak(trial) < peak(changed):
            changed = trial
        if peak(changed) <= limit:
            for mild in list(changed):
                without = {name: value for name, value in changed.items() if name != mild}
                changed = without if peak(without) <= limit else changed
            return f"Set {say(changed)}: {peak(changed) / _GIB:.1f} GiB."
    return (
        f"Even with {say(changed) or 'smaller batches'} it needs {peak(changed) / _GIB:.1f} GiB: take a smaller model."
    )


def _capacity(device: str) -> tuple[str, int]:
    """What the device has in all: accelerator memory, or this machine's."""
    import psutil
    import torch

    if device.startswith("cuda"):
        return "GPU memory", int(torch.cuda.mem_get_info()[1])
    return "memory", int(psutil.virtual_memory().total)


def _disk(settings: Settings, sizes: memory.Sizes, chosen: list[str]) -> tuple[dict[str, int], int]:
    """Bytes that the chain leaves, by what they are, and bytes that are free where it writes."""
    total = {"packed": sizes.packed_bytes}
    if "calibrate" in chosen:
        total["calibrated student"] = sizes.student_bytes
    if "cache" in chosen:
        rows = _num_examples(settings)
        tokens = (rows or 0) * settings["distill.max_length"]  # at most: shorter documents take less
        total["teacher cache, at most"] = tokens * memory.cache_bytes_per_token(sizes, settings.section("cache"))
    if "distill" in chosen:
        values = settings.section("distill")
        total["checkpoints"] = ((values["save_total_limit"] or 1) + 1) * memory.checkpoint_bytes(sizes, values)
    place = Path(settings["output"] or ".").absolute()
    while not place.exists():
        place = place.parent
    return total, shutil.disk_usage(place).free


VERB = Verb(
    "estimate",
    "memory, time, disk and size before anything is run",
    run,
    sections=("",),
    own=(Option("probe", "bool", "tell the time, from a few real steps of cut-down models", True),),
    dotted=("quant", "calibrate", "generate", "cache", "distill", "eval", "run"),
    epilog="""
examples:
  bitdistiller estimate -c run.yaml
  bitdistiller estimate --model MODEL --quant.bits 3 --distill.optim adamw_8bit

Every setting of the file can be given as --section.name (--help-all). Exit code 4: it does not fit.""",
)
