"""`SubLN` is the formula in fp32, keeps its gains in fp32, and layers with it pass its gradients."""

from __future__ import annotations

import pytest
import torch

from bitdistiller_peft.errors import ConfigError, UnknownNameError
from bitdistiller_peft.layers import (
    FakeQuantLinear,
    InputSpec,
    SubLN,
    attach_inputs,
    attach_learned_params,
    check_subln,
)
from bitdistiller_peft.quantizers import QuantSpec, fake_quantize, fake_quantize_activations


def formula(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_norm_is_the_formula_rounded_once(dtype: torch.dtype, generator: torch.Generator) -> None:
    norm = SubLN(12, 1e-6)
    norm.weight.data = torch.randn(12, generator=generator)
    x = torch.randn(2, 3, 12, generator=generator).to(dtype)
    expected = formula(x.double(), norm.weight.detach().double(), 1e-6)
    assert norm(x).dtype == dtype
    torch.testing.assert_close(norm(x).double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_gains_start_at_one_and_are_moved_but_never_cast() -> None:
    norm = SubLN(4)
    assert norm.eps == 1e-8
    assert norm.weight.tolist() == [1.0] * 4
    for changed in (norm.to(torch.bfloat16), norm.half(), norm.double()):
        assert changed.weight.dtype == torch.float32
    assert norm.to("meta").weight.is_meta


def test_zero_inputs_give_zero() -> None:
    assert not SubLN(4)(torch.zeros(2, 4)).any()


def test_a_layer_normalizes_then_quantizes_then_multiplies(generator: torch.Generator) -> None:
    layer = FakeQuantLinear(16, 8)
    spec = QuantSpec.create("int", 2, group_size=8)
    attach_learned_params(layer, "weight", spec, learn_scale=False, learn_zero_point=False)
    attach_inputs(layer, InputSpec(8, 1e-5))
    layer.input_norm.weight.data = torch.rand(16, generator=generator) + 0.5
    x = torch.randn(3, 16, generator=generator)
    normed = fake_quantize_activations(formula(x, layer.input_norm.weight, 1e-5))
    torch.testing.assert_close(layer(x), normed @ fake_quantize(layer.weight, spec).T + layer.bias)
    layer(x).square().sum().backward()
    assert layer.input_norm.weight.grad.abs().min() > 0


@pytest.mark.parametrize("eps", [0.0, -1.0, float("nan"), float("inf"), "1e-6", None])
def test_an_eps_that_would_not_serve_is_refused(eps: object) -> None:
    with pytest.raises(ConfigError, match="`subln_eps` must be a positive number"):
        check_subln("output", eps)


def test_an_unknown_placement_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'output'"):
        check_subln("outputs", 1e-6)
