"""Start the gains of `SubLN` norms from data, so that a converted model is close to what it was.

A norm whose gains are one divides its input by its size, and the layer behind it answers at another scale than the
rest of the model expects. With all gains equal to the mean size of the layer's inputs, only the differences in size
between tokens are lost. BitNet Distillation (arXiv 2510.13998) starts from one and pre-trains on ten billion tokens;
this is for fewer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bitdistiller_peft.calibration.slots import find_student
from bitdistiller_peft.calibration.texts import batches_of, check_length, token_windows
from bitdistiller_peft.errors import ConfigError, DataError
from bitdistiller_peft.tuner import BitDistillerLayer
from bitdistiller_peft.tuner.lending import full_precision


def fit_subln(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str] | Tensor,
    *,
    num_samples: int = 16,
    seq_len: int = 512,
) -> dict[str, float]:
    """Set the gains of every `SubLN` to the mean root mean square of what the full-precision layer is given.

    Call it on a fresh student, before `calibrate` and training; gains that were trained are overwritten.

    Args:
        model: the `PeftModel` from `get_bitdistiller_model`, made with `subln="output"` or `"all"`; changed in place.
        tokenizer: the model's tokenizer; `None` for token ids.
        texts: as for `calibrate`; a few thousand tokens are enough.
        num_samples: windows at most.
        seq_len: tokens in a window.

    Returns:
        The gain of each layer, by name.

    Raises:
        StateError: not such a model, or its adapter is merged or disabled.
        ConfigError: the student has no such norm.
        DataError: too little text, or inputs that are not finite; the layer is named.

    Example:
        >>> fit_subln(model, tokenizer, texts)  # doctest: +SKIP
        {'model.layers.0.self_attn.o_proj': 0.21, ...}
    """
    base, slots = find_student(model)
    layers = {
        slot.layer_name: slot.layer for slot in slots if slot.layer.input_norm(slot.layer.active_name) is not None
    }
    if not layers:
        raise ConfigError(
            "`model` must have SubLN norms: got a student with subln='none'. Use BitDistillerConfig(subln='output')."
        )
    windows = token_windows(texts, tokenizer, num_samples, seq_len)
    check_length(base, windows.shape[1])
    sizes: dict[str, list[Tensor]] = {name: [] for name in layers}
    with full_precision(model), _listening(layers, sizes):
        for batch in batches_of(windows, 8, slots[0].weight.device):
            base(input_ids=batch, use_cache=False)
    gains = {name: float(torch.cat(found).mean()) for name, found in sizes.items()}
    for name, gain in gains.items():
        if not 0 < gain < float("inf"):
            raise DataError(f"the inputs of layer {name!r} must be finite and not all zero: got a mean size of {gain}.")
    with torch.no_grad():
        for name, layer in layers.items():
            norm = layer.input_norm(layer.active_name)
            if norm is not None:
                norm.weight.fill_(gains[name])
    return gains


@contextmanager
def _listening(layers: dict[str, BitDistillerLayer], sizes: dict[str, list[Tensor]]) -> Iterator[None]:
    def note(name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        sizes[name].append(args[0].float().square().mean(-1).sqrt().flatten().double().cpu())

    hooks = [layer.register_forward_pre_hook(partial(note, name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
