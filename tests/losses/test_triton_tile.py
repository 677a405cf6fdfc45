"""The Triton programs of the loss, in Triton's interpreter where there is no GPU: the formulas in fp64."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bitdistiller_peft.losses import Objective, tile, triton_tile
from bitdistiller_peft.losses.tile import Tile, score_tile, statistic_names

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = DEVICE.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    not INTERPRETED or triton_tile._programs() is None, reason="Triton is not installed, or was imported for a GPU"
)
OBJECTIVES = [
    Objective("cakld", gamma=0.37),
    Objective("cakld", gamma="per_token", ce_weight=0.3),
    Objective("forward_kl"),
    Objective("reverse_kl", ce_weight=0.3),
    Objective("mixture", gamma=0.4, weights={"cakld": 2.0, "reverse_kl": 0.25, "ce": 0.1, "forward_kl": 0.0}),
]


@pytest.fixture(autouse=True)
def _on_this_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_tile, "DEVICES", (DEVICE.type,))
    monkeypatch.setattr(triton_tile, "_BLOCK", 32)


def logits(rows: int, vocab: int, distance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher, labels."""
    generator = torch.Generator().manual_seed(rows + vocab)
    teacher = 3 * torch.randn(rows, vocab, generator=generator)
    student = teacher + distance * torch.randn(rows, vocab, generator=generator)
    return student.to(DEVICE), teacher.to(DEVICE), torch.randint(vocab, (rows,), generator=generator).to(DEVICE)


def in_fp64(goal: Objective, student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The textbook, and autograd's gradient."""
    leaf = student.double().requires_grad_()
    log_s, log_t = leaf.log_softmax(-1), teacher.double().log_softmax(-1)
    found = {
        "forward_kl": F.kl_div(log_s, log_t, reduction="none", log_target=True).nansum(-1),
        "reverse_kl": F.kl_div(log_t, log_s, reduction="none", log_target=True).nansum(-1),
        "cross_entropy": F.cross_entropy(leaf, labels, reduction="none"),
        "student_entropy": torch.special.entr(log_s.exp()).sum(-1),
        "teacher_entropy": torch.special.entr(log_t.exp()).sum(-1),
        "confidence": log_t.exp().gather(-1, labels[:, None]).squeeze(-1),
        "agreement": (leaf.argmax(-1) == teacher.argmax(-1)).double(),
    }
    weights = goal.coefficients(found["confidence"])
    loss = (
        sum(weight * found[name] for name, weight in weights.items())
        + goal.terms.get("ce", 0.0) * found["cross_entropy"]
    )
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    return {**{name: value.detach() for name, value in found.items()}, "loss": loss.detach()}, grad


def assert_close(goal: Objective, student: Tensor, teacher: Tensor, labels: Tensor, rel: float) -> None:
    values, grad = score_tile(Tile(student, teacher, labels), goal, with_gradient=True)
    wanted, wanted_grad = in_fp64(goal, student, teacher, labels)
    assert values.keys() == set(statistic_names(goal, has_teacher=True))
    for name, value in wanted.items():
        assert float((values[name] - value).abs().max()) <= rel * (1e-30 + float(value.abs().max())), name
    assert float((grad - wanted_grad).norm() / wanted_grad.norm()) <= rel


@pytest.mark.parametrize("goal", OBJECTIVES, ids=lambda goal: goal.loss_type)
def test_values_and_gradients_are_those_of_the_formula(goal: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile, "compare", None)  # the torch path would need it
    for rows, vocab, distance in ((2, 97, 1.0), (1, 5, 4.0)):
        assert_close(goal, *logits(rows, vocab, distance), rel=1e-5)


def test_a_student_close_to_its_teacher_keeps_its_digits() -> None:
    for distance, rel in ((1e-2, 1e-4), (1e-3, 5e-4)):  # divergences of some 1e-5 and 1e-7
        assert_close(Objective("cakld", gamma=0.4), *logits(2, 300, distance), rel=rel)


def test_wide_gaps_and_padded_vocabularies_stay_finite() -> None:
    student, teacher, labels = logits(3, 40, 1.0)
    student[0, 3], teacher[1, 4] = -150.0, -150.0
    student[:, 35:] = teacher[:, 35:] = float("-inf")
    goal = Objective("cakld", gamma=0.4)
    values, grad = score_tile(Tile(student, teacher, labels % 35), goal, with_gradient=True)
    assert all(value.isfinite().all() for value in values.values())
    assert grad.isfinite().all()
    assert (grad[:, 35:] == 0).all()
    cut = [side[:, :35].contiguous() for side in (student, teacher)]
    wanted, wanted_grad = in_fp64(goal, *cut, labels % 35)
    assert torch.allclose(values["loss"].double(), wanted["loss"], rtol=1e-5)
    assert torch.allclose(grad[:, :35].double(), wanted_grad, atol=1e-6)


@pytest.mark.parametrize("goal", [Objective("jsd"), Objective("cakld", gamma=0.4, temperature=2.0)])
def test_what_the_programs_do_not_know_goes_through_torch(goal: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_tile, "score", None)
    values, grad = score_tile(Tile(*logits(2, 9, 1.0)), goal, with_gradient=True)
    assert values["loss"].isfinite().all()
    assert grad is not None
