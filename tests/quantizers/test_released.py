"""`arithmetic="released"`: the arithmetic of BitDistiller's released code, written out one weight at a time."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from bitdistiller_peft.errors import ConfigError, UnknownNameError
from bitdistiller_peft.quantizers import QuantSpec, dequantize, fake_quantize, find_params, quantize

GROUP = 16


def spec(bits: int = 2, arithmetic: str = "released") -> QuantSpec:
    return QuantSpec.create("int", bits, group_size=GROUP, scale_dtype="float32", arithmetic=arithmetic)


def written_out(group: list[float], bits: int) -> list[float]:
    """One group: s = max(max - min, 1e-5) / M; z = clamp(round(-min / s)); codes half away from zero; s (q - z)."""
    top = 2**bits - 1
    one = lambda value: torch.tensor(value, dtype=torch.float32)  # noqa: E731  (every step is one fp32 operation)
    scale = torch.clamp(one(max(group)) - one(min(group)), min=1e-5) / top
    zero = min(max(round(float(-one(min(group)) / scale)), 0), top)  # Python rounds half to even
    values = []
    for weight in group:
        steps = float(one(weight) / scale)
        away = math.copysign(math.floor(float(one(abs(steps)) + one(0.5))), steps)
        code = min(max(away + zero, 0), top)
        values.append(float(scale * one(code - zero)))
    return values


def samples() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    usual = torch.randn(24, GROUP, generator=generator)
    one_sided = 1 + 0.01 * torch.randn(4, GROUP, generator=generator)
    steps = torch.arange(GROUP).float() / 2 - 4  # halves of a step of 2.5, of which many are ties
    ties = torch.stack([steps.clamp(-1.5, 1.5) / 2, steps.clamp(-3, 3) / 2, -steps.clamp(-3, 3) / 2])
    small = 1e-7 * torch.randn(2, GROUP, generator=generator)
    return torch.cat([usual, one_sided, -one_sided, ties, small, torch.zeros(1, GROUP)])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_values_are_those_of_the_equations(bits: int) -> None:
    weight = samples()
    expected = torch.tensor([written_out(group.tolist(), bits) for group in weight])
    assert torch.equal(fake_quantize(weight, spec(bits)), expected)
    params = find_params(weight, spec(bits))
    assert torch.equal(dequantize(quantize(weight, params, spec(bits)), params, spec(bits)), expected)
    assert not torch.equal(fake_quantize(weight, spec(bits, "default")), expected)


def test_halves_are_rounded_away_from_zero_and_zero_points_to_even() -> None:
    # scale 1: the range is 3 wide; -min = 1.5 is a tie, to even: 2
    weight = torch.tensor([[-1.5, 1.5, 0.5, -0.5] * 4])
    params = find_params(weight, spec())
    assert (params.scale.item(), params.zero_point.item()) == (1.0, 2)
    assert quantize(weight, params, spec())[0, :4].tolist() == [0, 3, 3, 1]
    assert quantize(weight, params, spec(arithmetic="default"))[0, :4].tolist() == [0, 3, 2, 2]


def test_groups_of_one_sign_are_lost_as_published() -> None:
    weight = torch.linspace(0.99, 1.01, GROUP).unsqueeze(0)
    assert fake_quantize(weight, spec()).max() < 0.03
    assert (fake_quantize(weight, spec(arithmetic="default")) - weight).abs().max() < 0.2


def by_autograd(weight: Tensor, upstream: Tensor, bits: int) -> Tensor:
    """The gradient of the equations, rounding seen as the identity, through the graph of fp64 operations."""
    leaf = weight.double().clone().requires_grad_()
    top = 2**bits - 1
    low, high = leaf.amin(-1, keepdim=True), leaf.amax(-1, keepdim=True)
    scale = (high - low).clamp(min=1e-5) / top
    zero = (-low / scale).detach().round().clamp(0, top)
    steps = leaf / scale
    rounded = steps + (torch.sign(steps) * torch.floor(steps.abs() + 0.5) - steps).detach()
    (((rounded + zero).clamp(0, top) - zero) * scale * upstream).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("bits", [2, 3])
def test_gradients_are_those_of_the_equations(bits: int) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.cat(
        [torch.randn(24, GROUP, generator=generator), 1 + 0.1 * torch.rand(4, GROUP, generator=generator)]
    )
    upstream = torch.randn(weight.shape, generator=generator)
    leaf = weight.clone().requires_grad_()
    (fake_quantize(leaf, spec(bits)) * upstream).sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.double(), by_autograd(weight, upstream, bits), rtol=1e-4, atol=1e-4)


def test_a_range_that_is_held_at_its_least_passes_no_gradient_on() -> None:
    weight = (1e-7 * torch.randn(2, GROUP, generator=torch.Generator().manual_seed(0))).requires_grad_()
    fake_quantize(weight, spec()).sum().backward()
    assert weight.grad is not None
    assert set(weight.grad.flatten().tolist()) <= {0.0, 1.0}
    assert Fraction(float(find_params(weight, spec()).scale[0, 0])) > 0


def test_normal_float_is_the_same_in_both_arithmetics() -> None:
    weight = samples()
    values = [
        fake_quantize(weight, QuantSpec.create("nf", 3, group_size=GROUP, arithmetic=arithmetic))
        for arithmetic in ("default", "released")
    ]
    assert torch.equal(*values)


def test_what_the_released_code_has_no_form_of_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`arithmetic` must be 'default'.*grid='r2q'.*Use grid='int' or 'nf'"):
        QuantSpec.create("r2q", 2, arithmetic="released")
    with pytest.raises(ConfigError, match=r"zero_point_range=\(1, 2\)"):
        QuantSpec.create("int", 2, arithmetic="released", zero_point_range=(1, 2))
    with pytest.raises(UnknownNameError, match="arithmetic"):
        QuantSpec.create("int", 2, arithmetic="relaesed")
