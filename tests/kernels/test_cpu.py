"""The CPU kernels, on every instruction set here, give the reference's weights and fp64's products."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitdistiller_peft.grids import CodebookGrid, grid_names
from bitdistiller_peft.kernels import dequantize_packed, packed_linear, packed_ternary_int8_linear, use_backend
from bitdistiller_peft.kernels.cpu import best_isa, ops
from bitdistiller_peft.kernels.cpu.library import ISAS, load
from bitdistiller_peft.layers.companions import packed_tensors
from bitdistiller_peft.quantizers import QuantParams, QuantSpec
from bitdistiller_peft.quantizers.activation import quantize_activations
from tests.kernels import products
from tests.kernels.products import Packed, each_dtype, pack, weight_of
from tests.quantizers.samples import GRIDS, each_grid, hard_weight, normal

pytestmark = pytest.mark.skipif(load() is None, reason="the CPU kernels cannot be compiled on this machine")

each_isa = pytest.mark.parametrize("isa", ISAS[: ISAS.index(best_isa()) + 1])
SHAPES = [  # rows, width, group size
    pytest.param(1, 256, -1, id="one row"),
    pytest.param(13, 96, 32, id="odd rows"),
    pytest.param(7, 640, 128, id="blocks and a rest"),
    pytest.param(5, 1056, "tensor", id="one group"),
    pytest.param(6, 576, 64, id="rest of two units"),
    pytest.param(4, 1536, 96, id="groups across blocks"),
    pytest.param(4, 1024, 512, id="groups of two blocks"),
    pytest.param(6, 172, 43, id="odd groups"),
    pytest.param(2, 100, -1, id="width of no whole unit"),
    pytest.param(3, 8, 4, id="smaller than anything"),
]


def assert_product(inputs: Tensor, case: Packed, bias: Tensor | None = None) -> None:
    """Inputs in fp16 are multiplied in fp32, with the weight not rounded to fp16."""
    weight_dtype = torch.float32 if inputs.dtype == torch.float16 else None
    products.assert_product(inputs, case, bias, weight_dtype=weight_dtype)


@pytest.fixture(autouse=True)
def _on_the_cpu_backend() -> object:
    with use_backend("cpu"):
        yield


@pytest.fixture
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(ops, "isa", lambda: ISAS.index(request.param))
    return str(request.param)


with_isa = pytest.mark.parametrize("isa", ISAS[: ISAS.index(best_isa()) + 1], indirect=True)


def test_every_registered_grid_has_kernels() -> None:
    assert {grid for grid, _ in GRIDS} == set(grid_names())


@with_isa
@each_grid
@each_dtype
def test_weights_equal_the_references_bit_for_bit(isa: str, grid: str, bits: int, dtype: torch.dtype) -> None:
    for group_size, scale_dtype in ((-1, "float16"), (4, "float32"), (16, "bfloat16"), ("tensor", "bfloat16")):
        spec = QuantSpec.create(grid, bits, group_size=group_size, scale_dtype=scale_dtype)
        case = pack(hard_weight(48), spec)
        got = dequantize_packed(case.words, case.params, spec, case.width, dtype)
        assert torch.equal(got, weight_of(case, dtype)), (group_size, scale_dtype)


@with_isa
@each_grid
@pytest.mark.parametrize(("rows", "width", "group_size"), SHAPES)
def test_products_are_those_of_fp64(isa: str, grid: str, bits: int, rows: int, width: int, group_size: object) -> None:
    spec = QuantSpec.create(grid, bits, group_size=group_size, scale_dtype="float32")  # type: ignore[arg-type]
    case = pack(normal(rows, width), spec)
    for tokens in (1, 7):
        assert_product(normal(tokens, width, seed=1), case)
        assert_product(normal(tokens, width, seed=1).bfloat16(), case)


@with_isa
@each_dtype
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 8, 70, 200])
def test_every_number_of_tokens_and_scale_dtype(isa: str, dtype: torch.dtype, scale_dtype: str, tokens: int) -> None:
    spec = QuantSpec.create("int", 3, group_size=32, scale_dtype=scale_dtype)
    case = pack(normal(9, 544), spec)
    assert_product(normal(tokens, 544, seed=1).to(dtype), case, normal(9, seed=2).to(dtype))


@with_isa
@each_dtype
def test_strange_inputs(isa: str, dtype: torch.dtype) -> None:
    spec = QuantSpec.create("nf", 3, group_size=32)
    case = pack(normal(9, 96), spec)
    inputs = normal(4, 3, 96, seed=1).to(dtype)
    assert_product(inputs[:, 1], case)  # rows that lie apart
    assert_product(normal(96, 5, seed=1).to(dtype).T, case)  # columns first
    assert_product(inputs, case)
    for shape in ((0, 96), (2, 0, 96)):
        empty = packed_linear(torch.empty(shape, dtype=dtype), case.words, case.params, spec)
        assert empty.shape == (*shape[:-1], 9)
    one = packed_linear(inputs[0, 0], case.words, case.params, spec)
    assert one.shape == (9,)
    huge = (normal(2, 96, seed=1) * torch.finfo(torch.float16).max / 1000).to(dtype)
    assert_product(huge, case)
    broken = inputs[0].clone()
    broken[1, 5], broken[2, 7] = torch.inf, torch.nan
    got = packed_linear(broken, case.words, case.params, spec)
    assert bool(got[0].isfinite().all())
    assert not bool(got[2].isfinite().any())


@with_isa
@pytest.mark.parametrize("group_size", ["tensor", -1])
@pytest.mark.parametrize("packing", ["bitstream", "base3"])
@pytest.mark.parametrize("tokens", [0, 1, 7, 24, 25, 64, 130])
def test_ternary_times_int8_is_exact_for_any_number_of_tokens(
    isa: str, group_size: object, packing: str, tokens: int
) -> None:
    for rows, width in ((9, 544), (5, 43)):
        spec = QuantSpec.create("ternary", 2, group_size=group_size).packed_as(packing)  # type: ignore[arg-type]
        case, bias = pack(normal(rows, width), spec), normal(rows, seed=2)
        for dtype in (torch.float32, torch.bfloat16):
            inputs = (normal(2, tokens, width, seed=1) * 3).to(dtype)
            codes, step = quantize_activations(inputs)
            signs = weight_of(case, torch.float32).sign().to(torch.int64)
            total = (codes.to(torch.int64) @ signs.T).float() * case.params.scale.float().T * step
            wanted = (total + bias).to(dtype)
            got = packed_ternary_int8_linear(inputs, case.words, case.params, spec, bias)
            assert torch.equal(got, wanted)


@with_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ternary_times_int8_of_strange_inputs(isa: str, dtype: torch.dtype) -> None:
    spec = QuantSpec.create("ternary", 2, group_size="tensor")
    case = pack(normal(9, 96), spec)
    inputs = normal(6, 96, seed=1).to(dtype)
    inputs[0] = 0
    inputs[1] *= 1e30
    inputs[2] = 1e-30
    wanted = packed_ternary_int8_linear(inputs, case.words, case.params, spec)
    with use_backend("reference"):
        assert torch.equal(wanted, packed_ternary_int8_linear(inputs, case.words, case.params, spec))
    apart = torch.stack([inputs, inputs], 1)[:, 0]  # rows that lie apart
    assert torch.equal(packed_ternary_int8_linear(apart, case.words, case.params, spec), wanted)
    inputs[3, 95], inputs[4, 0] = torch.nan, torch.inf
    got = packed_ternary_int8_linear(inputs, case.words, case.params, spec)
    assert bool(got[3:5].isnan().all())
    assert torch.equal(got[[0, 1, 2, 5]], wanted[[0, 1, 2, 5]])


@with_isa
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_sums_of_ternary_times_int8(isa: str, sign: float) -> None:
    """Every product as large as can be: partial sums of few bits would overflow."""
    width = 20 * 256 + 32
    spec = QuantSpec.create("ternary", 2, group_size="tensor")
    params = QuantParams(torch.ones(1, 1, dtype=torch.float16))
    words = packed_tensors(torch.full((5, width), 2), params, spec)[""]
    for tokens in (1, 4, 18):
        got = packed_ternary_int8_linear(torch.full((tokens, width), 127.0 * sign), words, params, spec)
        assert torch.equal(got, torch.full((tokens, 5), 127.0 * sign * width))


@with_isa
def test_a_value_of_each_code_in_each_place(isa: str) -> None:
    """One input at a time, so that a code in the wrong lane, unit or row shows."""
    for bits in (2, 3, 4):
        width = 32 * 18
        codes = (torch.arange(8 * width).reshape(8, width) * 7 // 3) % (1 << bits)
        params = QuantParams(torch.ones(8, 1))
        spec = QuantSpec.create("int_sym", bits, group_size=-1, scale_dtype="float32")
        words = packed_tensors(codes, params, spec)[""]
        expected = codes.float() - (1 << (bits - 1))
        for tokens in (torch.eye(width)[:24], torch.eye(width)[-24:], torch.eye(width)[190:214]):
            for row in tokens.split(4):
                got = packed_linear(row, words, params, spec)
                assert torch.equal(got, row @ expected.T)


@given(
    grid=st.sampled_from([(g, b) for g, b in GRIDS if b < 8]),
    rows=st.integers(1, 9),
    units=st.integers(1, 40),
    group=st.sampled_from([1, 2, 3, 4, 8, 16]),
    tokens=st.integers(1, 9),
    bfloat=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape(
    grid: tuple[str, int], rows: int, units: int, group: int, tokens: int, bfloat: bool, seed: int
) -> None:
    width = units * group * 32 if units * group <= 48 else group * 32
    spec = QuantSpec.create(*grid, group_size=group * 32, scale_dtype="bfloat16")
    case = pack(normal(rows, width, seed=seed), spec)
    inputs = normal(tokens, width, seed=seed + 1)
    with use_backend("cpu"):
        assert_product(inputs.bfloat16() if bfloat else inputs, case)


def test_a_grid_of_ones_own_runs_on_the_reference(caplog: pytest.LogCaptureFixture) -> None:
    mine = CodebookGrid("mine", 2, levels=(-2.0, 0.0, 1.0, 3.0))
    spec = QuantSpec(mine, 32)
    case = pack(normal(5, 64), spec)
    got = packed_linear(normal(2, 64), case.words, case.params, spec)
    assert torch.equal(got, normal(2, 64) @ weight_of(case, torch.float32).T)
    assert "cannot multiply grid='mine'" in caplog.text


@pytest.mark.parametrize("tied", [False, True])
def test_two_signs_with_tied_scales(tied: bool) -> None:
    spec = QuantSpec.create("r2q", 2, group_size=32, **({"tied": True} if tied else {}))
    case = pack(normal(5, 64), spec)
    assert torch.equal(dequantize_packed(*case[:3], 64, torch.float32), weight_of(case, torch.float32))
    assert_product(normal(3, 64, seed=1), case)


def test_base3_words_are_multiplied_too() -> None:
    spec = QuantSpec.create("ternary", 2, group_size=-1).packed_as("base3")
    case = pack(normal(5, 100), spec)
    assert torch.equal(dequantize_packed(*case[:3], 100, torch.bfloat16), weight_of(case, torch.bfloat16))
    for tokens in (1, 200):
        assert_product(normal(tokens, 100, seed=1), case)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_no_number_of_threads_changes_a_bit(threads: int) -> None:
    case = pack(normal(101, 544), QuantSpec.create("int", 2, group_size=32))
    results: list[Tensor] = []
    before = torch.get_num_threads()
    for count in (1, threads):
        torch.set_num_threads(count)
        results.append(packed_linear(normal(3, 544, seed=1).bfloat16(), *case[:3]))
        results.append(dequantize_packed(*case[:3], 544, torch.bfloat16))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


Change = Callable[[Packed, Tensor], tuple[Packed, Tensor]]
WRONG: dict[str, Change] = {
    "inputs too wide": lambda case, x: (case, torch.cat([x, x], -1)),
    "inputs too narrow": lambda case, x: (case, x[:, :32]),
    "scales missing": lambda case, x: (case._replace(params=case.params._replace(scale=case.params.scale[:4])), x),
    "words missing": lambda case, x: (case._replace(words=case.words[:, :-1]), x),
    "words of another dtype": lambda case, x: (case._replace(words=case.words.long()), x),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG.keys())
def test_tensors_that_do_not_belong_together_are_refused_before_memory_is_read(change: Change) -> None:
    case, inputs = change(pack(normal(5, 96), QuantSpec.create("int", 2, group_size=32)), normal(2, 96))
    with pytest.raises(ValueError, match="a packed weight must have words"):
        packed_linear(inputs, case.words, case.params, case.spec)
