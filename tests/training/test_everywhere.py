"""`divergence_tokens="all"`: divergences over all that is no padding, cross-entropy over targets, against fp64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.losses import Objective
from tests.training import helpers

LOSS = {"loss_type": "forward_kl", "ce_weight": 0.5, "logits_weight": 10.0, "temperature": 5.0}


def run_of(bases: Path, folder: Path, **changes: Any) -> Any:
    settings = {**LOSS, "rescale_temperature": False, "divergence_tokens": "all", **changes}
    return helpers.trainer(helpers.student(bases), folder, gamma=None, **settings)


def textbook(model: Any, inputs: dict[str, Tensor], temperature: float = 5.0) -> tuple[Tensor, Tensor]:
    """Divergence as a mean over positions that are attended to, cross-entropy as a mean over targets."""
    plain = {name: value for name, value in inputs.items() if name != "labels"}
    student = model(**plain).logits.double()
    with torch.no_grad(), model.disable_adapter():
        teacher = model(**plain).logits.double()
    warm, known = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    divergence = (known.exp() * (known - warm)).sum(-1)[inputs["attention_mask"].bool()].mean()
    labels = inputs["labels"][:, 1:]
    chosen = student[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return divergence, -chosen[labels != -100].mean()


def test_loss_and_gradient_are_those_of_the_equations(bases: Path, tmp_path: Path) -> None:
    run, inputs = run_of(bases, tmp_path), helpers.batch(helpers.dataset(4))

    def formula() -> Tensor:
        divergence, cross_entropy = textbook(run.model, inputs)
        return 10 * divergence + 0.5 * cross_entropy

    helpers.assert_loss_and_gradients(run, inputs, formula, rel=1e-5, atol=1e-6)


def test_what_is_logged_are_the_two_means(bases: Path, tmp_path: Path) -> None:
    rows = helpers.dataset(4)
    run = run_of(bases, tmp_path, data=rows, max_steps=1, learning_rate=0.0)
    run.train()
    divergence, cross_entropy = textbook(run.model, helpers.batch(rows))
    logged = run.state.log_history[0]
    assert logged["forward_kl"] == pytest.approx(divergence.item(), rel=1e-4)
    assert logged["ce"] == pytest.approx(cross_entropy.item(), rel=1e-4)
    assert logged["loss"] == pytest.approx(10 * divergence.item() + 0.5 * cross_entropy.item(), rel=1e-4)


def test_accumulation_changes_nothing(bases: Path, tmp_path: Path) -> None:
    once = run_of(bases, tmp_path / "a", per_device_train_batch_size=4)
    split = run_of(bases, tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=4)
    for run in (once, split):
        run.train()
    assert helpers.difference(helpers.weights(once.model), helpers.weights(split.model)) < 1e-5
    losses = [run.state.log_history[0]["loss"] for run in (once, split)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_without_it_prompts_do_not_count(bases: Path, tmp_path: Path) -> None:
    inputs = helpers.batch(helpers.dataset(4))
    runs = [run_of(bases, tmp_path, divergence_tokens=name) for name in ("all", "targets")]
    everywhere, targets = (run.compute_loss(run.model, inputs).item() for run in runs)
    assert abs(everywhere - targets) > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"divergence_tokens": "prompts"}, "`divergence_tokens` must be 'targets' or 'all'"),
        ({"ce_weight": 0.0}, "for a loss without both cross-entropy and a divergence"),
        ({"loss_type": "ce", "ce_weight": 0.0, "logits_weight": 1.0}, "for a loss without both"),
        (
            {"teacher": "cached", "teacher_cache": "cache"},
            "`divergence_tokens` must be 'targets' with teacher='cached'",
        ),
    ],
    ids=["unknown", "no cross-entropy", "no divergence", "cached"],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        helpers.config(tmp_path, **{**LOSS, "gamma": None, "divergence_tokens": "all", **changes})


def test_the_parts_of_an_objective_add_up() -> None:
    whole = Objective("mixture", gamma=0.3, weights={"cakld": 2.0, "jsd": 0.5, "ce": 0.25}, temperature=2.0)
    divergences, cross_entropy = whole.parted()
    assert divergences.terms | cross_entropy.terms == whole.terms
    assert (divergences.gamma, divergences.temperature, cross_entropy.needs_teacher) == (0.3, 2.0, False)
