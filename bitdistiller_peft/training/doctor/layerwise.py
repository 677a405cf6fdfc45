"""Which layer's quantization costs how much: KL divergence from the teacher with one part quantized, or all but one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bitdistiller_peft.errors import StateError, UnknownNameError
from bitdistiller_peft.losses import forward_kl
from bitdistiller_peft.tuner import BitDistillerLayer, borrowed, full_precision

QUANTIZED = ("one", "all_but_one")
BY = ("layer", "block")
_LOGITS_AT_ONCE = 1 << 24  # widened to fp32


def divergence_by_layer(
    student: nn.Module, inputs: Tensor | Sequence[Tensor], *, quantized: str = "one", by: str = "layer"
) -> dict[str, float]:
    """Measure what the quantization of each layer does to the predictions.

    Expensive: a forward pass for every part and one for the teacher, for every batch. A 7B Llama has 224 layers in 32
    blocks; a few hundred tokens already tell layers apart. Logits of one batch are held twice.

    Args:
        student: a student of ours whose adapter is in force; given back as it was.
        inputs: token ids ``[batch, time]`` without padding, or several such batches.
        quantized: ``"one"`` quantizes one part of the full-precision model at a time; ``"all_but_one"`` takes it back
            in the student, which shows what giving that part more bits could win.
        by: a part is a ``"layer"``, or all layers of a decoder ``"block"``, for a seventh of the passes.

    Returns:
        Name of the part to the mean KL(teacher ‖ student) per predicted token, in nats, in the order of the model.

    Raises:
        StateError: the model has no quantized layers in force, so that there is no teacher in it.
        UnknownNameError: another `quantized` or `by`.

    Example:
        >>> divergence_by_layer(model, ids, by="block")  # doctest: +SKIP
        {'model.layers.0': 0.013, 'model.layers.1': 0.009}
    """
    for name, value, known in (("quantized", quantized, QUANTIZED), ("by", by, BY)):
        if value not in known:
            raise UnknownNameError(name, value, known)
    parts = _parts(student, by)
    if not parts:
        raise StateError(
            f"`student` must have quantized layers in force: got {type(student).__name__} with none. Build it with "
            "get_bitdistiller_model(model, config), and do not merge or disable the adapter."
        )
    totals = dict.fromkeys(parts, 0.0)
    num_tokens = 0
    for ids in [inputs] if isinstance(inputs, Tensor) else inputs:
        with full_precision(student):
            teacher = _logits(student, ids)
        for name, layers in parts.items():
            with _only(student, layers) if quantized == "one" else _without(student, layers):
                totals[name] += _sum_kl(_logits(student, ids), teacher)
        num_tokens += ids.shape[0] * (ids.shape[1] - 1)
    return {name: total / max(1, num_tokens) for name, total in totals.items()}


def _parts(student: nn.Module, by: str) -> dict[str, list[BitDistillerLayer]]:
    parts: dict[str, list[BitDistillerLayer]] = {}
    for name, module in student.named_modules():
        if isinstance(module, BitDistillerLayer) and not module.disable_adapters and not module.merged:
            name = name.removeprefix("base_model.model.")
            block = re.match(r".*?\.\d+(?=\.)", name) if by == "block" else None
            parts.setdefault(block[0] if block else name, []).append(module)
    return parts


@contextmanager
def _only(student: nn.Module, layers: Sequence[BitDistillerLayer]) -> Iterator[None]:
    """The full-precision model with these layers quantized."""
    with full_precision(student):
        try:
            for layer in layers:
                layer.enable_adapters(True)
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(False)


@contextmanager
def _without(student: nn.Module, layers: Sequence[BitDistillerLayer]) -> Iterator[None]:
    """The student with these layers in full precision."""
    with borrowed(student):
        try:
            for layer in layers:
                layer.enable_adapters(False)
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)


def _logits(model: Any, ids: Tensor) -> Tensor:
    device = model.get_input_embeddings().weight.device
    logits: Tensor = model(input_ids=ids.to(device), use_cache=False).logits
    return logits


def _sum_kl(student: Tensor, teacher: Tensor) -> float:
    """Over all positions but the last of each row, a tile at a time."""
    ours, theirs = (logits[:, :-1].flatten(0, 1) for logits in (student, teacher))
    step = max(1, _LOGITS_AT_ONCE // ours.shape[-1])
    tiles = (slice(start, start + step) for start in range(0, len(ours), step))
    sums = [forward_kl(ours[tile].float(), theirs[tile].float()).sum(dtype=torch.float64) for tile in tiles]
    return float(torch.stack(sums).sum()) if sums else 0.0
