"""Attention-relation distillation as one writes it down: loops over sequences, heads and tokens, in fp64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def split_states(states: Tensor, count: int) -> Tensor:
    """Concatenate the heads of each token, and cut the result into `count` pieces."""
    batch, heads, time, width = states.shape
    piece = heads * width // count
    result = torch.zeros(batch, count, time, piece, dtype=torch.float64)
    for b in range(batch):
        for t in range(time):
            joined = torch.cat([states[b, h, t] for h in range(heads)])
            for s in range(count):
                result[b, s, t] = joined[s * piece : (s + 1) * piece]
    return result


def relation(states: Tensor, i: int, keys: list[int], kind: str) -> Tensor:
    """The distribution of token i over some keys."""
    scores = []
    for j in keys:
        dot = (states[i] * states[j]).sum()
        scores.append(
            dot / (states[i].norm() * states[j].norm()) if kind == "cosine" else dot / math.sqrt(len(states[i]))
        )
    return torch.stack(scores).softmax(0)


def relation_loss(
    student: list[Tensor], teacher: list[Tensor], mask: Tensor, *, heads: int, kind: str, masking: str, reduction: str
) -> Tensor:
    """Mean over rows, for queries, keys and values added up."""
    total = torch.zeros((), dtype=torch.float64)
    rows = int(mask.numel() if masking == "none" else mask.sum())
    for ours, theirs in zip(student, teacher, strict=True):
        s_states, t_states = split_states(ours.double(), heads), split_states(theirs.double(), heads)
        for b in range(len(mask)):
            for i in range(mask.shape[1]):
                if masking != "none" and not mask[b, i]:
                    continue
                keys = [
                    j
                    for j in range(mask.shape[1])
                    if (masking == "none" or mask[b, j]) and (masking != "causal" or j <= i)
                ]
                for s in range(heads):
                    p = relation(t_states[b, s], i, keys, kind)
                    q = relation(s_states[b, s], i, keys, kind)
                    total = total + (p * (p.log() - q.log())).sum() / heads
    total = total / rows
    return total / heads if reduction == "code" else total
