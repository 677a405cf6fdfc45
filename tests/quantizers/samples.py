"""Weights and specs that find faults: every grid and scale dtype; ties, one sign, constants, zeros and extremes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from bitdistiller_peft.grids import CodebookGrid, FineGrid, ResidualGrid, TernaryGrid
from bitdistiller_peft.quantizers import SCALE_DTYPES as DTYPES_BY_NAME
from bitdistiller_peft.quantizers import QuantParams, QuantSpec, dequantize, fake_quantize, find_params, quantize
from tests.reference import quantization as reference

WIDTHS = {
    "int": (2, 3, 4, 8),
    "int_sym": (2, 3, 4, 8),
    "int_fine": (2, 3, 4, 8),
    "nf": (2, 3, 4),
    "nf_sym": (2, 3, 4),
    "nf4": (4,),
    "fp": (3, 4),
    "fp_sym": (3, 4),
    "ternary": (2,),
    "r2q": (2,),
}
GRIDS = [(grid, bits) for grid, widths in WIDTHS.items() for bits in widths]
SCALE_DTYPES = tuple(DTYPES_BY_NAME)

each_grid = pytest.mark.parametrize(("grid", "bits"), GRIDS, ids=lambda value: str(value))
each_scale_dtype = pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)

# how the scales of grid "r2q" can be computed, beside the plain way
RESIDUAL_OPTIONS = [
    {"refine": refine, "tied": tied}
    for tied in (False, True)
    for refine in (None, "least_squares", "alternating")
    if refine or tied
]

# Levels of our own, so that nothing hangs on the outermost being 1, or the two sides being alike.
FP3 = CodebookGrid("fp3", 3, levels=(-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0))
LOPSIDED = CodebookGrid("lopsided", 3, levels=(-0.5, -0.25, 0.0, 1.0, 3.0), is_symmetric=True)


def normal(*shape: int, seed: int = 0, std: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std


def ties(spec: QuantSpec) -> Tensor:
    """One row whose scale is 1/4 in every dtype, and every point where the code changes, with its two neighbours."""
    if isinstance(spec.grid, CodebookGrid):
        levels = torch.tensor(spec.grid.levels)
        points, ends = torch.tensor(spec.grid.midpoints), levels[[0, -1]]
    elif isinstance(spec.grid, FineGrid):
        top = spec.grid.max_code
        points, ends = torch.arange(top) + 0.5 - 3 * top / 8, torch.tensor([-3 * top / 8, 5 * top / 8])
    else:
        top = spec.grid.num_levels - 1
        zero_point = (top + 1) // 2
        points = torch.arange(-zero_point, top - zero_point) + 0.5
        # the symmetric grid's own extreme is a tie beyond its last code
        ends = torch.tensor([-top / 2, top / 2] if not spec.grid.has_zero_point else [-zero_point, top - zero_point])
    points, ends = points * 0.25, ends.float() * 0.25
    around = [torch.nextafter(points, torch.tensor(side)) for side in (-torch.inf, torch.inf)]
    return torch.cat([ends, points, *around, torch.zeros(1)]).clamp(ends[0], ends[1]).unsqueeze(0)


def hard_weight(in_features: int = 24) -> Tensor:
    """Rows of every kind, each finite and storable with any scale dtype."""
    base = normal(1, in_features)
    rows = [
        base,
        base.abs() + 0.1,
        -base.abs() - 0.1,
        torch.full_like(base, 0.75),
        torch.full_like(base, -0.3),
        torch.zeros_like(base),
        base * (base > 0),
        (base * 4).round() / 4,  # many equal weights, extremes among them
        base * 1e4,
        base * 0.03,
        normal(1, in_features, seed=1) * 0.01 + 10,  # far from zero
        torch.cat([torch.zeros(1, in_features - 1), torch.tensor([[-5.0]])], -1),
        torch.cat([torch.full((1, in_features - 1), 0.02), torch.tensor([[3.0]])], -1),
    ]
    return torch.cat(rows)


def expected(weight: Tensor, spec: QuantSpec) -> reference.Quantized:
    """What the scalar reference says about a matrix ``[out, in]``."""
    grid, dtype = spec.grid, spec.scale_dtype_name
    quantize_group: Callable[[list[float]], reference.Quantized]
    if isinstance(grid, CodebookGrid):

        def quantize_group(group: list[float]) -> reference.Quantized:
            return reference.codebook_group(group, grid.levels, dtype, symmetric=grid.is_symmetric)
    elif isinstance(grid, ResidualGrid):

        def quantize_group(group: list[float]) -> reference.Quantized:
            return reference.residual_group(group, dtype, refine=spec.refine, tied=grid.is_tied)
    elif isinstance(grid, FineGrid):

        def quantize_group(group: list[float]) -> reference.Quantized:
            return reference.fine_group(group, grid.bits, dtype)
    elif isinstance(grid, TernaryGrid):

        def quantize_group(group: list[float]) -> reference.Quantized:
            return reference.ternary_group(group, dtype)
    else:

        def quantize_group(group: list[float]) -> reference.Quantized:
            return reference.affine_group(
                group, grid.bits, dtype, symmetric=not grid.has_zero_point, zero_point_range=spec.zero_point_range
            )

    return reference.quantize_matrix(weight.double().tolist(), spec.group_size, quantize_group)


def same_bits(got: Tensor, wanted: list) -> bool:
    """Whether fp32 values are the reference's down to the sign of zero."""
    bits = [[reference.f32_bits(value) for value in row] for row in wanted]
    return torch.equal(got.contiguous().view(torch.int32), torch.tensor(bits, dtype=torch.int32))


def assert_matches_reference(weight: Tensor, spec: QuantSpec) -> None:
    """Codes, parameters and values of a matrix, and what training sees, are the reference's bit for bit."""
    wanted = expected(weight, spec)
    params = find_params(weight, spec)
    codes = quantize(weight, params, spec)
    assert params.scale.dtype == spec.scale_dtype
    assert same_bits(params.scale.float(), wanted.scale)
    assert params._fields == wanted._fields[2:]
    for got, want in zip(params[1:], wanted[3:], strict=True):
        assert (got is None) == (want is None)
        assert got is None or same_bits(got.float(), want)
    assert codes.tolist() == wanted.codes
    assert same_bits(dequantize(codes, params, spec), wanted.values)
    assert same_bits(fake_quantize(weight, spec), wanted.values)


def steps(params: QuantParams, weight: Tensor, spec: QuantSpec) -> Tensor:
    """The scale in charge of each weight, fp64, shape of `weight` ``[..., out, in]``."""

    def spread(scale: Tensor) -> Tensor:
        repeats = weight.shape[-1] // scale.shape[-1]
        return scale.double().repeat_interleave(repeats, -1).expand(weight.shape)

    if params.scale_negative is None:
        return spread(params.scale)
    return torch.where(weight < 0, spread(params.scale_negative), spread(params.scale))


def widest_gap(spec: QuantSpec) -> float:
    """The largest distance between neighbouring levels, in units of the scale."""
    if isinstance(spec.grid, CodebookGrid):
        return max(high - low for low, high in pairwise(spec.grid.levels))
    return 1.0


specs = st.builds(
    lambda kind, size, dtype: QuantSpec.create(*kind, group_size=size, scale_dtype=dtype),
    st.sampled_from(GRIDS),
    st.sampled_from([-1, 1, 4, 6, 12, "tensor"]),
    st.sampled_from(SCALE_DTYPES),
)

# Down to 2**-6: the scale of 255 steps is then still a normal number in fp16. Halves and quarters make ties.
_magnitudes = st.one_of(st.floats(2**-6, 60.0, width=32), st.sampled_from([0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0]))
_weights = st.one_of(st.just(0.0), _magnitudes, _magnitudes.map(lambda x: -x))
_rows = st.one_of(
    st.lists(_weights, min_size=12, max_size=12),
    st.lists(_magnitudes, min_size=12, max_size=12),
    _weights.map(lambda weight: [weight] * 12),
)
matrices = st.lists(_rows, min_size=1, max_size=3).map(lambda rows: torch.tensor(rows, dtype=torch.float32))
