"""A packed layer is its fake-quantized one in fewer bits; nothing that is done to a module changes what it stores."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bitdistiller_peft.errors import TargetError
from bitdistiller_peft.layers import PackedLinear
from bitdistiller_peft.quantizers import QuantSpec, fake_quantize, find_params, quantize
from tests.quantizers.samples import each_grid, each_scale_dtype, hard_weight, normal

STORED = ("weight", "weight_scale", "weight_zero_point", "weight_scale_negative", "weight_scale_residual")
CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to(bfloat16)": lambda module: module.to(torch.bfloat16),
    "to(float16)": lambda module: module.to(torch.float16),
    "to(float64)": lambda module: module.to(torch.float64),
    "to(cpu, float16)": lambda module: module.to("cpu", torch.float16),
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "float": lambda module: module.float(),
    "double": lambda module: module.double(),
    "type": lambda module: module.type(torch.float16),
}


def packed(weight: Tensor, spec: QuantSpec, bias: Tensor | None = None) -> PackedLinear:
    params = find_params(weight, spec)
    return PackedLinear.from_codes(quantize(weight, params, spec), params, spec, bias)


def stored(layer: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in layer.state_dict().items() if name in STORED}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


@each_grid
@each_scale_dtype
@pytest.mark.parametrize("group_size", [-1, 8, "tensor"])
def test_a_packed_layer_holds_the_fake_quantized_weight(
    grid: str, bits: int, scale_dtype: str, group_size: int | str
) -> None:
    spec = QuantSpec.create(grid, bits, group_size=group_size, scale_dtype=scale_dtype)
    layer = packed(hard_weight(), spec)
    assert layer.dequantize().dtype == torch.float32
    assert torch.equal(layer.dequantize(), fake_quantize(hard_weight(), spec))
    assert torch.equal(layer.dequantize(torch.bfloat16), fake_quantize(hard_weight(), spec).bfloat16())


@each_grid
@pytest.mark.parametrize("with_bias", [False, True])
def test_it_multiplies_like_a_linear_layer_with_that_weight(grid: str, bits: int, with_bias: bool) -> None:
    spec = QuantSpec.create(grid, bits, group_size=8)
    bias = normal(13, seed=2) if with_bias else None
    plain = nn.Linear(24, 13, bias=with_bias)
    plain.load_state_dict({"weight": fake_quantize(normal(13, 24), spec), **({"bias": bias} if with_bias else {})})
    inputs = normal(3, 24, seed=1)
    assert torch.equal(packed(normal(13, 24), spec, bias)(inputs), plain(inputs))


@each_grid
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_no_cast_changes_what_is_stored(grid: str, bits: int, cast: Callable[[nn.Module], nn.Module]) -> None:
    spec = QuantSpec.create(grid, bits, group_size=8, scale_dtype="float32")
    layer = packed(normal(13, 24), spec, normal(13, seed=2))
    before, weight = stored(layer), layer.dequantize()
    assert cast(layer) is layer
    assert_same(stored(layer), before)
    assert torch.equal(layer.dequantize(), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_of_the_whole_model_changes_only_what_is_not_packed(dtype: torch.dtype) -> None:
    layer = packed(normal(13, 24), QuantSpec.create("nf", 3, group_size=8), normal(13, seed=2))
    model = nn.Sequential(nn.Sequential(layer), nn.LayerNorm(13)).to(dtype)
    assert layer.bias.dtype == model[1].weight.dtype == dtype
    assert layer.weight.dtype == torch.int32
    assert layer.weight_scale.dtype == layer.weight_scale_negative.dtype == torch.float16
    assert model(normal(2, 24).to(dtype)).dtype == dtype


def test_a_move_to_another_device_still_happens() -> None:
    layer = packed(normal(13, 24), QuantSpec.create("int", 2, group_size=8), normal(13))
    layer.to("meta", torch.bfloat16)
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}
    assert (layer.weight.dtype, layer.weight_scale.dtype, layer.bias.dtype) == (
        torch.int32,
        torch.float16,
        torch.bfloat16,
    )


@each_grid
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_goes_round(grid: str, bits: int, assign: bool) -> None:
    spec = QuantSpec.create(grid, bits, group_size=8)
    layer = packed(normal(13, 24), spec, normal(13, seed=2))
    fresh = PackedLinear(24, 13, spec=spec, bias=True, device="meta" if assign else None)
    fresh.load_state_dict(layer.state_dict(), assign=assign)
    assert_same(stored(fresh), stored(layer))
    assert torch.equal(fresh(normal(2, 24)), layer(normal(2, 24)))


def test_a_float_checkpoint_does_not_fit_into_a_packed_layer() -> None:
    layer = PackedLinear(64, 13, spec=QuantSpec.create("int", 2, group_size=8))
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_scale"):
        layer.load_state_dict(nn.Linear(64, 13, bias=False).state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer.load_state_dict(nn.Linear(64, 13, bias=False).state_dict(), strict=False)


@each_grid
@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy])
def test_a_copy_multiplies_alike_and_a_deep_one_stands_alone(
    grid: str, bits: int, duplicate: Callable[[nn.Module], nn.Module]
) -> None:
    layer = packed(normal(13, 24), QuantSpec.create(grid, bits, group_size=8))
    twin = duplicate(layer)
    wanted = layer(normal(2, 24))
    assert torch.equal(twin(normal(2, 24)), wanted)
    assert twin.spec == layer.spec
    if duplicate is copy.deepcopy:
        layer.weight.zero_()
        assert torch.equal(twin(normal(2, 24)), wanted)


@each_grid
def test_a_new_layer_has_the_tensors_that_packing_makes(grid: str, bits: int) -> None:
    spec = QuantSpec.create(grid, bits, group_size=8)
    made, new = packed(normal(13, 24), spec), PackedLinear(24, 13, spec=spec)
    for name, tensor in made.state_dict().items():
        assert (new.state_dict()[name].shape, new.state_dict()[name].dtype) == (tensor.shape, tensor.dtype)
    assert list(new.state_dict()) == list(made.state_dict())
    assert {name for name, _ in new.named_parameters()} <= set(STORED)


def test_it_is_a_linear_layer_that_nothing_trains_or_initialises() -> None:
    layer = packed(normal(13, 24), QuantSpec.create("int", 2, group_size=8), normal(13))
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (24, 13)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    before = stored(layer)
    layer.reset_parameters()
    assert_same(stored(layer), before)


def test_it_says_what_it_is() -> None:
    layer = packed(normal(13, 24), QuantSpec.create("nf", 3, group_size=-1))
    assert repr(layer) == (
        "PackedLinear(in_features=24, out_features=13, bias=False, grid='nf', bits=3, group_size=-1)"
    )
    assert "bias=True" in repr(packed(normal(13, 24), QuantSpec.create("int", 2, group_size="tensor"), normal(13)))


def test_gradients_pass_through_to_the_inputs_and_to_a_bias_that_trains() -> None:
    layer = packed(normal(13, 24), QuantSpec.create("int", 2, group_size=8), normal(13))
    layer.bias.requires_grad_()
    inputs = normal(2, 24).requires_grad_()
    upstream = normal(2, 13, seed=4)
    layer(inputs).backward(upstream)
    torch.testing.assert_close(inputs.grad, upstream @ layer.dequantize())
    torch.testing.assert_close(layer.bias.grad, upstream.sum(0))
    assert layer.weight.grad is None


def test_inputs_of_integers_are_refused() -> None:
    layer = packed(normal(13, 24), QuantSpec.create("int", 2, group_size=8))
    with pytest.raises(TargetError, match=r"must be floating point: got torch\.int32"):
        layer(normal(2, 24).to(layer.weight.dtype))


def test_it_takes_the_bits_it_promises() -> None:
    layer = packed(normal(256, 512), QuantSpec.create("int", 2, group_size=128))
    size = sum(tensor.nbytes for tensor in layer.state_dict().values())
    # two bits a weight, and for each of four groups a row: 16 bits of scale and one shared word of zero points
    assert size == 256 * (512 * 2 // 8 + 4 * 2 + 4)
