"""The fused loss is the naive one: same values, same gradients, for every objective, head and way to cut the tokens."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional as F

from bitdistiller_peft.errors import ConfigError, DataError
from bitdistiller_peft.losses import IGNORE_INDEX, DistillationOutput, Head, Objective, distillation_loss, tile
from tests.reference import divergences as reference

TOKENS, VOCAB, WIDTH, TEACHER_WIDTH = 13, 17, 6, 5

OBJECTIVES = {
    "cakld-0": Objective("cakld", gamma=0.0),
    "cakld-.37": Objective("cakld", gamma=0.37),
    "cakld-1": Objective("cakld", gamma=1.0),
    "cakld-per-token": Objective("cakld", gamma="per_token"),
    "forward": Objective("forward_kl"),
    "reverse": Objective("reverse_kl", ce_weight=0.3),
    "jsd": Objective("jsd"),
    "jsd-.9": Objective("jsd", jsd_beta=0.9, ce_weight=0.3),
    "jsd-ends": Objective("mixture", jsd_beta=1.0, weights={"jsd": 1.0, "forward_kl": 0.5}),
    "ce": Objective("ce"),
    "cakld-ce": Objective("cakld", gamma="per_token", ce_weight=0.3),
    "mixture": Objective("mixture", gamma=0.37, weights={"cakld": 2.0, "jsd": 0.5, "reverse_kl": 0.25, "ce": 0.1}),
    "measured-only": Objective("mixture", weights={"ce": 1.0, "jsd": 0.0}),
}
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"logit_scale": 0.25},
    "capped": {"logit_softcap": 2.0},
    "scaled-and-capped": {"logit_scale": 0.5, "logit_softcap": 3.0},
}
each_objective = pytest.mark.parametrize("goal", OBJECTIVES.values(), ids=OBJECTIVES.keys())
each_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())


@dataclass
class Case:
    """A student and a teacher of different widths, some tokens without a target, in fp64 as drawn."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor

    def run(
        self,
        goal: Objective,
        *,
        dtype: torch.dtype = torch.float32,
        head: dict[str, Any] | None = None,
        **options: Any,
    ) -> tuple[DistillationOutput, list[Tensor | None]]:
        """The fused loss, and its gradients with respect to hidden states, weight and bias."""
        leaves = [None if x is None else x.to(dtype).requires_grad_() for x in (self.hidden, self.weight, self.bias)]
        assert leaves[0] is not None
        assert leaves[1] is not None
        out = distillation_loss(
            leaves[0],
            Head(leaves[1], leaves[2], **(head or {})),
            self.teacher_hidden.to(dtype),
            Head(self.teacher_weight.to(dtype), **(head or {})),
            self.labels,
            objective=goal,
            **options,
        )
        out.loss_sum.backward()
        return out, [None if x is None else x.grad for x in leaves]


def make_case(seed: int = 0, *, tokens: int = TOKENS, has_bias: bool = False) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels = torch.randint(VOCAB, (tokens,), generator=generator)
    labels[2::4] = IGNORE_INDEX
    bias = draw(VOCAB) if has_bias else None
    return Case(
        draw(tokens, WIDTH), draw(VOCAB, WIDTH), bias, draw(tokens, TEACHER_WIDTH), draw(VOCAB, TEACHER_WIDTH), labels
    )


def naive(case: Case, goal: Objective, head: dict[str, Any]) -> tuple[Tensor, list[Tensor | None]]:
    """The objective as one writes it on a blackboard: full logits, fp64, torch.distributions, autograd."""
    leaves = [None if x is None else x.clone().requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    hidden, weight, bias = leaves

    def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        z: Tensor = F.linear(hidden, weight, bias)[case.labels != IGNORE_INDEX] * head.get("logit_scale", 1.0)
        cap = head.get("logit_softcap")
        return z if cap is None else (z / cap).tanh() * cap

    z_s, z_t = logits(hidden, weight, bias), logits(case.teacher_hidden, case.teacher_weight, None)  # type: ignore[arg-type]
    s, t = Categorical(logits=z_s / goal.temperature), Categorical(logits=z_t / goal.temperature)
    labels = case.labels[case.labels != IGNORE_INDEX]
    m = Categorical(probs=(1 - goal.jsd_beta) * s.probs + goal.jsd_beta * t.probs)
    jsd = goal.jsd_beta * kl_divergence(t, m) + (1 - goal.jsd_beta) * kl_divergence(s, m)
    if goal.jsd_beta == 1:
        jsd = kl_divergence(s, t)
    gamma = z_t.softmax(-1).gather(-1, labels[:, None])[:, 0] if goal.gamma == "per_token" else float(goal.gamma or 0)
    parts = {
        "forward_kl": kl_divergence(t, s),
        "reverse_kl": kl_divergence(s, t),
        "jsd": jsd,
        "cakld": gamma * kl_divergence(s, t) + (1 - gamma) * kl_divergence(t, s),
    }
    factor = goal.temperature**2 if goal.rescale_temperature else 1.0
    loss = goal.terms.get("ce", 0.0) * F.cross_entropy(z_s, labels, reduction="sum")
    loss = loss + sum(factor * w * parts[part].sum() for part, w in goal.terms.items() if part != "ce")
    loss.backward()
    return loss.detach(), [None if x is None else x.grad for x in leaves]


def assert_same(got: Tensor | None, expected: Tensor | None, tolerance: float = 1e-5) -> None:
    """The distance between the two is at most `tolerance` times the size of the expected one."""
    if got is None or expected is None:
        assert got is expected
        return
    distance, size = (got.double() - expected).norm().item(), expected.norm().item()
    assert distance <= tolerance * size, f"off by {distance:.3g}, size {size:.3g}"


@each_objective
@each_head
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tile_tokens", [4, None])
def test_the_fused_loss_and_its_gradients_are_the_naive_ones(
    goal: Objective, head: dict[str, Any], temperature: float, tile_tokens: int | None
) -> None:
    case, goal = make_case(), dataclasses.replace(goal, temperature=temperature)
    out, grads = case.run(goal, head=head, tile_tokens=tile_tokens)
    loss, expected = naive(case, goal, head)
    assert_same(out.loss_sum.detach(), loss)
    for got, want in zip(grads, expected, strict=True):
        assert_same(got, want)


@pytest.mark.parametrize("rescale", [True, False])
def test_the_temperature_is_squared_only_if_asked(rescale: bool) -> None:
    case, goal = (
        make_case(),
        Objective("cakld", gamma=0.37, temperature=3.0, rescale_temperature=rescale, ce_weight=1.0),
    )
    out, grads = case.run(goal)
    loss, expected = naive(case, goal, {})
    assert_same(out.loss_sum.detach(), loss)
    assert_same(grads[0], expected[0])


@each_head
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_every_statistic_is_that_of_the_scalar_reference(head: dict[str, Any], temperature: float) -> None:
    goal = Objective(
        "mixture", gamma="per_token", temperature=temperature, weights={"cakld": 1.0, "jsd": 0.5, "ce": 0.1}
    )
    case = make_case(has_bias=True)
    out, _ = case.run(goal, head=head, tile_tokens=4)
    scale, cap = head.get("logit_scale", 1.0), head.get("logit_softcap")
    totals: dict[str, float] = {}
    assert case.bias is not None
    for index, label in enumerate(case.labels.tolist()):
        if label == IGNORE_INDEX:
            continue
        student = reference.project(case.hidden[index].tolist(), case.weight.tolist(), case.bias.tolist(), scale, cap)
        teacher = reference.project(case.teacher_hidden[index].tolist(), case.teacher_weight.tolist(), None, scale, cap)
        measured = reference.statistics(student, teacher, label, temperature, 0.5)
        measured["loss"] = reference.token_loss(measured, goal.terms, goal.gamma, temperature**2)
        totals = {name: totals.get(name, 0.0) + value for name, value in measured.items()}
    sums = {name: value.item() for name, value in out.sums().items()}
    assert sums == pytest.approx(totals, rel=1e-5)
    assert sums["jsd"] == out.jsd.item()  # type: ignore[union-attr]
    assert out.num_targets == (case.labels != IGNORE_INDEX).sum()


def test_the_gradient_is_the_slope_of_the_scalar_reference() -> None:
    case, goal, step = make_case(tokens=2), Objective("cakld", gamma=0.37, ce_weight=0.1), 1e-6
    _, grads = case.run(goal, dtype=torch.float64)
    teacher = reference.project(case.teacher_hidden[0].tolist(), case.teacher_weight.tolist(), None, 1.0, None)

    def loss(hidden: Tensor) -> float:
        student = reference.project(hidden.tolist(), case.weight.tolist(), None, 1.0, None)
        measured = reference.statistics(student, teacher, int(case.labels[0]), 1.0, 0.5)
        return reference.token_loss(measured, goal.terms, goal.gamma, 1.0)

    nudges = step * torch.eye(WIDTH, dtype=torch.float64)
    slopes = [(loss(case.hidden[0] + n) - loss(case.hidden[0] - n)) / (2 * step) for n in nudges]
    assert grads[0] is not None
    torch.testing.assert_close(grads[0][0], torch.tensor(slopes, dtype=torch.float64), rtol=1e-6, atol=1e-8)


@given(
    tile_tokens=st.integers(1, 20),
    strip=st.integers(1, 9),
    tokens=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_how_the_tokens_are_cut_changes_nothing(tile_tokens: int, strip: int, tokens: int, seed: int) -> None:
    case, goal = make_case(seed, tokens=tokens, has_bias=True), Objective("cakld", gamma=0.37, ce_weight=0.1)
    head: dict[str, Any] = {"logit_softcap": 3.0}
    whole, expected = case.run(goal, dtype=torch.float64, head=head)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile, "_CPU_STRIP_ELEMENTS", strip * VOCAB)
        cut, grads = case.run(goal, dtype=torch.float64, head=head, tile_tokens=tile_tokens)
    assert cut.num_targets == whole.num_targets
    torch.testing.assert_close(cut.sums(), whole.sums())
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want)


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    case, goal = make_case(), Objective("cakld", gamma=0.37, ce_weight=0.1)
    whole, grads = case.run(goal)
    hidden, weight = case.hidden.float().requires_grad_(), case.weight.float().requires_grad_()
    total, count = 0.0, 0
    for part in (slice(0, 1), slice(1, 9), slice(9, TOKENS)):  # as gradient accumulation would cut it
        teacher = case.teacher_hidden[part].float()
        labels = case.labels[part]
        out = distillation_loss(
            hidden[part], weight, teacher, case.teacher_weight.float(), labels, objective=goal, tile_tokens=3
        )
        (out.loss_sum / whole.num_targets).backward()
        total, count = total + out.loss_sum.item(), count + out.num_targets
    assert count == whole.num_targets
    assert total == pytest.approx(whole.loss_sum.item(), rel=1e-6)
    for got, want in zip((hidden.grad, weight.grad), grads, strict=False):
        torch.testing.assert_close(got, want / whole.num_targets)  # type: ignore[operator]


@pytest.mark.parametrize("labels", [[], [IGNORE_INDEX] * 3], ids=["no tokens", "all masked"])
def test_without_targets_everything_is_zero_and_backward_still_runs(labels: list[int]) -> None:
    case = make_case(tokens=len(labels), has_bias=True)
    case.labels = torch.tensor(labels, dtype=torch.long)
    out, grads = case.run(Objective("cakld", gamma="per_token", ce_weight=0.1))
    assert out.num_targets == 0
    assert all(value == 0 for value in out.sums().values())
    assert all(grad is not None and grad.count_nonzero() == 0 for grad in grads)


def test_what_stands_at_a_masked_token_does_not_matter() -> None:
    case, goal = make_case(), Objective("cakld", gamma="per_token", ce_weight=0.1)
    clean, expected = case.run(goal, tile_tokens=4)
    masked = case.labels == IGNORE_INDEX
    case.hidden[masked], case.teacher_hidden[masked] = math.nan, math.inf
    out, grads = case.run(goal, tile_tokens=4)
    assert torch.equal(out.loss_sum, clean.loss_sum)
    assert all(torch.equal(got, want) for got, want in zip(grads[:2], expected[:2], strict=True))  # type: ignore[arg-type]
    assert grads[0] is not None
    assert grads[0][masked].count_nonzero() == 0


def test_another_ignore_index_is_honoured() -> None:
    case, goal = make_case(), Objective("forward_kl")
    expected, _ = case.run(goal)
    case.labels = torch.where(case.labels == IGNORE_INDEX, -1, case.labels)
    out, _ = case.run(goal, ignore_index=-1)
    assert torch.equal(out.loss_sum, expected.loss_sum)


@pytest.mark.parametrize(
    "goal", [goal for goal in OBJECTIVES.values() if "ce" not in goal.terms], ids=lambda goal: goal.loss_type
)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(goal: Objective, temperature: float) -> None:
    case, goal = make_case(), dataclasses.replace(goal, temperature=temperature)
    case.teacher_hidden, case.teacher_weight = case.hidden, case.weight
    out, grads = case.run(goal)
    assert abs(out.loss_sum.item()) < 1e-6
    assert grads[0] is not None
    assert grads[0].abs().max() < 1e-6
    assert out.agreement.item() == out.num_targets  # type: ignore[union-attr]


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias", "hidden and bias"])
def test_gradients_go_where_they_are_asked_for_and_nowhere_else(trained: str) -> None:
    case, goal = make_case(has_bias=True), Objective("cakld", gamma=0.37)
    _, expected = naive(case, goal, {})
    assert case.bias is not None
    leaves = {"hidden": case.hidden.float(), "weight": case.weight.float(), "bias": case.bias.float()}
    for name in trained.split(" and "):
        leaves[name].requires_grad_()
    teacher, teacher_weight = case.teacher_hidden.float().requires_grad_(), case.teacher_weight.float().requires_grad_()
    head = Head(leaves["weight"], leaves["bias"])
    distillation_loss(
        leaves["hidden"], head, teacher, teacher_weight, case.labels, objective=goal, tile_tokens=4
    ).loss_sum.backward()
    for (name, leaf), want in zip(leaves.items(), expected, strict=True):
        assert_same(leaf.grad, want if name in trained else None)
    assert teacher.grad is None
    assert teacher_weight.grad is None


def test_a_head_that_both_share_learns_from_the_student_side_alone() -> None:
    case, goal = make_case(), Objective("reverse_kl")
    case.teacher_hidden, case.teacher_weight = case.hidden.flip(0).contiguous(), case.weight
    _, (_, expected, _) = naive(case, goal, {})
    shared = case.weight.float().requires_grad_()
    distillation_loss(
        case.hidden.float(), shared, case.teacher_hidden.float(), shared, case.labels, objective=goal
    ).loss_sum.backward()
    assert_same(shared.grad, expected)


@pytest.mark.parametrize("grad_mode", ["no_grad", "inference_mode", "nothing requires grad"])
def test_evaluation_measures_the_same_and_computes_no_gradient(grad_mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, goal = make_case(has_bias=True), Objective("cakld", gamma="per_token", ce_weight=0.1)
    expected, _ = case.run(goal)
    monkeypatch.setattr(tile, "_away_from_mean", lambda *_: pytest.fail("a gradient was computed"))
    assert case.bias is not None
    hidden, head = case.hidden.float(), Head(case.weight.float(), case.bias.float())
    teacher = (case.teacher_hidden.float(), case.teacher_weight.float())
    mode = contextlib.nullcontext
    if grad_mode != "nothing requires grad":
        mode = getattr(torch, grad_mode)
        hidden.requires_grad_()
    with mode():
        out = distillation_loss(hidden, head, *teacher, case.labels, objective=goal)
    assert not out.loss_sum.requires_grad
    assert {k: v.item() for k, v in out.sums().items()} == {k: v.item() for k, v in expected.sums().items()}


def test_statistics_carry_no_gradient() -> None:
    out, _ = make_case().run(Objective("mixture", weights={"jsd": 1.0}))
    assert out.loss_sum.requires_grad
    assert not any(value.requires_grad for value in out.sums().values())


def test_cross_entropy_alone_needs_no_teacher() -> None:
    case, goal = make_case(), Objective("ce")
    loss, expected = naive(case, goal, {})
    hidden = case.hidden.float().requires_grad_()
    out = distillation_loss(hidden, case.weight.float(), None, None, case.labels, objective=goal, tile_tokens=4)
    out.loss_sum.backward()
    assert_same(out.loss_sum.detach(), loss)
    assert_same(hidden.grad, expected[0])
    assert set(out.sums()) == {"loss", "cross_entropy", "student_entropy"}
    assert out.forward_kl is None
    assert out.jsd is None


def test_a_part_of_weight_zero_is_measured_and_not_trained() -> None:
    case = make_case()
    measured, grads = case.run(Objective("mixture", weights={"ce": 1.0, "jsd": 0.0}))
    plain, expected = case.run(Objective("ce"))
    trained, _ = case.run(Objective("jsd"))
    assert torch.equal(measured.loss_sum, plain.loss_sum)
    assert torch.equal(grads[0], expected[0])  # type: ignore[arg-type]
    assert plain.jsd is None
    assert measured.jsd == trained.jsd is not None


def test_the_incoming_gradient_scales_ours_and_backward_may_run_twice() -> None:
    case, goal = make_case(), Objective("cakld", gamma=0.37)
    _, expected = case.run(goal)
    hidden = case.hidden.float().requires_grad_()
    loss = distillation_loss(
        hidden,
        case.weight.float(),
        case.teacher_hidden.float(),
        case.teacher_weight.float(),
        case.labels,
        objective=goal,
    ).loss_sum
    for factor in (0.5, -2.0):
        (got,) = torch.autograd.grad(loss * factor, hidden, retain_graph=True)
        torch.testing.assert_close(got, expected[0] * factor)  # type: ignore[operator]


def test_a_second_derivative_is_refused_and_not_silently_zero() -> None:
    case = make_case()
    hidden = case.hidden.requires_grad_()
    loss = distillation_loss(
        hidden, case.weight, case.teacher_hidden, case.teacher_weight, case.labels, objective=Objective("forward_kl")
    ).loss_sum
    (grad,) = torch.autograd.grad(loss**2, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def refuse(error: type[Exception], message: str, *sides: Any, goal: Objective | None = None, **options: Any) -> None:
    with pytest.raises(error, match=message):
        distillation_loss(*sides, objective=goal or Objective("forward_kl"), **options)


def test_bad_arguments_are_refused_before_any_work() -> None:
    hidden, weight, labels = torch.zeros(4, 3), torch.zeros(7, 3), torch.zeros(4, dtype=torch.long)
    pair = (hidden, weight)
    refuse(ConfigError, r"`student_hidden` must be \[tokens, hidden\].*Flatten", hidden[None], weight, *pair, labels)
    refuse(ConfigError, r"student_hidden=\[4, 3\], student_head=\[7, 2\]", hidden, weight[:, :2], *pair, labels)
    refuse(ConfigError, r"`teacher_hidden` must be \[tokens, hidden\]", *pair, hidden, weight[:, :2], labels)
    refuse(ConfigError, "`teacher_hidden` must have the student's tokens", *pair, hidden[:3], weight, labels)
    refuse(
        ConfigError, r"`teacher_head` must have the student's vocab.*weight\[:5\]", *pair, hidden, weight[:5], labels
    )
    refuse(ConfigError, "must both be given", *pair, None, None, labels)
    refuse(ConfigError, "must both be given", *pair, hidden, None, labels)
    refuse(ConfigError, "must both be given", *pair, None, weight, labels, goal=Objective("ce"))
    refuse(DataError, r"`labels` must be one integer per token: got labels=\[1, 4\]", *pair, *pair, labels[None])
    refuse(DataError, r"got labels=\[3\].*shift_labels", *pair, *pair, labels[:3])
    refuse(DataError, "of torch.float32", *pair, *pair, labels.float())
    refuse(DataError, r"`labels` must lie in 0..6 or be -100: got 0..7", *pair, *pair, torch.tensor([0, 1, 7, -100]))
    refuse(DataError, r"got -1..0", *pair, *pair, torch.tensor([0, 0, -1, -100]))
    for bad in (0, -1, 2.5, True):
        refuse(ConfigError, "`tile_tokens` must be a positive integer", *pair, *pair, labels, tile_tokens=bad)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_labels_of_any_integer_type_are_read(dtype: torch.dtype) -> None:
    case, goal = make_case(), Objective("cakld", gamma=0.5, ce_weight=1.0)
    case.labels = case.labels.clamp(min=0)
    expected, _ = case.run(goal)
    case.labels = case.labels.to(dtype)
    assert torch.equal(case.run(goal)[0].loss_sum, expected.loss_sum)
