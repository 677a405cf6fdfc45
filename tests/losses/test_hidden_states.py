"""The hidden-state part, against its formula in fp64."""

from __future__ import annotations

import pytest
import torch

from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.losses import hidden_state_loss


def by_hand(student: torch.Tensor, teacher: torch.Tensor, labels: list[int]) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for ours, theirs, label in zip(student.double(), teacher.double(), labels, strict=True):
        if label != -100:
            ours, theirs = (x / (x.square().mean() + 1e-6).sqrt() for x in (ours, theirs))
            total = total + (ours - theirs).square().mean()
    return total


def test_it_is_the_formula_and_so_is_its_gradient(generator: torch.Generator) -> None:
    student, teacher = (torch.randn(5, 16, generator=generator) for _ in range(2))
    labels = [3, -100, 7, 0, -100]
    leaf, exact = student.clone().requires_grad_(), student.double().requires_grad_()
    loss, expected = hidden_state_loss(leaf, teacher, torch.tensor(labels)), by_hand(exact, teacher, labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-4, atol=1e-7)


def test_size_does_not_matter_and_unrelated_states_are_two_apart(generator: torch.Generator) -> None:
    states, other = (torch.randn(64, 512, generator=generator) for _ in range(2))
    labels = torch.zeros(64, dtype=torch.long)
    assert hidden_state_loss(states * 1000, states, labels).item() == pytest.approx(0, abs=1e-4)
    assert hidden_state_loss(states, other * 7, labels).item() / 64 == pytest.approx(2, rel=0.05)


def test_rows_without_a_label_are_never_read() -> None:
    student, teacher = torch.ones(2, 4, requires_grad=True), torch.ones(2, 4)
    broken = torch.stack([teacher[0], torch.full((4,), torch.nan)])
    loss = hidden_state_loss(student, broken, torch.tensor([1, -100]))
    loss.backward()
    assert loss.item() == 0
    assert bool(torch.isfinite(student.grad).all())


def test_another_width_is_refused() -> None:
    with pytest.raises(ConfigError, match="another width: got 8 for the teacher and 4"):
        hidden_state_loss(torch.ones(1, 4), torch.ones(1, 8), torch.tensor([1]))
