"""The divergences are what their definitions say, in every direction and at every size of gap, values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional as F

from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.losses import forward_kl, get_divergence, jensen_shannon, reverse_kl
from tests.reference import divergences as reference

NAMES = ("forward_kl", "reverse_kl", "jsd")
each_divergence = pytest.mark.parametrize("name", NAMES)

finite_logits = st.floats(-200, 200, width=32)
pairs = st.integers(1, 8).flatmap(
    lambda n: st.tuples(*(st.lists(finite_logits, min_size=n, max_size=n) for _ in range(2)))
)


def with_gradient(name: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    student = student.clone().requires_grad_()
    value = get_divergence(name)(student, teacher)
    value.sum().backward()
    assert student.grad is not None
    return value.detach(), student.grad


def test_directions_agree_with_torch_distributions(generator: torch.Generator) -> None:
    student, teacher = (torch.randn(2, 3, 7, generator=generator) * 3 for _ in range(2))
    s, t = Categorical(logits=student), Categorical(logits=teacher)
    torch.testing.assert_close(forward_kl(student, teacher), kl_divergence(t, s))
    torch.testing.assert_close(reverse_kl(student, teacher), kl_divergence(s, t))


def test_forward_and_reverse_have_the_values_that_can_be_worked_out_by_hand() -> None:
    student, teacher = torch.tensor([1 / 2, 1 / 2]).log(), torch.tensor([1 / 4, 3 / 4]).log()
    # teacher against student: 1/4 log(1/2) + 3/4 log(3/2); student against teacher: 1/2 log 2 + 1/2 log(2/3)
    assert forward_kl(student, teacher).item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), abs=1e-7)
    assert reverse_kl(student, teacher).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-7)


@each_divergence
@given(pair=pairs)
def test_values_are_those_of_the_scalar_reference(name: str, pair: tuple[list[float], list[float]]) -> None:
    expected = getattr(reference, "jensen_shannon" if name == "jsd" else name)(*pair)
    got = get_divergence(name)(*(torch.tensor(side, dtype=torch.float64) for side in pair)).item()
    assert got == pytest.approx(expected, rel=1e-11, abs=1e-11)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_jensen_shannon_weighs_the_teacher_with_beta(beta: float, generator: torch.Generator) -> None:
    student, teacher = (torch.randn(5, 6, generator=generator, dtype=torch.float64) * 4 for _ in range(2))
    expected = [reference.jensen_shannon(*pair, beta) for pair in zip(student.tolist(), teacher.tolist(), strict=True)]
    torch.testing.assert_close(jensen_shannon(student, teacher, beta), torch.tensor(expected, dtype=torch.float64))


def test_jensen_shannon_has_the_directions_of_kl_at_its_ends_and_is_symmetric_in_the_middle(
    generator: torch.Generator,
) -> None:
    student, teacher = (torch.randn(5, 6, generator=generator) * 4 for _ in range(2))
    assert torch.equal(jensen_shannon(student, teacher, 0.0), forward_kl(student, teacher))
    assert torch.equal(jensen_shannon(student, teacher, 1.0), reverse_kl(student, teacher))
    torch.testing.assert_close(jensen_shannon(student, teacher), jensen_shannon(teacher, student))


def test_jensen_shannon_of_models_that_share_no_token_is_log_2() -> None:
    student, teacher = torch.tensor([200.0, 0.0]), torch.tensor([0.0, 200.0])
    assert jensen_shannon(student, teacher).item() == pytest.approx(math.log(2), abs=1e-6)


@each_divergence
def test_gradients_pass_gradcheck_in_both_arguments(name: str, generator: torch.Generator) -> None:
    sides = [torch.randn(3, 5, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]
    assert torch.autograd.gradcheck(get_divergence(name), sides)


@each_divergence
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_identical_models_are_at_distance_zero_with_no_gradient(
    name: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    logits = (torch.randn(4, 1000, generator=generator) * 10).to(dtype)
    value, grad = with_gradient(name, logits, logits)
    assert value.abs().max() < 1e-6
    assert grad.abs().max() < 1e-7


def test_a_gradient_passes_through_logits_that_are_equal_on_both_sides() -> None:
    _, grad = with_gradient("forward_kl", torch.tensor([1.0, 0.0]), torch.tensor([1.0, 2.0]))
    gap = torch.tensor([1.0, 0.0]).softmax(-1) - torch.tensor([1.0, 2.0]).softmax(-1)
    torch.testing.assert_close(grad, gap)


@each_divergence
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("gap", [110.0, 150.0, 1e4])
def test_a_wide_gap_is_finite_and_right(name: str, dtype: torch.dtype, gap: float) -> None:
    student = torch.tensor([[gap, 0.0, -gap], [-gap, 0.0, gap]]).to(dtype)
    teacher = torch.tensor([[0.0, gap, -gap], [0.5, 0.0, -0.5]]).to(dtype)
    value, grad = with_gradient(name, student, teacher)
    assert grad.isfinite().all()
    exact = getattr(reference, "jensen_shannon" if name == "jsd" else name)
    expected = [exact(s, t) for s, t in zip(student.tolist(), teacher.tolist(), strict=True)]
    torch.testing.assert_close(value, torch.tensor(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gap", [110.0, 150.0])
def test_the_published_formula_fails_where_ours_does_not(gap: float) -> None:
    student = torch.tensor([[gap, 0.0]], requires_grad=True)
    teacher = torch.zeros(1, 2)
    F.kl_div(teacher.log_softmax(-1), student.softmax(-1), reduction="none").sum().backward()
    assert student.grad is not None
    assert not student.grad.isfinite().all(), "torch has changed: the warning in divergences.py is out of date"
    assert with_gradient("reverse_kl", student.detach(), teacher)[1].isfinite().all()


@each_divergence
def test_a_padded_vocabulary_counts_nothing(name: str, generator: torch.Generator) -> None:
    student, teacher = (torch.randn(3, 5, generator=generator) for _ in range(2))
    padded = [F.pad(side, (0, 3), value=-math.inf) for side in (student, teacher)]
    value, grad = with_gradient(name, *padded)
    expected, expected_grad = with_gradient(name, student, teacher)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad, F.pad(expected_grad, (0, 3)))


def test_a_token_that_only_one_side_allows_is_infinitely_far_only_from_the_side_that_says_it() -> None:
    closed, open_ = torch.tensor([0.0, -math.inf]), torch.tensor([0.0, 0.0])
    assert forward_kl(closed, open_).item() == math.inf  # the teacher says it, the student cannot
    assert reverse_kl(closed, open_).item() == pytest.approx(math.log(2))
    assert reverse_kl(open_, closed).item() == math.inf
    assert forward_kl(open_, closed).item() == pytest.approx(math.log(2))
    expected = reference.jensen_shannon(closed.tolist(), open_.tolist())
    value, grad = with_gradient("jsd", closed, open_)
    assert value.item() == pytest.approx(expected)
    assert grad.isfinite().all()


def test_a_nan_is_not_hidden() -> None:
    broken = torch.tensor([0.0, math.nan])
    for name in NAMES:
        assert get_divergence(name)(broken, torch.zeros(2)).isnan()
        assert get_divergence(name)(torch.zeros(2), broken).isnan()


@each_divergence
def test_a_student_close_to_its_teacher_keeps_correct_digits(name: str, generator: torch.Generator) -> None:
    teacher = torch.randn(64, 4096, generator=generator) * 4
    student = teacher + 1e-3 * torch.randn(64, 4096, generator=generator)
    value, grad = with_gradient(name, student, teacher)
    exact, exact_grad = with_gradient(name, student.double(), teacher.double())
    # The KL is about 4e-7 here: the textbook sum of p * (log p - log q) in fp32 is off by up to seven times its value.
    assert ((value - exact).abs() / exact).max() < 1e-3
    assert (grad - exact_grad).norm() / exact_grad.norm() < 1e-3


@each_divergence
def test_results_are_fp32_at_least(name: str) -> None:
    half, single, double = (torch.zeros(2, 3, dtype=dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64))
    divergence = get_divergence(name)
    assert divergence(half, half).dtype == torch.float32
    assert divergence(half, single).dtype == torch.float32
    assert divergence(half, double).dtype == torch.float64
    assert divergence(half, half).shape == (2,)


@pytest.mark.parametrize("beta", [-0.1, 1.1, math.nan, "half", True])
def test_a_share_outside_the_unit_interval_is_refused(beta: float) -> None:
    with pytest.raises(ConfigError, match=r"`beta` must lie in \[0, 1\]: got beta="):
        jensen_shannon(torch.zeros(2), torch.zeros(2), beta)


@each_divergence
def test_vocabularies_of_different_size_are_refused_and_not_broadcast(name: str) -> None:
    with pytest.raises(ConfigError, match=r"`teacher_logits` must have the shape of `student_logits`: got teacher"):
        get_divergence(name)(torch.zeros(4, 3), torch.zeros(4, 1))
