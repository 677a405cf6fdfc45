"""Activations become int8 by the published formula, token by token, and gradients pass straight through."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.quantizers import check_activation_bits, fake_quantize_activations, quantize_activations


def by_hand(row: list[float]) -> list[int]:
    """127 x / max|x|, half to even, in fp64."""
    largest = max(1e-5, *(abs(x) for x in row))
    return [round(x * 127 / largest) for x in row]


@given(st.lists(st.integers(-1000, 1000), min_size=2, max_size=9))
def test_codes_equal_the_formula_by_hand(values: list[int]) -> None:
    row = [v / 16 for v in values]
    codes, step = quantize_activations(torch.tensor([row]))
    close = [abs(x * 127 / max(1e-5, *(abs(y) for y in row)) % 1 - 0.5) < 1e-4 for x in row]
    for found, expected, is_tie in zip(codes[0].tolist(), by_hand(row), close, strict=True):
        assert found == expected or (is_tie and abs(found - expected) == 1)
    assert step.shape == (1, 1)
    assert codes.abs().max() <= 127


def test_every_token_has_its_own_scale_and_the_largest_value_comes_back() -> None:
    inputs = torch.tensor([[[1.0, -0.5], [100.0, 25.0]]])
    values = fake_quantize_activations(inputs)
    torch.testing.assert_close(values[..., 0], inputs[..., 0])
    assert float((values - inputs).abs().max()) <= 100 / 127 / 2


def test_zeros_stay_zeros_and_nan_stays_nan() -> None:
    assert not fake_quantize_activations(torch.zeros(2, 3)).any()
    assert fake_quantize_activations(torch.tensor([[float("nan"), 1.0]])).isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_pass_as_if_nothing_had_been_done(dtype: torch.dtype, generator: torch.Generator) -> None:
    inputs = torch.randn(3, 8, generator=generator).to(dtype).requires_grad_()
    values = fake_quantize_activations(inputs)
    assert values.dtype == dtype
    grad = torch.randn(3, 8, generator=generator).to(dtype)
    values.backward(grad)
    assert torch.equal(inputs.grad, grad)


@pytest.mark.parametrize("bits", [4, 16, True, "8", 8.5])
def test_other_widths_are_refused(bits: object) -> None:
    with pytest.raises(ConfigError, match="`activation_bits` must be None or 8"):
        check_activation_bits(bits)
