"""Fake quantization on CPUs: each pass over a weight is one call into the compiled kernels.

Plain torch makes about a dozen passes over the weight for the values and two dozen for the gradients, each through
main memory. Here it is one each: about as long as a copy takes, and no temporaries.
"""

from __future__ import annotations

from collections.abc import Iterable
from ctypes import byref
from typing import Any

import torch
from torch import Tensor

from bitdistiller_peft.errors import StateError
from bitdistiller_peft.grids import AffineGrid, CodebookGrid
from bitdistiller_peft.kernels.cpu.library import FakeStruct, isa, load
from bitdistiller_peft.quantizers import Extremes, Gradients, Quantizer, QuantParams, QuantSpec, Sweeps
from bitdistiller_peft.quantizers.affine import AffineQuantizer
from bitdistiller_peft.quantizers.codebook import ROUNDING, CodebookQuantizer
from bitdistiller_peft.quantizers.residual import ResidualQuantizer
from bitdistiller_peft.quantizers.ternary import TernaryQuantizer

MAX_LEVELS = 16
LONGEST_RUN = 1 << 14  # longer groups are cut, so that threads can share one and its sums stay short
SHORTEST_RUN = 1 << 8
AFFINE, CODEBOOK, RESIDUAL = range(3)


class CpuSweeps(Sweeps):
    """The families of grids that the kernels know, in fp32; anything else goes the reference's way."""

    def ends(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Return each group's lowest and highest weight."""
        if not _fits(groups):
            return super().ends(groups)
        runs, size = _runs(groups)
        low, high = torch.empty(runs), torch.empty(runs)
        _call("bd_ends", groups, runs, size, (low, high), isa())
        return _per_group(low, groups).amin(-1), _per_group(high, groups).amax(-1)

    def mean_magnitude(self, groups: Tensor) -> Tensor:
        """Return the mean of ``|w|`` over each group."""
        if not _fits(groups):
            return super().mean_magnitude(groups)
        runs, size = _runs(groups)
        sums = torch.empty(runs, dtype=torch.float64)
        _call("bd_magnitudes", groups, runs, size, (sums,), isa())
        return (_per_group(sums, groups).sum(-1) / groups.shape[-1]).float()

    def extremes(self, groups: Tensor) -> Extremes:
        """Find the ends of each group and where they stand."""
        runs, size = _runs(groups) if _fits(groups) else (0, 0)
        if size != groups.shape[-1]:
            return super().extremes(groups)
        low, high = torch.empty(runs), torch.empty(runs)
        _call("bd_ends", groups, runs, size, (low, high), isa())
        lowest, highest = torch.empty(runs, dtype=torch.int64), torch.empty(runs, dtype=torch.int64)
        _call("bd_places", groups, runs, size, (low, high, lowest, highest))
        return Extremes(*(tensor.view(groups.shape[:-1]) for tensor in (low, lowest, high, highest)))

    def values(self, quantizer: Quantizer, groups: Tensor, params: QuantParams, spec: QuantSpec) -> Tensor:
        """Round to codes and return what they stand for."""
        family = _family(quantizer, spec)
        if family is None or not _fits(groups):
            return super().values(quantizer, groups, params, spec)
        values = torch.empty_like(groups)
        struct, keep = _describe(family, groups, params, spec)
        struct.out = values.data_ptr()
        _library().bd_fake_quantize(byref(struct), isa(), torch.get_num_threads())
        del keep
        return values

    def gradients(
        self, quantizer: Quantizer, grad: Tensor, groups: Tensor, params: QuantParams, spec: QuantSpec
    ) -> Gradients:
        """See `Quantizer.gradients`."""
        family = _family(quantizer, spec)
        if family is None or not (_fits(groups) and grad.dtype == torch.float32):
            return super().gradients(quantizer, grad, groups, params, spec)
        grad, weight = grad.contiguous(), torch.empty_like(groups)
        struct, keep = _describe(family, groups, params, spec)
        first, second = torch.empty(struct.runs), torch.empty(struct.runs)
        struct.grad, struct.out = grad.data_ptr(), weight.data_ptr()
        struct.to_scale, struct.to_second = first.data_ptr(), second.data_ptr()
        _library().bd_fake_quantize_backward(byref(struct), isa(), torch.get_num_threads())
        del keep
        first, second = _per_group(first, groups).sum(-1), _per_group(second, groups).sum(-1)
        if family == AFFINE:
            return Gradients(weight, first, zero_point=second.mul_(params.scale.float()).neg_())
        if family == CODEBOOK:
            return Gradients(weight, first, scale_negative=None if params.scale_negative is None else second)
        if params.scale_residual is None:
            return Gradients(weight, first.add_(second, alpha=0.5))
        return Gradients(weight, first, scale_residual=second)


def _family(quantizer: Quantizer, spec: QuantSpec) -> int | None:
    """Which of the kernels' formulas a quantizer follows; `None` for its own."""
    family = _FAMILIES.get(type(quantizer))  # a subclass may round in a way of its own
    if family == AFFINE and spec.arithmetic != "default":
        return None
    return None if family == CODEBOOK and spec.grid.num_levels > MAX_LEVELS else family


_FAMILIES: dict[type[Quantizer], int] = {
    AffineQuantizer: AFFINE,
    TernaryQuantizer: AFFINE,
    CodebookQuantizer: CODEBOOK,
    ResidualQuantizer: RESIDUAL,
}


def _fits(groups: Tensor) -> bool:
    return (
        groups.dtype == torch.float32 and groups.device.type == "cpu" and groups.is_contiguous() and groups.numel() > 0
    )


def _runs(groups: Tensor) -> tuple[int, int]:
    """How many runs of which length the groups are cut into."""
    size = groups.shape[-1]
    if size > LONGEST_RUN:
        size = next((n for n in range(LONGEST_RUN, SHORTEST_RUN, -1) if size % n == 0), size)
    return groups.numel() // size, size


def _per_group(runs: Tensor, groups: Tensor) -> Tensor:
    """What each run came to, ``[..., groups, runs of a group]``."""
    return runs.view(*groups.shape[:-1], -1)


def _describe(family: int, groups: Tensor, params: QuantParams, spec: QuantSpec) -> tuple[FakeStruct, list[Tensor]]:
    """The C description of a weight and its parameters, and the tensors that must live as long as it is used."""
    runs, size = _runs(groups)
    other = (params.zero_point, params.scale_negative, params.scale_residual)[family]
    tensors = [t.detach().float().contiguous() for t in (params.scale, other) if t is not None]
    struct = FakeStruct(
        weight=groups.data_ptr(),
        scale=tensors[0].data_ptr(),
        second=tensors[1].data_ptr() if other is not None else None,
        runs=runs,
        size=size,
        runs_per_group=groups.shape[-1] // size,
        family=family,
        num_levels=spec.grid.num_levels,
    )
    grid = spec.grid
    if isinstance(grid, AffineGrid):
        struct.max_code, struct.zero_point = grid.max_code, grid.fixed_zero_point or 0
    elif isinstance(grid, CodebookGrid):
        struct.lowest, struct.highest = grid.levels[0] * ROUNDING, grid.levels[-1] * ROUNDING
        struct.levels[: len(grid.levels)] = grid.levels
        struct.midpoints[: len(grid.midpoints)] = grid.midpoints
    return struct, tensors


def _call(name: str, groups: Tensor, runs: int, size: int, outputs: Iterable[Tensor], *rest: int) -> None:
    pointers = [tensor.data_ptr() for tensor in outputs]
    getattr(_library(), name)(groups.data_ptr(), runs, size, *pointers, *rest, torch.get_num_threads())


def _library() -> Any:
    library = load()
    if library is None:
        raise StateError("the CPU kernels are not available on this machine. Use use_backend('reference').")
    return library


SWEEPS = CpuSweeps()
