"""Calibration on several processes: each runs its share of the text, and what was measured is added up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class Share:
    """The batches of one process.

    Attributes:
        batches: what it runs.
        first: how many of them only show in which order layers are reached: that must be the same on every process.
        is_part: whether others have batches too.
    """

    batches: list[Tensor]
    first: int = 0
    is_part: bool = False


def share_of(batches: Sequence[Tensor]) -> Share:
    """Deal batches out, every n-th to each of n processes; all of them to one that is alone.

    Args:
        batches: token ids, the same on every process.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return Share(list(batches))
    rank, count = distributed.get_rank(), distributed.get_world_size()
    own = list(batches[rank::count])
    return Share(own, is_part=True) if rank == 0 else Share([batches[0], *own], first=1, is_part=True)


def add_up(tensors: Sequence[Tensor]) -> None:
    """Add tensors over all processes, in place: every one ends with the same bits.

    Args:
        tensors: the same number and shapes on every process.
    """
    for tensor in tensors:
        distributed.all_reduce(tensor)


def add_up_count(count: int, device: torch.device) -> int:
    """Add a number over all processes."""
    total = torch.tensor(count, device=device)
    distributed.all_reduce(total)
    return int(total)
