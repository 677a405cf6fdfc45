"""The loss from hidden states to one number, without ever holding the logits of more than one tile of tokens.

The logits of a batch are its largest tensors by far: 16 384 tokens of a vocabulary of 128 256 are 8.4 GB in fp32, and
the textbook formula keeps eight such. But the loss needs them a token at a time, and its gradient with respect to a
token's logits is known as soon as they are. So each tile is projected, measured, differentiated by the formulas in
`tile.py`, and carried back to the hidden states at once; its logits are then forgotten. What waits for `backward()` is
`[tokens, hidden]`, and `[vocab, hidden]` if the head is trained, and `backward()` only multiplies it by a number.

That works because the loss is a sum, whose weights are known before it is computed. Divide the sum afterwards.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bitdistiller_peft.losses.checks import as_head, check_side, check_teacher, target_rows, tiles
from bitdistiller_peft.losses.masking import IGNORE_INDEX
from bitdistiller_peft.losses.objective import Objective
from bitdistiller_peft.losses.projection import Head, add_weight_gradient, hidden_gradient, project, pull_back
from bitdistiller_peft.losses.sparse import SparseTeacher, check_sparse
from bitdistiller_peft.losses.tile import STATISTICS, Tile, score_tile, statistic_names, strips


@dataclass(frozen=True, eq=False)
class DistillationOutput:
    """Sums over the target tokens; divide by the number of targets of the whole batch, over steps and ranks.

    `loss_sum` carries the gradient. All others are detached statistics of the unscaled parts, in nats unless said
    otherwise, and None where no teacher was given.

    Attributes:
        loss_sum: the objective, summed.
        num_targets: how many target tokens there were.
        cross_entropy: of the student with the labels.
        student_entropy: of the student's distribution.
        teacher_entropy: of the teacher's distribution.
        forward_kl: KL(teacher ‖ student), at the objective's temperature.
        reverse_kl: KL(student ‖ teacher), at the objective's temperature.
        confidence: the teacher's probability of each label, in [0, 1]; its mean is CAKLD's gamma.
        agreement: how often both would say the same token first, as a count.
        others: parts of the objective beyond these, `"jsd"` or registered ones, at the objective's temperature.
    """

    loss_sum: Tensor
    num_targets: int
    cross_entropy: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor | None = None
    forward_kl: Tensor | None = None
    reverse_kl: Tensor | None = None
    confidence: Tensor | None = None
    agreement: Tensor | None = None
    others: dict[str, Tensor] = field(default_factory=dict)

    @property
    def jsd(self) -> Tensor | None:
        """Generalized Jensen-Shannon divergence, if the objective names it."""
        return self.others.get("jsd")

    def sums(self) -> dict[str, Tensor]:
        """Collect what was measured, by name and detached, the loss as `"loss"`: what a trainer adds up over ranks."""
        named = {
            "loss": self.loss_sum.detach(),
            "cross_entropy": self.cross_entropy,
            "student_entropy": self.student_entropy,
            "teacher_entropy": self.teacher_entropy,
            "forward_kl": self.forward_kl,
            "reverse_kl": self.reverse_kl,
            "confidence": self.confidence,
            "agreement": self.agreement,
            **self.others,
        }
        return {name: value for name, value in named.items() if value is not None}


def distillation_loss(
    student_hidden: Tensor,
    student_head: Head | Tensor,
    teacher_hidden: Tensor | SparseTeacher | None,
    teacher_head: Head | Tensor | None,
    labels: Tensor,
    *,
    objective: Objective,
    tile_tokens: int | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> DistillationOutput:
    """Measure a student against its teacher, and be ready for `backward()`.

    Gradients reach `student_hidden` and, where they require one, the student head's weight and bias. None flows into
    the teacher, also where both share a tensor. Autocast is off inside: logits are fp32 (fp64 if a hidden state is).
    Differentiable once. Rows whose label is ignored are never read, whatever they hold, and get gradient zero.

    Args:
        student_hidden: `[tokens, student_width]`, last hidden states, any floating dtype.
        student_head: `Head`, or its bare weight `[vocab, student_width]`.
        teacher_hidden: `[tokens, teacher_width]`, a `SparseTeacher`, or None for an objective of cross-entropy alone.
        teacher_head: `Head`, or its bare weight `[vocab, teacher_width]`; None without `teacher_hidden`.
        labels: `[tokens]`, already shifted (`shift_labels`): the token that follows this hidden state.
        objective: what to minimize.
        tile_tokens: tokens per tile; None picks as many as make 64 MiB of logits per side on a CPU, 256 MiB elsewhere.
            Changes memory and speed only.
        ignore_index: the label of tokens that are no targets.

    Returns:
        Sums over the target tokens. With none, zeros that still lead back to the student.

    Raises:
        ConfigError: shapes that do not fit, vocabularies of different size, a teacher that is missing.
        DataError: labels that do not fit the tokens or the vocabulary, or that a `SparseTeacher` does not know.
    """
    student = as_head(student_head)
    teacher = None if teacher_head is None else as_head(teacher_head)
    check_side("student", student_hidden, student)
    sparse = teacher_hidden if isinstance(teacher_hidden, SparseTeacher) else None
    hidden = None if isinstance(teacher_hidden, SparseTeacher) else teacher_hidden
    if sparse is None:
        check_teacher(hidden, teacher, student_hidden, student, objective)
    else:
        check_sparse(sparse, len(student_hidden), objective)
    labels = labels.to(student_hidden.device)
    rows = target_rows(labels, len(student_hidden), len(student.weight), ignore_index)
    cuts = tuple(tiles(rows, tile_tokens, len(student.weight)))
    sides = [side.dtype for side in (student_hidden, hidden) if side is not None]
    dtype = functools.reduce(torch.promote_types, sides, torch.float32)
    batch = _Batch(student, hidden, teacher, labels, cuts, dtype, sparse)
    inputs = (student_hidden, student.weight, student.bias)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        loss_sum, sums = _FusedDistillation.apply(*inputs, batch, objective)  # type: ignore[no-untyped-call]
    else:
        sums = _run(student_hidden, batch, objective, (False, False, False)).sums
        loss_sum = sums[0]
    names = statistic_names(objective, has_teacher=batch.has_teacher)
    named = dict(zip(names, sums.unbind(), strict=True))
    others = {name: named.pop(name) for name in names if name not in STATISTICS}
    del named["loss"]
    return DistillationOutput(loss_sum, len(rows), others=others, **named)


class _Batch(NamedTuple):
    """All that is fixed while the student's gradient is computed."""

    student: Head
    teacher_hidden: Tensor | None
    teacher: Head | None
    labels: Tensor
    tiles: tuple[Tensor, ...]
    dtype: torch.dtype
    sparse: SparseTeacher | None = None

    @property
    def has_teacher(self) -> bool:
        return self.teacher is not None or self.sparse is not None


class _Sums(NamedTuple):
    """Statistics, loss first, and gradients with respect to hidden states, head weight and head bias."""

    sums: Tensor
    grads: tuple[Tensor | None, ...]


def _run(student_hidden: Tensor, batch: _Batch, objective: Objective, needs: tuple[bool, ...]) -> _Sums:
    """Go through the tiles once; `needs` says which gradients to collect."""
    inputs = (student_hidden, batch.student.weight, batch.student.bias)
    grads = tuple(
        torch.zeros_like(tensor, dtype=batch.dtype) if needed and tensor is not None else None
        for tensor, needed in zip(inputs, needs, strict=True)
    )
    names = statistic_names(objective, has_teacher=batch.has_teacher)
    sums = student_hidden.new_zeros(len(names), dtype=batch.dtype)
    with torch.no_grad(), torch.autocast(student_hidden.device.type, enabled=False):
        for rows in batch.tiles:
            sums += _run_tile(student_hidden[rows], rows, batch, objective, grads)
    return _Sums(sums, grads)


def _run_tile(
    hidden: Tensor, rows: Tensor, batch: _Batch, objective: Objective, grads: tuple[Tensor | None, ...]
) -> Tensor:
    """Sum the statistics of one tile and add to the gradients; everything of the size of its logits ends here."""
    student_logits = project(hidden, batch.student, batch.dtype)
    labels, teacher_logits, sparse = batch.labels[rows].long(), None, None
    if batch.sparse is not None:
        sparse = batch.sparse[rows]
        sparse.of(labels)
        teacher_logits = sparse.expand(student_logits)
    elif batch.teacher_hidden is not None and batch.teacher is not None:
        teacher_logits = project(batch.teacher_hidden[rows], batch.teacher, batch.dtype)
    whole = Tile(student_logits, teacher_logits, labels, sparse)
    names = statistic_names(objective, has_teacher=teacher_logits is not None)
    total = student_logits.new_zeros(len(names))
    for strip in strips(whole):
        values, slope = score_tile(strip, objective, with_gradient=any(grad is not None for grad in grads))
        total += torch.stack([values[name].sum() for name in names])
        if slope is not None:
            # The gradient takes the place of its logits, which nobody needs any more.
            strip.student_logits.copy_(pull_back(slope, strip.student_logits, batch.student))
    _carry_back(student_logits, hidden, rows, batch.student.weight, grads)
    return total


def _carry_back(slope: Tensor, hidden: Tensor, rows: Tensor, weight: Tensor, grads: tuple[Tensor | None, ...]) -> None:
    """Turn a gradient `[tokens, vocab]` of the projection into those of its inputs, in place."""
    hidden_grad, weight_grad, bias_grad = grads
    if hidden_grad is not None:
        hidden_grad[rows] = hidden_gradient(slope, weight)
    if weight_grad is not None:
        add_weight_gradient(weight_grad, slope, hidden)
    if bias_grad is not None:
        bias_grad += slope.sum(0)


class _FusedDistillation(torch.autograd.Function):
    """Computes the gradients on the way forward, and only scales them on the way back."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, batch: _Batch, objective: Objective
    ) -> tuple[Tensor, Tensor]:
        sums, grads = _run(hidden, batch, objective, ctx.needs_input_grad[:3])
        # fp32 until the incoming factor is known: an fp16 loss scale has to come before the rounding to fp16.
        ctx.save_for_backward(*grads)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(sums)
        return sums[0].clone(), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        grads = (
            None if grad is None else (grad * grad_loss).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*grads, None, None)
