"""Where a scale on the inputs of some layers can be taken back exactly, by tensors that belong to the student alone.

Inputs scaled by ``1 / s`` and weight columns scaled by ``s`` leave a layer's output as it is. Whatever makes the inputs
can make them smaller for free, if it is linear in something the student owns: the gain of a norm (the copy that
`train_other="norms"` gives the student, or its `SubLN`), or the rows of the layer before. The teacher's tensors are
never changed.

Which tensor that is depends on the architecture: an activation in between, a router that reads the same norm, heads
that share values, an added one in the gain. No list is kept of these. Every tensor of the right width is tried out: on
a few tokens, its scaling must undo what the scaling of the layers did to the output of the whole block. Powers of two
are tried, which floating-point numbers multiply without error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from bitdistiller_peft.calibration.capture import is_fused
from bitdistiller_peft.calibration.slots import Slot
from bitdistiller_peft.layers import SubLN

UNDONE = 0.01  # how much of the change may be left


@dataclass(frozen=True)
class Fold:
    """Tensors that can make the inputs of a layer smaller, input by input.

    Attributes:
        name: of the module, for people.
        tensors: a gain or a weight, and the bias that goes with it; the first axis is that of the layer's inputs.
        offset: what the module adds to the gain.
        is_own: whether they are the student's, so that the teacher does not notice.
    """

    name: str
    tensors: tuple[Tensor, ...]
    offset: float = 0.0
    is_own: bool = True

    @torch.no_grad()
    def divide(self, scale: Tensor) -> None:
        """Make what leaves the module ``1 / scale`` as large, in place."""
        gain, *biases = self.tensors
        shape = (-1, *[1] * (gain.ndim - 1))
        gain.copy_((gain.float() + self.offset) / scale.view(shape) - self.offset)
        for bias in biases:
            bias.copy_(bias.float() / scale)


def find_fold(
    block: nn.Module, readers: Sequence[Slot], slots: Sequence[Slot], run: Callable[[], Tensor]
) -> Fold | None:
    """Find what makes the inputs of some layers and can be scaled.

    Args:
        block: the decoder block, in which every slot shows its master weight.
        readers: the layers, which all read the same tensor.
        slots: all quantized layers of the block.
        run: runs the block on a few tokens.

    Returns:
        The first that undoes a scaling of the readers; one that the student owns, if there is one.
    """
    width = readers[0].weight.shape[-1]
    random = torch.Generator().manual_seed(0)
    scale = torch.exp2(torch.randint(-2, 3, (width,), generator=random).float()).to(readers[0].weight.device)
    output = run().float()
    scaled = [Fold(slot.name, (slot.weight.T,)) for slot in readers]
    with _divided(scaled, 1 / scale):
        change = float((run().float() - output).norm())
        found = []
        for fold in _candidates(block, readers, slots):
            with _divided([fold], scale):
                rest = float((run().float() - output).norm())
            if change > 0 and rest <= UNDONE * change:
                found.append(fold)
                if fold.is_own:
                    break
    return found[-1] if found else None


@contextmanager
def _divided(folds: Sequence[Fold], scale: Tensor) -> Iterator[None]:
    kept = [(tensor, tensor.clone()) for fold in folds for tensor in fold.tensors]
    try:
        for fold in folds:
            fold.divide(scale)
        yield
    finally:
        with torch.no_grad():
            for tensor, copy in kept:
                tensor.copy_(copy)


def _candidates(block: nn.Module, readers: Sequence[Slot], slots: Sequence[Slot]) -> Iterator[Fold]:
    width = readers[0].weight.shape[-1]
    for name, norm, is_own in reversed(list(_norms(block))):
        parameters = (getattr(norm, key, None) for key in ("weight", "bias"))
        tensors = tuple(tensor.detach() for tensor in parameters if isinstance(tensor, Tensor))
        if all(tensor.shape == (width,) for tensor in tensors):
            for offset in (0.0, 1.0):
                yield Fold(name, tensors, offset, is_own)
    for slot in reversed(slots):
        has_bias = getattr(slot.layer.base_layer, "bias", None) is not None  # the teacher's
        if slot in readers or is_fused(slot) or has_bias or slot.weight.shape[0] != width:
            continue
        if slot.spec.group_size != "tensor":  # there, scaling a row would change what the others are rounded to
            yield Fold(slot.layer_name, (slot.weight,))


def _norms(block: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """Modules with one weight for each feature, and whether they are the student's own."""
    wrapped: list[str] = []
    for name, module in block.named_modules():
        if any(name.startswith(f"{outer}.") for outer in wrapped):
            continue
        if isinstance(module, ModulesToSaveWrapper):
            wrapped.append(name)
            adapters: list[str] = module.active_adapters
            active = [adapter for adapter in adapters if adapter in module.modules_to_save]
            is_own = bool(active) and not module.disable_adapters
            inner = module.modules_to_save[active[0]] if is_own else module.original_module
            if _has_gain(inner):
                yield name, inner, is_own
        elif _has_gain(module):
            yield name, module, isinstance(module, SubLN)


def _has_gain(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 1
