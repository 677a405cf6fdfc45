"""CAKLD is the stated mixture of both directions, gamma means what the paper says, and no other gamma gets in."""

from __future__ import annotations

import math

import pytest
import torch

from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.losses import IGNORE_INDEX, cakld, confidence, forward_kl, reverse_kl, teacher_confidence


@pytest.fixture
def logits(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 4, 9, generator=generator) * 3, torch.randn(2, 4, 9, generator=generator) * 3


def test_gamma_0_is_forward_kl_and_gamma_1_is_reverse_kl(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert torch.equal(cakld(*logits, 0.0), forward_kl(*logits))
    assert torch.equal(cakld(*logits, 1.0), reverse_kl(*logits))
    assert not torch.allclose(forward_kl(*logits), reverse_kl(*logits))


def test_gamma_in_between_mixes_linearly(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    torch.testing.assert_close(cakld(*logits, 0.25), 0.25 * reverse_kl(*logits) + 0.75 * forward_kl(*logits))


def test_every_position_may_have_its_own_gamma(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    gamma = torch.linspace(0, 1, 8).view(2, 4)
    mixed = cakld(*logits, gamma)
    assert mixed.shape == (2, 4)
    for index in ((0, 0), (0, 3), (1, 2)):
        torch.testing.assert_close(mixed[index], cakld(logits[0][index], logits[1][index], gamma[index].item()))
    torch.testing.assert_close(cakld(*logits, torch.tensor(0.25)), cakld(*logits, 0.25))


def test_confidence_is_the_probability_of_the_token_that_follows_and_not_of_the_likeliest() -> None:
    teacher_logits = torch.tensor([[1 / 4, 3 / 4], [1 / 8, 7 / 8], [1.0, 0.0]]).log()
    got = confidence(teacher_logits, torch.tensor([0, 1, IGNORE_INDEX]))
    torch.testing.assert_close(got, torch.tensor([1 / 4, 7 / 8, 0.0]))


def test_confidence_is_a_valid_gamma_whatever_the_logits(generator: torch.Generator) -> None:
    teacher_logits = (torch.randn(64, 50, generator=generator) * 60).bfloat16()
    gamma = confidence(teacher_logits, teacher_logits.argmax(-1))
    assert gamma.dtype == torch.float32
    assert gamma.max() <= 1
    assert cakld(teacher_logits, teacher_logits, gamma).abs().max() < 1e-6


@pytest.mark.parametrize("gamma", [1.2, -0.01, math.nan, math.inf, "half", True, None])
def test_a_gamma_outside_the_unit_interval_is_refused(gamma: float, logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    with pytest.raises(ConfigError, match=r"`gamma` must lie in \[0, 1\]: got gamma=.*Use 0 for forward KL, 1 for"):
        cakld(*logits, gamma)


@pytest.mark.parametrize("value", [1.2, -0.01, math.nan])
def test_one_bad_gamma_among_many_is_refused_with_its_value(
    value: float, logits: tuple[torch.Tensor, torch.Tensor]
) -> None:
    gamma = torch.full((2, 4), 0.5)
    gamma[1, 2] = value
    with pytest.raises(ConfigError, match=rf"`gamma` must lie in \[0, 1\]: got gamma={str(value)[:4]}"):
        cakld(*logits, gamma)


def test_a_gamma_of_another_shape_is_refused_and_not_broadcast(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    with pytest.raises(ConfigError, match=r"one number per position: got gamma=\[4\], positions=\[2, 4\]"):
        cakld(*logits, torch.full((4,), 0.5))


@pytest.mark.parametrize("tile_tokens", [None, 1, 4])
def test_gamma_is_estimated_from_hidden_states_over_the_targets_alone(
    tile_tokens: int | None, generator: torch.Generator
) -> None:
    hidden = torch.randn(11, 6, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(13, 6, generator=generator)
    labels = torch.randint(13, (11,), generator=generator)
    labels[::3] = IGNORE_INDEX
    sums = teacher_confidence(hidden, weight, labels, tile_tokens=tile_tokens)
    probs = (hidden.detach().double() @ weight.double().T).softmax(-1)[labels != IGNORE_INDEX]
    of_labels = probs.gather(-1, labels[labels != IGNORE_INDEX, None])
    assert sums.num_targets == 7
    assert sums.confidence.item() == pytest.approx(of_labels.sum().item(), rel=1e-6)
    assert sums.max_probability.item() == pytest.approx(probs.amax(-1).sum().item(), rel=1e-6)
    assert not sums.confidence.requires_grad


def test_gamma_of_a_text_without_targets_is_a_sum_and_a_count_of_zero() -> None:
    sums = teacher_confidence(torch.randn(3, 2), torch.randn(5, 2), torch.full((3,), IGNORE_INDEX))
    assert (sums.confidence.item(), sums.max_probability.item(), sums.num_targets) == (0.0, 0.0, 0)
