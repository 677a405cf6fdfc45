"""Fake quantization where each pass over a weight is one call: what is common to all kernels.

Plain torch makes about a dozen passes over the weight for the values and two dozen for the gradients, each through
main memory. Here it is one each, and no temporaries. A subclass says what it takes, and runs it.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from bitdistiller_peft.grids import AffineGrid, CodebookGrid, FineGrid
from bitdistiller_peft.quantizers import Extremes, Gradients, Quantizer, QuantParams, QuantSpec, Sweeps, zero_of
from bitdistiller_peft.quantizers.affine import AffineQuantizer
from bitdistiller_peft.quantizers.codebook import ROUNDING, CodebookQuantizer
from bitdistiller_peft.quantizers.fine import FineQuantizer
from bitdistiller_peft.quantizers.residual import ResidualQuantizer
from bitdistiller_peft.quantizers.ternary import TernaryQuantizer

MAX_LEVELS = 16
LONGEST_RUN = 1 << 14  # longer groups are cut, so that threads can share one and its sums stay short
SHORTEST_RUN = 1 << 8
AFFINE, CODEBOOK, RESIDUAL, FINE = range(4)
ZERO_POINTS = (AFFINE, FINE)


class Job(NamedTuple):
    """A weight as runs of consecutive floats, each a group or a part of one, and the parameters of its groups.

    Attributes:
        groups: the weight, contiguous.
        runs: how many.
        size: weights in one.
        per_group: runs in a group.
        family: `AFFINE`, `CODEBOOK`, `RESIDUAL` or `FINE`.
        scale: fp32, one per group.
        second: zero points in code steps, negative or residual scales, fp32, one per group; or `None`.
        num_levels: codes in use.
        max_code: where levels are evenly spaced.
        zero_point: of an affine grid without zero points of its own.
        levels: of a codebook.
        midpoints: of a codebook, where the nearest level changes.
        lowest: of a codebook: weights below, in units of the scale, are clamped.
        highest: likewise.
    """

    groups: Tensor
    runs: int
    size: int
    per_group: int
    family: int
    scale: Tensor
    second: Tensor | None
    num_levels: int
    max_code: float = 0.0
    zero_point: float = 0.0
    levels: tuple[float, ...] = ()
    midpoints: tuple[float, ...] = ()
    lowest: float = 0.0
    highest: float = 0.0


class FusedSweeps(Sweeps):
    """The families of grids that kernels know, in fp32; anything else goes the reference's way."""

    @abstractmethod
    def fits(self, groups: Tensor) -> bool:
        """Whether the kernels can run on this tensor."""

    @abstractmethod
    def run_ends(self, groups: Tensor, runs: int, size: int) -> tuple[Tensor, Tensor]:
        """Lowest and highest weight of each run; NaN where it holds one."""

    @abstractmethod
    def run_magnitudes(self, groups: Tensor, runs: int, size: int) -> Tensor:
        """Sum of ``|w|`` over each run, fp64."""

    @abstractmethod
    def run_places(self, groups: Tensor, runs: int, size: int, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Where each run first holds its lowest and highest weight, int64."""

    @abstractmethod
    def run_values(self, job: Job) -> Tensor:
        """What the codes stand for."""

    @abstractmethod
    def run_gradients(self, job: Job, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient of the weight, and one number per run for each parameter.

        For zero points it is the sum over clamped weights, to be multiplied by ``-scale``.
        """

    def ends(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Return each group's lowest and highest weight."""
        if not self.fits(groups):
            return super().ends(groups)
        low, high = self.run_ends(groups, *runs_of(groups))
        return _per_group(low, groups).amin(-1), _per_group(high, groups).amax(-1)

    def mean_magnitude(self, groups: Tensor) -> Tensor:
        """Return the mean of ``|w|`` over each group."""
        if not self.fits(groups):
            return super().mean_magnitude(groups)
        sums = self.run_magnitudes(groups, *runs_of(groups))
        return (_per_group(sums, groups).sum(-1) / groups.shape[-1]).float()

    def extremes(self, groups: Tensor) -> Extremes:
        """Find the ends of each group and where they stand."""
        runs, size = runs_of(groups) if self.fits(groups) else (0, 0)
        if size != groups.shape[-1]:
            return super().extremes(groups)
        low, high = self.run_ends(groups, runs, size)
        lowest, highest = self.run_places(groups, runs, size, low, high)
        return Extremes(*(tensor.view(groups.shape[:-1]) for tensor in (low, lowest, high, highest)))

    def values(self, quantizer: Quantizer, groups: Tensor, params: QuantParams, spec: QuantSpec) -> Tensor:
        """Round to codes and return what they stand for."""
        family = _family(quantizer, spec)
        if family is None or not self.fits(groups):
            return super().values(quantizer, groups, params, spec)
        return self.run_values(_job(family, groups, params, spec))

    def gradients(
        self, quantizer: Quantizer, grad: Tensor, groups: Tensor, params: QuantParams, spec: QuantSpec
    ) -> Gradients:
        """See `Quantizer.gradients`."""
        family = _family(quantizer, spec)
        if family is None or not (self.fits(groups) and grad.dtype == torch.float32):
            return super().gradients(quantizer, grad, groups, params, spec)
        weight, *sums = self.run_gradients(_job(family, groups, params, spec), grad.contiguous())
        first, second = (_per_group(each, groups).sum(-1) for each in sums)
        if family in ZERO_POINTS:
            return Gradients(weight, first, zero_point=second.mul_(params.scale.float()).mul_(-spec.grid.zero_step))
        if family == CODEBOOK:
            return Gradients(weight, first, scale_negative=None if params.scale_negative is None else second)
        if params.scale_residual is None:
            return Gradients(weight, first.add_(second, alpha=0.5))
        return Gradients(weight, first, scale_residual=second)


def runs_of(groups: Tensor) -> tuple[int, int]:
    """How many runs of which length the groups are cut into."""
    size = groups.shape[-1]
    if size > LONGEST_RUN:
        size = next((n for n in range(LONGEST_RUN, SHORTEST_RUN, -1) if size % n == 0), size)
    return groups.numel() // size, size


def _per_group(runs: Tensor, groups: Tensor) -> Tensor:
    """What each run came to, ``[..., groups, runs of a group]``."""
    return runs.view(*groups.shape[:-1], -1)


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
    FineQuantizer: FINE,
}


def _job(family: int, groups: Tensor, params: QuantParams, spec: QuantSpec) -> Job:
    runs, size = runs_of(groups)
    grid = spec.grid
    second = (params.zero_point, params.scale_negative, params.scale_residual, params.zero_point)[family]
    if family in ZERO_POINTS and second is not None:
        second = zero_of(second, grid)
    scale, other = (None if t is None else t.detach().float().contiguous() for t in (params.scale, second))
    job = Job(groups, runs, size, groups.shape[-1] // size, family, scale, other, grid.num_levels)  # type: ignore[arg-type]
    if isinstance(grid, FineGrid):
        return job._replace(max_code=grid.max_code)
    if isinstance(grid, AffineGrid):
        return job._replace(max_code=grid.max_code, zero_point=grid.fixed_zero_point or 0)
    if isinstance(grid, CodebookGrid):
        lowest, highest = grid.levels[0] * ROUNDING, grid.levels[-1] * ROUNDING
        return job._replace(levels=grid.levels, midpoints=grid.midpoints, lowest=lowest, highest=highest)
    return job
