"""A linear layer in training multiplies by exactly what it will be packed to, and learns through it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bitdistiller_peft.layers import FakeQuantLinear, PackedLinear, attach_learned_params, quantized
from bitdistiller_peft.quantizers import QuantSpec, fake_quantize
from tests.quantizers.samples import each_grid, normal


def layer(spec: QuantSpec, *, learn_scale: bool = True, bias: bool = True) -> FakeQuantLinear:
    linear = FakeQuantLinear(24, 13, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(normal(13, 24))
        if bias:
            linear.bias.copy_(normal(13, seed=2))
    attach_learned_params(linear, "weight", spec, learn_scale=learn_scale, learn_zero_point=spec.grid.has_zero_point)
    return linear


def pack(linear: FakeQuantLinear) -> PackedLinear:
    codes, params = quantized(linear, "weight")
    return PackedLinear.from_codes(codes, params, linear.quant_specs["weight"], linear.bias)


def inputs() -> Tensor:
    return normal(2, 5, 24, seed=1)


@each_grid
@pytest.mark.parametrize("learn_scale", [False, True])
def test_it_multiplies_by_the_fake_quantized_weight(grid: str, bits: int, learn_scale: bool) -> None:
    spec = QuantSpec.create(grid, bits, group_size=8)
    linear = layer(spec, learn_scale=learn_scale)
    wanted = F.linear(inputs(), fake_quantize(normal(13, 24), spec), linear.bias)
    assert torch.equal(linear(inputs()), wanted)


@each_grid
@pytest.mark.parametrize("learn_scale", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_packed_layer_gives_the_same_bits(grid: str, bits: int, learn_scale: bool, dtype: torch.dtype) -> None:
    linear = layer(QuantSpec.create(grid, bits, group_size=8), learn_scale=learn_scale, bias=False)
    assert torch.equal(pack(linear)(inputs().to(dtype)), linear(inputs().to(dtype)))


@each_grid
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_the_packed_layer_gives_the_same_bits_under_autocast(grid: str, bits: int, cast: torch.dtype) -> None:
    linear = layer(QuantSpec.create(grid, bits, group_size=8))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with torch.autocast("cpu", cast):
            got, wanted = pack(linear)(inputs().to(dtype)), linear(inputs().to(dtype))
        assert got.dtype == wanted.dtype == cast
        assert torch.equal(got, wanted), dtype


@each_grid
def test_everything_that_is_learned_moves_in_a_step(grid: str, bits: int) -> None:
    linear = layer(QuantSpec.create(grid, bits, group_size=8))
    with torch.no_grad():
        linear.weight[:, ::8] = 9.0  # beyond the range: a zero point moves through clamped weights only
    before = {name: parameter.detach().clone() for name, parameter in linear.named_parameters()}
    optimizer = torch.optim.SGD(linear.parameters(), lr=1e-3)
    linear(inputs()).square().mean().backward()
    optimizer.step()
    still = [name for name, parameter in linear.named_parameters() if torch.equal(parameter, before[name])]
    assert not still


def test_the_weight_may_be_bf16_and_its_gradient_is() -> None:
    spec = QuantSpec.create("int", 2, group_size=8)
    linear = FakeQuantLinear(24, 13, bias=False, dtype=torch.bfloat16)
    attach_learned_params(linear, "weight", spec, learn_scale=True, learn_zero_point=False)
    out = linear(inputs().bfloat16())
    out.sum().backward()
    assert out.dtype == linear.weight.grad.dtype == torch.bfloat16
    assert linear.weight_scale.grad.dtype == torch.float32


@each_grid
def test_a_copy_and_a_state_dict_carry_everything(grid: str, bits: int) -> None:
    spec = QuantSpec.create(grid, bits, group_size=8)
    linear = layer(spec)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.mul_(1.1)
    twin, other = copy.deepcopy(linear), layer(spec)
    other.load_state_dict(linear.state_dict())
    wanted = linear(inputs())
    with torch.no_grad():
        linear.weight.zero_()
    assert torch.equal(twin(inputs()), wanted)
    assert torch.equal(other(inputs()), wanted)
    assert twin.quant_specs == {"weight": spec}
