"""What the fused functions refuse before any work, and which rows they then look at."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bitdistiller_peft.errors import ConfigError, DataError
from bitdistiller_peft.losses.objective import Objective
from bitdistiller_peft.losses.projection import Head

_CPU_TILE_ELEMENTS = 1 << 24
_TILE_ELEMENTS = 1 << 26
"""Logits per tile and side: 64 MiB in fp32 on a CPU; 256 MiB where a product needs more rows to be worth its launch."""


def as_head(head: Head | Tensor) -> Head:
    """Wrap a bare weight `[vocab, hidden]`."""
    return Head(head) if isinstance(head, Tensor) else head


def check_side(side: str, hidden: Tensor, head: Head) -> None:
    """Refuse hidden states that the head cannot read.

    Args:
        side: `"student"` or `"teacher"`, for the message.
        hidden: should be `[tokens, hidden]`.
        head: the output projection, `[vocab, hidden]`.

    Raises:
        ConfigError: another number of dimensions, or another width.
    """
    if hidden.dim() != 2 or hidden.shape[1] != head.weight.shape[1]:
        raise ConfigError(
            f"`{side}_hidden` must be [tokens, hidden] with the width of its head: got "
            f"{side}_hidden={list(hidden.shape)}, {side}_head={list(head.weight.shape)}. "
            "Flatten batch and time first: hidden.flatten(0, 1)."
        )


def check_teacher(
    hidden: Tensor | None, head: Head | None, student_hidden: Tensor, student_head: Head, objective: Objective
) -> None:
    """Refuse a teacher that is missing, or that speaks of other tokens or another vocabulary.

    Args:
        hidden: the teacher's hidden states, or None.
        head: the teacher's head, or None.
        student_hidden: `[tokens, student_width]`.
        student_head: the student's head.
        objective: says whether a teacher is needed.

    Raises:
        ConfigError: any of these.
    """
    if hidden is None or head is None:
        if objective.needs_teacher or hidden is not None or head is not None:
            raise ConfigError(
                "`teacher_hidden` and `teacher_head` must both be given, or both be None for cross-entropy alone: got "
                f"{'None' if hidden is None else 'a tensor'} and {'None' if head is None else 'a head'}, "
                f"objective={sorted(objective.terms)}."
            )
        return
    check_side("teacher", hidden, head)
    if len(hidden) != len(student_hidden):
        raise ConfigError(
            f"`teacher_hidden` must have the student's tokens: got teacher_hidden={list(hidden.shape)}, "
            f"student_hidden={list(student_hidden.shape)}. Feed both models the same batch."
        )
    if len(head.weight) != len(student_head.weight):
        shared = min(len(head.weight), len(student_head.weight))
        raise ConfigError(
            f"`teacher_head` must have the student's vocabulary: got {len(head.weight)} and "
            f"{len(student_head.weight)} rows. If the tokenizers agree and only padding differs, pass "
            f"weight[:{shared}] (and bias[:{shared}]) of both."
        )


def target_rows(labels: Tensor, num_tokens: int, vocab: int, ignore_index: int) -> Tensor:
    """Find the tokens that count.

    Args:
        labels: `[tokens]`, integers.
        num_tokens: how many hidden states there are.
        vocab: how many logits a token has.
        ignore_index: the label of tokens that are no targets.

    Returns:
        Their positions, `[targets]`, ascending.

    Raises:
        DataError: another shape, labels that are not integers, or outside the vocabulary.
    """
    if labels.shape != (num_tokens,) or labels.is_floating_point():
        raise DataError(
            f"`labels` must be one integer per token: got labels={list(labels.shape)} of {labels.dtype}, "
            f"tokens={num_tokens}. Pass shift_labels(labels).flatten()."
        )
    rows = (labels != ignore_index).nonzero().squeeze(-1)
    if len(rows):
        lowest, highest = (bound.item() for bound in labels[rows].aminmax())
        if lowest < 0 or highest >= vocab:
            raise DataError(
                f"`labels` must lie in 0..{vocab - 1} or be {ignore_index}: got {lowest}..{highest}. "
                "Check that the tokenizer belongs to the model."
            )
    return rows


def tiles(rows: Tensor, tile_tokens: int | None, vocab: int) -> Iterator[Tensor]:
    """Cut the rows into tiles; none if there are no rows.

    Args:
        rows: positions, `[targets]`.
        tile_tokens: rows per tile, or None to let the vocabulary decide.
        vocab: how many logits a token has.

    Raises:
        ConfigError: `tile_tokens` is not a positive integer.
    """
    if tile_tokens is None:
        elements = _CPU_TILE_ELEMENTS if rows.device.type == "cpu" else _TILE_ELEMENTS
        tile_tokens = max(1, elements // max(1, vocab))
    if not isinstance(tile_tokens, int) or isinstance(tile_tokens, bool) or tile_tokens < 1:
        raise ConfigError(
            f"`tile_tokens` must be a positive integer: got tile_tokens={tile_tokens!r}. Use None or 256."
        )
    return iter(torch.split(rows, tile_tokens) if len(rows) else ())
