"""Fake quantization on GPUs: one Triton program for the values, one for the gradients, one for the ends of groups."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bitdistiller_peft.kernels.sweeps import MAX_LEVELS, FusedSweeps, Job
from bitdistiller_peft.kernels.triton.ops import here, is_usable

TILE, LONGEST = 1024, 1024  # weights of a program at a time, and of one run at a time


class TritonSweeps(FusedSweeps):
    """The Triton programs, on contiguous fp32 weights."""

    def fits(self, groups: Tensor) -> bool:
        """Whether the kernels can run on this tensor."""
        is_plain = groups.dtype == torch.float32 and groups.is_contiguous() and groups.numel() > 0
        return is_plain and is_usable(groups.device)

    def run_ends(self, groups: Tensor, runs: int, size: int) -> tuple[Tensor, Tensor]:
        """Lowest and highest weight of each run."""
        low, high = groups.new_empty(runs), groups.new_empty(runs)
        _launch("ends", (low, high, groups), runs, size)
        return low, high

    def run_magnitudes(self, groups: Tensor, runs: int, size: int) -> Tensor:
        """Sum of ``|w|`` over each run: torch's, which makes one pass of it as well."""
        return groups.view(runs, size).abs().sum(1, dtype=torch.float64)

    def run_places(self, groups: Tensor, runs: int, size: int, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Where each run first holds its lowest and highest weight: torch's."""
        rows = groups.view(runs, size)
        return rows.min(1).indices, rows.max(1).indices

    def run_values(self, job: Job) -> Tensor:
        """What the codes stand for."""
        values = torch.empty_like(job.groups)
        tensors = (values, job.groups, *_parameters(job))
        _launch("values", tensors, job.runs, job.size, _numbers(job), **_constants(job))
        return values

    def run_gradients(self, job: Job, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient of the weight, and one number per run for each parameter."""
        weight = torch.empty_like(job.groups)
        first, second = job.groups.new_empty(job.runs), job.groups.new_empty(job.runs)
        tensors = (weight, first, second, job.groups, grad, *_parameters(job))
        numbers = (*_numbers(job), job.lowest, job.highest)
        _launch("gradients", tensors, job.runs, job.size, numbers, **_constants(job))
        return weight, first, second


def _launch(
    name: str, tensors: tuple[Tensor, ...], runs: int, size: int, numbers: tuple[float, ...] = (), **constants: Any
) -> None:
    """Run a program over all runs, a tile of them at a time."""
    block = min(LONGEST, 1 << (size - 1).bit_length())
    rows = max(1, TILE // block)
    with here(tensors[0].device):
        getattr(_programs(), name)[(-(-runs // rows),)](
            *tensors, runs, size, *numbers, R=rows, BLOCK=block, **constants
        )


def _parameters(job: Job) -> tuple[Tensor, ...]:
    second = job.scale if job.second is None else job.second
    levels, midpoints = _codebook(job.levels, job.midpoints, str(job.groups.device))
    return job.scale, second, levels, midpoints


def _numbers(job: Job) -> tuple[int, float, float]:
    return job.per_group, float(job.max_code), float(job.zero_point)


def _constants(job: Job) -> dict[str, Any]:
    return {"FAMILY": job.family, "HAS_SECOND": job.second is not None, "LEVELS": max(1, len(job.levels))}


@lru_cache(maxsize=64)
def _codebook(levels: tuple[float, ...], midpoints: tuple[float, ...], device: str) -> tuple[Tensor, Tensor]:
    first, second = (torch.tensor((*v, *(0.0,) * (MAX_LEVELS - len(v))), device=device) for v in (levels, midpoints))
    return first, second


def _programs() -> Any:
    from bitdistiller_peft.kernels.triton import fake_programs

    return fake_programs


SWEEPS = TritonSweeps()
