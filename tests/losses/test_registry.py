"""An outsider's divergence is a loss like any other, and takes nobody's name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitdistiller_peft.errors import ConfigError, UnknownNameError
from bitdistiller_peft.losses import (
    Objective,
    distillation_loss,
    divergence_names,
    get_divergence,
    register_divergence,
    registry,
)


def total_variation_squared(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    return (student_logits.softmax(-1) - teacher_logits.softmax(-1)).square().sum(-1)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(registry, "_DIVERGENCES", dict(registry._DIVERGENCES))
    register_divergence("tv2", total_variation_squared)
    return "tv2"


def test_a_registered_divergence_is_found(registered: str) -> None:
    assert get_divergence(registered) is total_variation_squared
    assert divergence_names() == ["forward_kl", "jsd", "reverse_kl", "tv2"]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tile_tokens", [None, 2])
def test_a_registered_divergence_trains_through_the_fused_loss(
    registered: str, temperature: float, tile_tokens: int | None, generator: torch.Generator
) -> None:
    hidden, teacher = (torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    hidden.requires_grad_()
    goal = Objective("mixture", temperature=temperature, weights={registered: 2.0, "forward_kl": 0.0})
    labels = torch.zeros(5, dtype=torch.long)
    out = distillation_loss(hidden, weight, teacher, weight, labels, objective=goal, tile_tokens=tile_tokens)
    plain = total_variation_squared(hidden @ weight.T / temperature, teacher @ weight.T / temperature).sum()
    torch.testing.assert_close(out.others[registered], plain)
    torch.testing.assert_close(out.loss_sum, 2 * temperature**2 * plain)
    (got,), (expected,) = (torch.autograd.grad(x, hidden) for x in (out.loss_sum, 2 * temperature**2 * plain))
    torch.testing.assert_close(got, expected)


def test_a_divergence_that_sums_too_far_is_refused(registered: str) -> None:
    register_divergence("scalar", lambda student, teacher: total_variation_squared(student, teacher).sum())
    hidden = torch.zeros(2, 3)
    with pytest.raises(ConfigError, match=r"one number per token: got \[\] from 'scalar' for 2 tokens"):
        distillation_loss(
            hidden, hidden, hidden, hidden, torch.zeros(2, dtype=torch.long), objective=Objective("scalar")
        )


@pytest.mark.parametrize("name", ["tv2", "forward_kl", "jsd", "cakld", "ce", "mixture", "confidence", "loss"])
def test_no_name_is_given_twice(name: str, registered: str) -> None:
    with pytest.raises(ConfigError, match=rf"`name` must be new: got name='{name}'\. Names in use: \[.*'jsd'"):
        register_divergence(name, total_variation_squared)


def test_an_unknown_divergence_is_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"`divergence` must be one of .*Did you mean 'reverse_kl'"):
        get_divergence("revers_kl")
