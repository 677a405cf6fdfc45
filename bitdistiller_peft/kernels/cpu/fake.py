"""Fake quantization on CPUs: each pass over a weight is one call into the compiled kernels."""

from __future__ import annotations

from collections.abc import Iterable
from ctypes import byref
from typing import Any

import torch
from torch import Tensor

from bitdistiller_peft.errors import StateError
from bitdistiller_peft.kernels.cpu.library import FakeStruct, isa, load
from bitdistiller_peft.kernels.sweeps import FusedSweeps, Job


class CpuSweeps(FusedSweeps):
    """The compiled kernels, on contiguous fp32 weights in main memory."""

    def fits(self, groups: Tensor) -> bool:
        """Whether the kernels can run on this tensor."""
        is_plain = groups.dtype == torch.float32 and groups.is_contiguous() and groups.numel() > 0
        return is_plain and groups.device.type == "cpu"

    def run_ends(self, groups: Tensor, runs: int, size: int) -> tuple[Tensor, Tensor]:
        """Lowest and highest weight of each run."""
        low, high = torch.empty(runs), torch.empty(runs)
        _call("bd_ends", groups, runs, size, (low, high), isa())
        return low, high

    def run_magnitudes(self, groups: Tensor, runs: int, size: int) -> Tensor:
        """Sum of ``|w|`` over each run."""
        sums = torch.empty(runs, dtype=torch.float64)
        _call("bd_magnitudes", groups, runs, size, (sums,), isa())
        return sums

    def run_places(self, groups: Tensor, runs: int, size: int, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Where each run first holds its lowest and highest weight."""
        lowest, highest = torch.empty(runs, dtype=torch.int64), torch.empty(runs, dtype=torch.int64)
        _call("bd_places", groups, runs, size, (low, high, lowest, highest))
        return lowest, highest

    def run_values(self, job: Job) -> Tensor:
        """What the codes stand for."""
        values = torch.empty_like(job.groups)
        struct = _describe(job)
        struct.out = values.data_ptr()
        _library().bd_fake_quantize(byref(struct), isa(), torch.get_num_threads())
        return values

    def run_gradients(self, job: Job, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient of the weight, and one number per run for each parameter."""
        weight, first, second = torch.empty_like(job.groups), torch.empty(job.runs), torch.empty(job.runs)
        struct = _describe(job)
        struct.grad, struct.out = grad.data_ptr(), weight.data_ptr()
        struct.to_scale, struct.to_second = first.data_ptr(), second.data_ptr()
        _library().bd_fake_quantize_backward(byref(struct), isa(), torch.get_num_threads())
        return weight, first, second


def _describe(job: Job) -> FakeStruct:
    """The C description of a job, which must live as long as it is used."""
    struct = FakeStruct(
        weight=job.groups.data_ptr(),
        scale=job.scale.data_ptr(),
        second=None if job.second is None else job.second.data_ptr(),
        runs=job.runs,
        size=job.size,
        runs_per_group=job.per_group,
        family=job.family,
        num_levels=job.num_levels,
        max_code=job.max_code,
        zero_point=job.zero_point,
        lowest=job.lowest,
        highest=job.highest,
    )
    struct.levels[: len(job.levels)] = job.levels
    struct.midpoints[: len(job.midpoints)] = job.midpoints
    return struct


def _call(name: str, groups: Tensor, runs: int, size: int, outputs: Iterable[Tensor], *rest: int) -> None:
    pointers = [tensor.data_ptr() for tensor in outputs]
    getattr(_library(), name)(groups.data_ptr(), runs, size, *pointers, *rest, torch.get_num_threads())


def _library() -> Any:
    library = load()
    if library is None:
        raise StateError("the CPU kernels are not available on this machine. Use use_backend('reference').")
    return library


SWEEPS = CpuSweeps()
