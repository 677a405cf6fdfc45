"""`calibrate`: the front door."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bitdistiller_peft.calibration.awq import AwqSweep
from bitdistiller_peft.calibration.blockwise import reconstruct
from bitdistiller_peft.calibration.gptq_sweep import GptqSweep, check_slots
from bitdistiller_peft.calibration.options import AwqOptions, BlockwiseOptions, ClipOptions, GptqOptions, make_options
from bitdistiller_peft.calibration.progress import Progress
from bitdistiller_peft.calibration.ranks import share_of
from bitdistiller_peft.calibration.result import BlockReport, CalibrationResult
from bitdistiller_peft.calibration.slots import Display, Slot, find_student
from bitdistiller_peft.calibration.sweep import Sweep, result_of, segments
from bitdistiller_peft.calibration.texts import batches_of, check_length, fingerprint, token_windows
from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.kernels import LOAD_IN_FP32, warn_of_slow_bf16
from bitdistiller_peft.tuner import borrowed, note_provenance


def calibrate(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str] | Tensor | None,
    *,
    method: str = "clip",
    num_samples: int = 128,
    seq_len: int = 512,
    batch_size: int | None = None,
    show_progress: bool = True,
    output_path: str | Path | None = None,
    resume_dir: str | Path | None = None,
    **options: Any,
) -> CalibrationResult:
    """Fit the student to a calibration text before it is trained.

    `method="clip"` chooses, for every output channel and group, the range between shrunk ends that disturbs the
    layer's output least; layers are done front to back, each on inputs made by the calibrated ones before it.
    `method="gptq"` also moves the weights, so that rounding errors make up for one another. `method="awq"` scales
    weights by the size of their inputs, where the student owns something that can take the scale back.
    `method="blockwise"` goes on from there and trains the weights and scales of one decoder block after the other to
    reproduce the output of the full-precision block.

    The teacher (the base weights), train mode, `requires_grad` and random states are as before. A run that is
    interrupted leaves the model as it was; but a block-wise one keeps the blocks that are finished, and the one at
    work goes back to what it was.

    Where `torch.distributed` runs several processes, each with the whole student, `"clip"` and `"gptq"` deal the
    batches out and add up what they measure, so that all end with the same student. The other methods do the whole work
    on each.

    Args:
        model: the `PeftModel` from `get_bitdistiller_model`; its active adapter is calibrated, in place.
        tokenizer: the model's tokenizer; `None` for token ids.
        texts: calibration texts, joined and cut into windows in the order given; or token ids `[samples, seq_len]`; not
            looked at where `objective="weight"`.
        method: `"clip"`, `"gptq"`, `"awq"` or `"blockwise"`.
        num_samples: windows at most.
        seq_len: tokens in a window.
        batch_size: windows run at once; for `"blockwise"` also those of one training step. By default 1 for
            `"blockwise"`, else 8.
        show_progress: show a bar with the time left.
        output_path: also save the result there, see `CalibrationResult.save`.
        resume_dir: for `"blockwise"`, a folder of its own that keeps every finished block, as large as the student in
            the end. After a kill the same call on a freshly made model goes on with the first block that is missing,
            and ends with the same bytes; another model, text or option is refused. Delete it afterwards.
        options: the fields of `ClipOptions`, `GptqOptions`, `AwqOptions` or `BlockwiseOptions`, e.g.
            `skip=("q_proj", "k_proj")`.

    Returns:
        The result; `print` it for a table of errors, layer by layer.

    Raises:
        StateError: not such a model, or its adapter is merged or disabled.
        DataError: too little text, or activations that are not finite; the layer is named.
        ConfigError, UnknownNameError: an option outside its rule, GPTQ where scales are not learned, or a `resume_dir`
            that holds another run.
        WeightError: a weight that cannot be quantized; the layer is named.
        TrainingError: a block's loss is not finite; the block is named.

    Example:
        >>> result = calibrate(model, tokenizer, texts, num_samples=64)  # doctest: +SKIP
        >>> print(result)  # doctest: +SKIP
    """
    chosen = make_options(method, options)
    base, slots = find_student(model)
    chosen.check_skip([slot.layer_name for slot in slots])
    check_slots(slots, chosen)
    if chosen.needs_text:
        windows = token_windows(texts, tokenizer, num_samples, seq_len)
        check_length(base, windows.shape[1])
    else:
        windows = torch.empty(0, 0, dtype=torch.long)
    if batch_size is None:
        batch_size = 1 if method == "blockwise" else 8
    batches = batches_of(windows, batch_size, slots[0].weight.device)
    if chosen.needs_text:
        warn_of_slow_bf16(slots[0].weight.device, base.dtype, LOAD_IN_FP32)  # type: ignore[arg-type]  # not a tensor
    progress = _progress(resume_dir, base, slots, chosen, batches)
    with (
        borrowed(model),
        tqdm(total=len(slots) * chosen.passes, desc="Calibrating", unit="layer", disable=not show_progress) as bar,
    ):

        def advance(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        sweep, blocks = _run(base, slots, batches, chosen, advance, progress)
    result = result_of(sweep, {slot.name: slot.spec.to_dict() for slot in slots}, blocks, method, windows)
    if output_path is not None:
        result.save(output_path)
    seen = result.data["tokens_sha256"] if chosen.needs_text else None
    note_provenance(model, {"calibration": method, "calibration_data": seen})
    return result


def _progress(
    folder: str | Path | None, base: nn.Module, slots: list[Slot], options: ClipOptions, batches: list[Tensor]
) -> Progress:
    if folder is None:
        return Progress(None, base, slots, {})
    if not isinstance(options, BlockwiseOptions):
        raise ConfigError(
            f"`resume_dir` must be None but for method='blockwise': got resume_dir={str(folder)!r}. The other methods "
            "write nothing before they are done; call them again."
        )
    data = {"batch_size": batches[0].shape[0], "tokens_sha256": fingerprint(torch.cat(batches))}
    return Progress(Path(folder), base, slots, {**asdict(options), **data})


def _run(
    base: nn.Module,
    slots: list[Slot],
    batches: list[Tensor],
    options: ClipOptions,
    advance: Callable[[str], None],
    progress: Progress,
) -> tuple[Sweep, list[BlockReport]]:
    with Display() as display:
        if isinstance(options, BlockwiseOptions):
            sweep = Sweep(options, len(batches), display, advance)
            return sweep, list(reconstruct(base, slots, batches, sweep, progress))
        if isinstance(options, AwqOptions):
            scaling = AwqSweep(options, len(batches), display, advance)
            scaling.run(base, slots, batches)
            return scaling, []
        kind = GptqSweep if isinstance(options, GptqOptions) else Sweep
        share = share_of(batches)
        sweep = kind(options, len(share.batches), display, advance)  # type: ignore[arg-type]  # each its own options
        sweep.share = share
        for _ in segments(base, slots, share.batches, sweep):
            display.clear()
    sweep.apply(slots)
    return sweep, []
