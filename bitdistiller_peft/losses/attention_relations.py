"""Attention-relation distillation: how alike the tokens of a sequence are, as one layer sees them, teacher and student.

For each of the queries, keys and values of one layer, ``[batch, heads, time, head_dim]`` after rotary embedding and
before keys and values are repeated:

    A = states as ``[batch, split_heads, time, width]``         all heads joined, then split anew
    R = softmax over keys of (relation of A with itself)        one distribution per sequence, split head and token
    row loss = KL(R_teacher ‖ R_student)

Source: BitNet Distillation (arXiv 2510.13998), equations 10 to 12 and algorithm 1, after MiniLM v2. Where the paper's
equation, its algorithm and the released code differ, `RelationObjective` has a switch. The student may have other
widths and head counts than the teacher: only the relations, ``[time, time]``, are compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from bitdistiller_peft.errors import ConfigError, UnknownNameError

RELATIONS = ("cosine", "scaled_dot")
RELATION_MASKS = ("padding", "causal", "none")
RELATION_REDUCTIONS = ("paper", "code")


@dataclass(frozen=True)
class RelationObjective:
    """What is compared, and how it is averaged.

    Attributes:
        split_heads: into how many parts the joined heads are split; it must divide every joined width.
        relation: ``"cosine"`` of the tokens (algorithm 1 and the released code), or ``"scaled_dot"``: the dot product
            over the root of the width (equation 12).
        mask: which keys a token is related to: ``"padding"``, all but padding; ``"causal"``, of these the ones up to
            itself; ``"none"``, all positions, padding included (paper and code). Rows of padding count in the last
            case only.
        reduction: ``"paper"``, the mean over sequences, split heads and tokens; ``"code"``, that divided by
            `split_heads` once more.

    Raises:
        UnknownNameError: a convention that does not exist.
        ConfigError: `split_heads` is not a positive integer.
    """

    split_heads: int = 32
    relation: str = "cosine"
    mask: str = "padding"
    reduction: str = "paper"

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        for name, allowed in (
            ("relation", RELATIONS),
            ("mask", RELATION_MASKS),
            ("reduction", RELATION_REDUCTIONS),
        ):
            if getattr(self, name) not in allowed:
                raise UnknownNameError(f"attention_{name}", getattr(self, name), allowed)
        if type(self.split_heads) is not int or self.split_heads < 1:
            raise ConfigError(
                f"`attention_split_heads` must be a positive integer: got {self.split_heads!r}. Use 32, as published."
            )


def count_rows(attention_mask: Tensor | None, shape: Sequence[int], objective: RelationObjective) -> int:
    """Count the tokens that a batch's loss is a sum over.

    Args:
        attention_mask: ``[batch, time]``, zero where there is padding; `None` for none.
        shape: ``(batch, time)``.
        objective: says whether padding counts.
    """
    if attention_mask is None or objective.mask == "none":
        return int(shape[0] * shape[1])
    return int(attention_mask.bool().sum())


def attention_relation_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    attention_mask: Tensor | None = None,
    *,
    objective: RelationObjective,
) -> Tensor:
    """Sum the row losses over tokens, averaged over split heads, summed over queries, keys and values.

    Divide by `count_rows` of the whole batch, over steps and ranks. One sequence's relations are in memory at a time.

    Args:
        student: queries, keys, values, each ``[batch, heads, time, head_dim]``; heads and widths may differ.
        teacher: the same of the teacher, with the student's batch and time; no gradient reaches it.
        attention_mask: ``[batch, time]``, zero where there is padding; `None` for none.
        objective: what is compared, and how.

    Returns:
        fp32 scalar (fp64 for fp64 states), differentiable once with respect to the student's states.

    Raises:
        ConfigError: `split_heads` does not divide a joined width, or batch and time differ.
    """
    for ours, theirs in zip(student, teacher, strict=True):
        if ours.shape[0] != theirs.shape[0] or ours.shape[2] != theirs.shape[2]:
            raise ConfigError(
                f"the teacher's states must have the student's batch and time: got {list(theirs.shape)} and "
                f"{list(ours.shape)}, [batch, heads, time, head_dim]. Feed both models the same batch."
            )
        _check_split(ours, objective.split_heads)
        _check_split(theirs, objective.split_heads)
    keep = None if attention_mask is None or objective.mask == "none" else attention_mask.to(student[0].device).bool()
    losses = [
        _RelationLoss.apply(ours, theirs.detach().to(ours.device), keep, objective)  # type: ignore[no-untyped-call]
        for ours, theirs in zip(student, teacher, strict=True)
    ]
    total: Tensor = torch.stack(losses).sum()
    return total / objective.split_heads if objective.reduction == "code" else total


def split_heads(states: Tensor, count: int) -> Tensor:
    """Join the heads of ``[batch, heads, time, head_dim]`` and split anew: ``[batch, count, time, width]``."""
    batch, _, time, _ = states.shape
    return states.transpose(1, 2).reshape(batch, time, count, -1).transpose(1, 2)


def _check_split(states: Tensor, count: int) -> None:
    width = states.shape[1] * states.shape[3]
    if width % count:
        divisors = [n for n in (4, 8, 16, 32, 64) if width % n == 0] or [states.shape[1]]
        raise ConfigError(
            f"`attention_split_heads` must divide the joined width of heads: got {count}, and {states.shape[1]} heads "
            f"of {states.shape[3]} features, {width} in all. Use one of {divisors}."
        )


def _row_losses(student: Tensor, teacher: Tensor, keep: Tensor | None, objective: RelationObjective) -> Tensor:
    """The loss of one sequence's states ``[split_heads, time, width]``, summed over tokens, a mean over split heads."""
    ours, theirs = (_log_relations(states, keep, objective) for states in (student, teacher))
    # a masked key has -inf on both sides, probability 0, and no say
    gap = torch.where(theirs.isinf(), 0.0, theirs - ours)
    rows = (theirs.exp() * gap).sum(-1)
    if keep is not None:
        rows = torch.where(keep, rows, 0.0)
    return rows.sum() / objective.split_heads


def _log_relations(states: Tensor, keep: Tensor | None, objective: RelationObjective) -> Tensor:
    if objective.relation == "cosine":
        states = F.normalize(states, dim=-1)
        scores = states @ states.transpose(-1, -2)
    else:
        scores = states @ states.transpose(-1, -2) / math.sqrt(states.shape[-1])
    time = scores.shape[-1]
    allowed = torch.ones(time, time, dtype=torch.bool, device=scores.device)
    if keep is not None:
        allowed = allowed & keep
    if objective.mask == "causal":
        allowed = allowed.tril()
    # a token is always related to itself: rows of padding stay finite, and are left out of the sum
    allowed = allowed | torch.eye(time, dtype=torch.bool, device=scores.device)
    return scores.masked_fill(~allowed, -math.inf).log_softmax(-1)


class _RelationLoss(torch.autograd.Function):
    """Finds the gradient on the way forward, one sequence at a time: what is kept is as large as the states."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, keep: Tensor | None, objective: RelationObjective
    ) -> Tensor:
        dtype = torch.promote_types(student.dtype, torch.float32)
        needs_grad = ctx.needs_input_grad[0]
        grad = torch.zeros_like(student, dtype=dtype) if needs_grad else None
        total = student.new_zeros((), dtype=dtype)
        with torch.autocast(student.device.type, enabled=False):
            for i in range(student.shape[0]):
                ours = student[i : i + 1].detach().to(dtype).requires_grad_(needs_grad)
                with torch.set_grad_enabled(needs_grad):
                    loss = _row_losses(
                        split_heads(ours, objective.split_heads)[0],
                        split_heads(teacher[i : i + 1].to(dtype), objective.split_heads)[0],
                        None if keep is None else keep[i],
                        objective,
                    )
                total += loss.detach()
                if grad is not None:
                    (grad[i : i + 1],) = torch.autograd.grad(loss, ours)
        ctx.save_for_backward(grad)
        ctx.dtype = student.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return (None if grad is None else (grad * grad_loss).to(ctx.dtype), None, None, None)
