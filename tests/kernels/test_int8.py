"""int8 activations times ternary weights is exact: equal to integers in int32, in any order, in training and packed."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from bitdistiller_peft.kernels import (
    int8,
    is_exact_product,
    ternary_int8_linear,
    ternary_int8_reference,
    use_backend,
)
from bitdistiller_peft.kernels.cpu.library import load
from bitdistiller_peft.layers import PackedLinear
from bitdistiller_peft.quantizers import QuantSpec, dequantize, fake_quantize_activations, find_params, quantize
from bitdistiller_peft.quantizers.activation import quantize_activations

SPECS = {size: QuantSpec.create("ternary", 2, group_size=size, gradient="ste") for size in ("tensor", -1)}
BACKENDS = ["reference", *(["cpu"] if load() else [])]
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
@pytest.mark.parametrize("packing", ["bitstream", "base3"])
@pytest.mark.parametrize("width", [1, 43, 640])
def test_a_packed_layer_multiplies_as_64_bit_integers_do(
    size: int | str, packing: str, width: int, generator: torch.Generator
) -> None:
    codes, params, _ = ternary(size, generator, width=width)
    layer = PackedLinear.from_codes(codes, params, SPECS[size].packed_as(packing))
    layer.activation_bits = 8
    inputs = torch.randn(7, width, generator=generator) * 10.0 ** torch.randint(-6, 4, (7, 1), generator=generator)
    inputs[0] = 0
    largest = inputs.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    integers = (inputs * (127 / largest)).round().to(torch.int64)
    total = integers @ (codes.to(torch.int64) - 1).T
    assert torch.equal(layer(inputs), total.float() * params.scale.float().T * (largest / 127))


@each_size
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_packed_layer_has_the_gradients_of_the_dense_weight(
    size: int | str, backend: str, generator: torch.Generator
) -> None:
    codes, params, weight = ternary(size, generator)
    layer = PackedLinear.from_codes(codes, params, SPECS[size], torch.randn(24, generator=generator))
    layer.activation_bits = 8
    layer.bias.requires_grad_()
    inputs, upstream = torch.randn(5, 300, generator=generator), torch.randn(5, 24, generator=generator)
    found = []
    for product in (layer, lambda x: ternary_int8_linear(x, weight, layer.bias)):
        given, layer.bias.grad = inputs.clone().requires_grad_(), None
        with use_backend(backend):
            output = product(given)
            output.backward(upstream)
            with torch.no_grad():
                assert torch.equal(product(inputs), output)
        found.append((output, given.grad, layer.bias.grad))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the CPU kernels cannot be compiled on this machine")
def test_a_compiled_packed_layer_sums_the_same_integers(generator: torch.Generator) -> None:
    torch.compiler.reset()
    codes, params, _ = ternary("tensor", generator)
    layer = PackedLinear.from_codes(codes, params, SPECS["tensor"])
    layer.activation_bits = 8
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    inputs = torch.randn(3, 300, generator=generator)
    with torch.no_grad(), use_backend("cpu"):
        assert torch.equal(compiled(inputs), layer(inputs))


@pytest.mark.parametrize("shape", [(0, 300), (2, 0, 300), (300,)], ids=str)
def test_no_token_and_a_single_one_are_multiplied_too(shape: tuple[int, ...], generator: torch.Generator) -> None:
    weight = ternary("tensor", generator)[2].requires_grad_()
    inputs = torch.ones(shape, requires_grad=True)
    output = ternary_int8_linear(inputs, weight)
    assert output.shape == (*shape[:-1], 24)
    output.sum().backward()
    assert inputs.grad.shape == inputs.shape
    assert bool(weight.grad.any()) == bool(inputs.numel())


def test_the_largest_sums_that_can_occur_are_exact() -> None:
    width = 132_104
    weight = torch.ones(2, width)
    weight[1, 1:] = -1
    inputs = torch.ones(1, width)
    assert ternary_int8_linear(inputs, weight).tolist() == [[width, 2 - width]]


@each_size
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_integer_and_fp32_accumulation_agree_in_value_and_gradient(
    size: int | str, dtype: torch.dtype, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, weight = ternary(size, generator)
    inputs = torch.randn(2, 5, 300, generator=generator).to(dtype)
    found = []
    for is_integer in (True, False):
        monkeypatch.setattr(int8, "_has_integer_product", lambda device, answer=is_integer: answer)
        ours = [inputs.clone().requires_grad_(), weight.clone().requires_grad_()]
        output = ternary_int8_linear(*ours)
        output.float().square().sum().backward()
        found.append([output.detach(), *(tensor.grad for tensor in ours)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


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
