"""int8 activations times ternary weights is exact: equal to integers in int32, in any order, in training and packed."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from bitdistiller_peft.kernels import is_exact_product, ternary_int8_linear, ternary_int8_reference
from bitdistiller_peft.quantizers import QuantSpec, dequantize, fake_quantize_activations, find_params, quantize
from bitdistiller_peft.quantizers.activation import quantize_activations

SPECS = {size: QuantSpec.create("ternary", 2, group_size=size, gradient="ste") for size in ("tensor", -1)}
each_size = pytest.mark.parametrize("size", SPECS, ids=str)


def ternary(size: int | str, generator: torch.Generator, out: int = 24, width: int = 300):
    weight = torch.randn(out, width, generator=generator) * 0.02
    weight[3] = 0
    params = find_params(weight, SPECS[size])
    codes = quantize(weight, params, SPECS[size])
    return codes, params, dequantize(codes, params, SPECS[size])


@each_size
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_product_equals_integer_accumulation_bit_for_bit(
    size: int | str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    codes, params, weight = ternary(size, generator)
    inputs, bias = torch.randn(2, 5, 300, generator=generator).to(dtype), torch.randn(24, generator=generator)
    activations, step = quantize_activations(inputs)
    flat = activations.flatten(0, 1).to(torch.int8), step.flatten(0, 1)
    expected = ternary_int8_reference(*flat, codes.to(torch.int8) - 1, params.scale) + bias
    assert torch.equal(ternary_int8_linear(inputs, weight, bias), expected.unflatten(0, (2, 5)).to(dtype))


@each_size
def test_the_order_of_the_features_does_not_matter(size: int | str, generator: torch.Generator) -> None:
    _, _, weight = ternary(size, generator)
    inputs = torch.randn(4, 300, generator=generator) * 1e3
    order = torch.randperm(300, generator=generator)
    assert torch.equal(
        ternary_int8_linear(inputs, weight), ternary_int8_linear(inputs[:, order], weight[:, order].contiguous())
    )


@each_size
def test_value_and_gradients_are_those_of_simulated_quantization(size: int | str, generator: torch.Generator) -> None:
    _, _, weight = ternary(size, generator)
    inputs, bias = torch.randn(2, 5, 300, generator=generator), torch.randn(24, generator=generator)
    ours, theirs = ([t.clone().requires_grad_() for t in (inputs, weight, bias)] for _ in range(2))
    grad = torch.randn(2, 5, 24, generator=generator)
    found = ternary_int8_linear(*ours)
    expected = F.linear(fake_quantize_activations(theirs[0]), theirs[1], theirs[2])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found.backward(grad)
    expected.backward(grad)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)


def test_autocast_rounds_once_and_trains_what_it_multiplied(generator: torch.Generator) -> None:
    _, _, weight = ternary("tensor", generator)
    inputs, weight = torch.randn(3, 300, generator=generator), weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ternary_int8_linear(inputs, weight)
    assert torch.equal(found, ternary_int8_linear(inputs, weight).to(torch.bfloat16))
    found.float().sum().backward()
    assert weight.grad.dtype == torch.float32


def test_only_one_scale_per_row_of_ternary_weights_is_exact() -> None:
    assert is_exact_product(SPECS["tensor"], 132_104)
    assert not is_exact_product(SPECS["tensor"], 132_105)
    assert is_exact_product(QuantSpec.create("ternary", 2, group_size=64), 64)
    assert not is_exact_product(QuantSpec.create("ternary", 2, group_size=64), 128)
    assert not is_exact_product(QuantSpec.create("int_sym", 2, group_size=-1), 64)
