"""GPTQ of one matrix held against its slow derivation; activations to do it on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bitdistiller_peft.calibration import GptqOptions
from bitdistiller_peft.calibration.clip import FACTORS
from bitdistiller_peft.calibration.gptq import Compensated, compensate
from bitdistiller_peft.quantizers import QuantParams, QuantSpec, get_quantizer, quantize, to_groups
from tests.reference import clip_search
from tests.reference.gptq import gptq


def correlated(generator: torch.Generator, width: int, tokens: int) -> Tensor:
    """Activations as models make them: correlated, and of very different size."""
    mix = torch.randn(width // 3, width, generator=generator) * torch.rand(width, generator=generator).square()
    noise = 0.05 * torch.randn(tokens, width, generator=generator)
    return torch.randn(tokens, width // 3, generator=generator) @ mix + noise


def gram_of(inputs: Tensor) -> Tensor:
    """The mean Gram matrix of all inputs."""
    return (inputs.double().T @ inputs.double() / len(inputs)).float()


def place_by(spec: QuantSpec, inputs: Tensor, *, clip_search_too: bool) -> Callable[[Tensor, slice], QuantParams]:
    """How a group gets its parameters: by an exhaustive clip search, or from its own range."""

    def place(part: Tensor, span: slice) -> QuantParams:
        quantizer = get_quantizer(spec.grid)
        if not clip_search_too:
            return quantizer.find_params(to_groups(part, spec.group_size), spec)
        low, high, _ = clip_search.search(part, inputs[:, span], spec, FACTORS, clamp_weight=False)
        return quantizer.params_from_range(low, high, spec)

    return place


def check_codes(weight: Tensor, inputs: Tensor, spec: QuantSpec, options: GptqOptions) -> Compensated:
    """The codes are those of the derivation, except for ties and what follows from them; returns what was found."""
    order = torch.argsort(gram_of(inputs).diagonal(), descending=True).tolist() if options.act_order else None
    place = place_by(spec, inputs, clip_search_too=options.clip_search)
    expected = gptq(weight, inputs, spec, place, damping=options.damping, order=order)
    found = compensate(weight, gram_of(inputs), spec, options)
    codes = quantize(found.weight, found.params, spec).long()
    is_plain = (found.error_after == found.error_before).unsqueeze(-1)  # rows for which rounding was better
    assert is_plain.float().mean() < 0.3
    # where a sign is missing, several codes stand for zero
    is_other = (found.values.double() - expected.values).abs() > 1e-30
    differs = (codes != expected.codes) & is_other & ~is_plain
    sequence = range(weight.shape[1]) if order is None else order
    for row in differs.any(-1).nonzero().flatten().tolist():
        first = next(column for column in sequence if differs[row, column])
        assert expected.margin[row, first] < 1e-3, f"row {row}, input {first}: no tie"
    assert differs.any(-1).float().mean() < 0.2
    return found
