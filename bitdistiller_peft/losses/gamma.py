"""How sure a teacher is of a text, tile by tile: what gamma is estimated from before there is a student."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitdistiller_peft.losses.checks import as_head, check_side, target_rows, tiles
from bitdistiller_peft.losses.masking import IGNORE_INDEX
from bitdistiller_peft.losses.projection import Head, project


@dataclass(frozen=True, eq=False)
class ConfidenceSums:
    """Sums over the target tokens; add them up over batches and ranks, then divide once.

    Attributes:
        confidence: the teacher's probability of each label, summed; its mean is CAKLD's gamma.
        max_probability: the teacher's largest probability, summed; the released BitDistiller code averages this one.
        num_targets: how many target tokens there were.
    """

    confidence: Tensor
    max_probability: Tensor
    num_targets: int


@torch.no_grad()
def teacher_confidence(
    hidden: Tensor,
    head: Head | Tensor,
    labels: Tensor,
    *,
    tile_tokens: int | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> ConfidenceSums:
    """Add up the teacher's probability of the tokens that actually follow.

    Args:
        hidden: `[tokens, width]`, the teacher's last hidden states, any floating dtype.
        head: `Head`, or its bare weight `[vocab, width]`.
        labels: `[tokens]`, already shifted (`shift_labels`).
        tile_tokens: tokens per tile; None picks as many as make 64 MiB of logits on a CPU, 256 MiB elsewhere.
        ignore_index: the label of tokens that are no targets.

    Returns:
        Sums in fp32 (fp64 if `hidden` is), without gradient.

    Raises:
        ConfigError: shapes that do not fit.
        DataError: labels that do not fit the tokens or the vocabulary.

    Source:
        Du et al., BitDistiller (arXiv 2402.10631), section 3.2: gamma is the expectation of P_T(y_i | x, y_<i).
    """
    head = as_head(head)
    check_side("teacher", hidden, head)
    labels = labels.to(hidden.device)
    rows = target_rows(labels, len(hidden), len(head.weight), ignore_index)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    sums = torch.zeros(2, dtype=dtype, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        for tile in tiles(rows, tile_tokens, len(head.weight)):
            probs = project(hidden[tile], head, dtype).softmax(-1)
            of_label = probs.gather(-1, labels[tile].long().unsqueeze(-1))
            sums += torch.stack([of_label.sum(), probs.amax(-1).sum()])
    return ConfidenceSums(sums[0], sums[1], len(rows))
