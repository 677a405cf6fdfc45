"""The Triton kernels, in Triton's interpreter where there is no GPU: the reference's weights, and fp64's products."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bitdistiller_peft import BitDistillerConfig, get_bitdistiller_model
from bitdistiller_peft.errors import StateError, WeightError
from bitdistiller_peft.grids import grid_names
from bitdistiller_peft.kernels import backend_names, packed_linear, use_backend
from bitdistiller_peft.kernels.layout import operator_weight
from bitdistiller_peft.kernels.triton import ops
from bitdistiller_peft.quantizers import QuantSpec
from tests.kernels.products import Packed, assert_product, each_dtype, pack, weight_of
from tests.quantizers.samples import GRIDS, each_grid, hard_weight, normal
from tests.tiny import load, save_base, token_ids

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
runs = pytest.mark.skipif(not ops.is_usable(DEVICE), reason="Triton is not installed, or was imported for a GPU")
SHAPES = [  # rows, width, group size
    pytest.param(1, 256, -1, id="one row"),
    pytest.param(19, 96, 32, id="odd rows"),
    pytest.param(17, 576, 64, id="a rest of a tile"),
    pytest.param(5, 352, "tensor", id="one group"),
    pytest.param(4, 192, 96, id="a tile is a part of a group"),
    pytest.param(4, 512, 512, id="a tile is smaller than a group"),
    pytest.param(6, 172, 43, id="tiles cut through groups"),
    pytest.param(2, 100, -1, id="width of no whole word"),
    pytest.param(3, 8, 4, id="smaller than anything"),
]


@pytest.fixture(autouse=True)
def _on_the_triton_backend() -> object:
    with use_backend("triton"):
        yield


def test_it_is_a_backend_wherever_it_can_run_or_not() -> None:
    assert "triton" in backend_names()


@runs
def test_every_registered_grid_is_covered() -> None:
    assert {grid for grid, _ in GRIDS} == set(grid_names())


@runs
@each_grid
def test_weights_equal_the_references_bit_for_bit(grid: str, bits: int) -> None:
    for group_size, scale_dtype, dtype in (
        (-1, "float16", torch.float32),
        (4, "float32", torch.bfloat16),
        (16, "bfloat16", torch.float16),
        ("tensor", "bfloat16", torch.bfloat16),
    ):
        spec = QuantSpec.create(grid, bits, group_size=group_size, scale_dtype=scale_dtype)
        case = on_device(pack(hard_weight(48), spec))
        got = torch.ops.bitdistiller.triton_dequantize(*operands(case), case.width, dtype)
        assert torch.equal(got.cpu(), weight_of(case, dtype).cpu()), (group_size, scale_dtype)


@runs
@each_grid
def test_products_are_those_of_fp64(grid: str, bits: int) -> None:
    for rows, width, group_size in (parameter.values for parameter in SHAPES[:3]):
        case = packed(grid, bits, rows, width, group_size)
        for tokens in (1, ops.FEW_TOKENS + 1):
            assert_product(normal(tokens, width, seed=1).to(DEVICE), case)


@runs
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("rows", "width", "group_size"), SHAPES)
def test_every_way_that_tiles_and_groups_meet(bits: int, rows: int, width: int, group_size: object) -> None:
    case = packed("int", bits, rows, width, group_size)
    for tokens in (2, 21):
        assert_product(normal(tokens, width, seed=1).to(DEVICE), case, normal(rows, seed=2).to(DEVICE))


@runs
@each_dtype
@pytest.mark.parametrize("tokens", [0, 1, 4, 5, 70, ops.MANY_TOKENS + 1])
def test_every_way_to_multiply_in_every_dtype(tokens: int, dtype: torch.dtype) -> None:
    case = packed("nf", 3, 70, 128, 64)
    inputs, bias = normal(tokens, 128, seed=1).to(DEVICE, dtype), normal(70, seed=2).to(DEVICE, dtype)
    assert_product(inputs, case, bias, slack=2)  # few tokens: the weight itself is not rounded
    assert_product(inputs.view(1, tokens, 128), case, slack=2)


@runs
def test_inputs_may_be_views_and_huge() -> None:
    case = packed("int", 2, 9, 128, 64)
    wide = normal(128, 12, seed=3).to(DEVICE) * 1e30
    assert_product(wide.T[::2], case)


@runs
def test_gradients_reach_the_inputs_and_the_bias() -> None:
    case = packed("int", 2, 24, 128, 64)
    inputs = normal(3, 128, seed=1).to(DEVICE).requires_grad_()
    bias = normal(24, seed=2).to(DEVICE).requires_grad_()
    up = normal(3, 24, seed=3).to(DEVICE)
    packed_linear(inputs, case.words, case.params, case.spec, bias).backward(up)
    weight = weight_of(case, torch.float32)
    torch.testing.assert_close(inputs.grad, up @ weight)
    torch.testing.assert_close(bias.grad, up.sum(0))


@runs
def test_the_operator_keeps_the_rules_of_torch() -> None:
    case = packed("int", 2, 24, 128, 64)
    inputs = normal(2, 128, seed=1).to(DEVICE).requires_grad_()
    bias = normal(24, seed=2).to(DEVICE).requires_grad_()
    torch.library.opcheck(torch.ops.bitdistiller.triton_packed_linear.default, (inputs, bias, *operands(case)))


@runs
def test_a_packed_model_answers_as_with_the_reference(tmp_path: Path) -> None:
    base = load(save_base("llama-tied", tmp_path))
    model = get_bitdistiller_model(base, BitDistillerConfig(bits=2, group_size=16)).pack_and_unload().to(DEVICE).eval()
    ids = token_ids(1).to(DEVICE)
    with torch.no_grad():
        got = model(ids).logits
        with use_backend("reference"):
            expected = model(ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@runs
def test_tensors_that_do_not_fit_are_refused() -> None:
    case = packed("int", 2, 24, 128, 64)
    with pytest.raises(WeightError, match="in_features=64"):
        packed_linear(normal(1, 64).to(DEVICE), case.words, case.params, case.spec)


def test_without_a_gpu_and_an_interpreter_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "load", lambda: None)
    case = pack(normal(4, 64), QuantSpec.create("int", 2, group_size=64))
    with pytest.raises(StateError, match="use_backend\\('reference'\\)"):
        packed_linear(normal(1, 64), case.words, case.params, case.spec)


@pytest.mark.parametrize("group_size", [2, 8, 24, 32, 43, 64, 96, 128, 192, 256, 4096])
def test_tiles_end_where_groups_end(group_size: int) -> None:
    width, groups = ops.tile_width(group_size, groups=3)
    assert width & (width - 1) == 0
    assert width >= ops.LEAST_WIDTH
    if groups:
        assert width == groups * group_size or (groups == 1 and group_size % width == 0)


def packed(grid: str, bits: int, rows: int, width: int, group_size: object) -> Packed:
    spec = QuantSpec.create(grid, bits, group_size=group_size, scale_dtype="float32")  # type: ignore[arg-type]
    return on_device(pack(normal(rows, width), spec))


def on_device(case: Packed) -> Packed:
    params = type(case.params)(*(None if tensor is None else tensor.to(DEVICE) for tensor in case.params))
    return case._replace(words=case.words.to(DEVICE), params=params)


def operands(case: Packed) -> tuple[object, ...]:
    return (case.words, *operator_weight(case.params, case.spec))
