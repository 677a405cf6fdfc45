"""From positions to one number: which positions count, which label they answer to, and their sum.

The logits at position t predict the label at position t + 1. Written out for one sequence of four:

    position             0     1     2     3
    label             -100  -100     7     8
    predicts          -100     7     8     -        the label one to the right; the last position predicts nothing
    value               10    20    40    80
    counted                   20    40              sum 60, count 2

Sums and counts leave this file separately. Only whoever knows the whole batch, over accumulation steps and ranks, can
divide without making long and short sequences count differently in different splits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bitdistiller_peft.errors import DataError

IGNORE_INDEX = -100
"""The label of a position that is no target: prompt, padding, the first token of a packed document."""


def shift_labels(labels: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Move every label to the position whose logits predict it.

    Shifting labels, and not hidden states, leaves the big tensors whole: `hidden.flatten(0, 1)` stays a view.

    Args:
        labels: `[..., time]`, as a collator makes them: the label at t is the token at t.
        ignore_index: the label of positions that are no targets.

    Returns:
        `[..., time]`; the label at t is the token at t + 1, and `ignore_index` at the last position.
    """
    return F.pad(labels[..., 1:], (0, 1), value=ignore_index)


def select_targets(values: Tensor, labels: Tensor, ignore_index: int = IGNORE_INDEX) -> tuple[Tensor, Tensor]:
    """Keep the positions that predict a target, with the label each of them predicts.

    What is left out gets gradient zero, whatever stands there: selecting before computing is the one way in which a NaN
    at a masked position cannot reach a shared weight.

    Args:
        values: `[batch, time, ...]`, e.g. hidden states or logits.
        labels: `[batch, time]`, not shifted.
        ignore_index: the label of positions that are no targets.

    Returns:
        `[targets, ...]` and `[targets]`, in reading order.

    Raises:
        DataError: the shapes do not fit.
    """
    _check_positions(values, labels)
    answers = shift_labels(labels, ignore_index)
    is_target = answers != ignore_index
    return values[is_target], answers[is_target]


def sum_over_targets(per_position: Tensor, labels: Tensor, ignore_index: int = IGNORE_INDEX) -> tuple[Tensor, Tensor]:
    """Add up one value per position over the positions that predict a target.

    Args:
        per_position: `[batch, time]`, e.g. nats; position t belongs to the label at t + 1.
        labels: `[batch, time]`, not shifted.
        ignore_index: the label of positions that are no targets.

    Returns:
        The sum (fp32 at least) and the number of targets (int64), both 0-dimensional; 0 and 0 if there are none.

    Raises:
        DataError: the shapes differ.
    """
    _check_positions(per_position, labels)
    is_target = shift_labels(labels, ignore_index) != ignore_index
    # where, not *: a masked NaN does no harm to the sum.
    kept = torch.where(is_target, per_position, 0.0)
    return kept.sum(dtype=torch.promote_types(per_position.dtype, torch.float32)), is_target.sum()


def _check_positions(values: Tensor, labels: Tensor) -> None:
    if values.shape[: labels.dim()] != labels.shape:
        raise DataError(
            f"`labels` must have one entry per position: got labels={list(labels.shape)}, "
            f"values={list(values.shape)}. Pass labels as [batch, time]; they are shifted here."
        )
