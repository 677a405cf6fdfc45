"""Rotations inside attention that change nothing in full precision, and make weights easier to round.

Values leave attention as weighted sums over time, head by head. So one orthogonal matrix over the entries of a head can
be multiplied into the rows of the value projection and, transposed, into the columns of the output projection: both
are weights of the student, nothing is left to be done when the model runs, and the teacher does not notice. A rotated
row has no single large entry that would stretch the range of its group.

Source: the rotation R2 of SpinQuant (arXiv 2405.16406), section 3.1, random and not learned. Which layers those two are
is tried out on each block, as in `folding`: the rotation of the one must undo that of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitdistiller_peft.calibration.capture import is_fused
from bitdistiller_peft.calibration.slots import Slot

UNDONE = 0.05  # how much of the change may be left; in 16 bits a rotated block rounds otherwise


def head_width(model: nn.Module) -> int:
    """Entries of an attention head.

    Args:
        model: a transformers model.
    """
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def random_rotation(width: int, seed: int) -> Tensor:
    """A random orthogonal matrix ``[width, width]``, fp32: a Hadamard matrix with random signs where there is one."""
    generator = torch.Generator().manual_seed(seed)
    if width & (width - 1):
        return torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0].float()
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < width:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = torch.randint(0, 2, (width,), generator=generator) * 2 - 1
    return (matrix * signs / width**0.5).float()


@torch.no_grad()
def rotate_heads(slots: Sequence[Slot], width: int, run: Callable[[], Tensor], seed: int = 0) -> list[Slot]:
    """Rotate the values of one block's attention, in place, if a pair of layers is found that allows it.

    Args:
        slots: the block's layers, each of which shows its master weight.
        width: entries of a head.
        run: runs the block on a few tokens.
        seed: of the rotation.

    Returns:
        The two layers, whose scales are now out of date; none where no pair passed the trial.
    """
    if not slots:
        return []
    rotation, output = random_rotation(width, seed).to(slots[0].weight.device), run().float()
    for writer in slots:
        if (
            is_fused(writer)
            or writer.weight.shape[0] % width
            or getattr(writer.layer.base_layer, "bias", None) is not None
        ):
            continue
        for reader in slots:
            if reader is writer or is_fused(reader) or reader.weight.shape[1] % width:
                continue
            kept = [(slot.weight, slot.weight.clone()) for slot in (writer, reader)]
            _turn_rows(writer.weight, rotation)
            change = float((run().float() - output).norm())
            _turn_columns(reader.weight, rotation)
            rest = float((run().float() - output).norm())
            if change > 0 and rest <= UNDONE * change:
                return [writer, reader]
            for weight, copy in kept:
                weight.copy_(copy)
    return []


def _turn_rows(weight: Tensor, rotation: Tensor) -> None:
    heads = weight.float().reshape(-1, len(rotation), weight.shape[1])
    weight.copy_((rotation @ heads).reshape(weight.shape))


def _turn_columns(weight: Tensor, rotation: Tensor) -> None:
    heads = weight.float().reshape(weight.shape[0], -1, len(rotation))
    weight.copy_((heads @ rotation.T).reshape(weight.shape))
