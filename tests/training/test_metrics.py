"""What is logged is right: means over tokens, whatever the batches, and codes that really moved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from bitdistiller_peft.layers import quantized
from bitdistiller_peft.training.metrics import FlipCounter, Meter, Stopwatch, trained_weights
from tests.training import helpers

TRAIN_KEYS = {
    "loss", "forward_kl", "reverse_kl", "ce", "gamma", "confidence", "agreement", "entropy", "teacher_entropy",
    "flip_rate", "tokens_per_second", "num_tokens", "learning_rate", "grad_norm", "epoch", "step",
    "oscillation", "clamped", "dead_levels", "dead_scales", "scale_drift", "scale_drift_max",  # of the doctor
}  # fmt: skip


def test_a_training_log_has_every_figure(bases: Path, tmp_path: Path) -> None:
    run = helpers.trainer(helpers.student(bases), tmp_path)
    run.train()
    assert set(run.state.log_history[0]) == TRAIN_KEYS
    assert helpers.history(run, "gamma") == [0.4, 0.4]
    assert all(rate > 0 for rate in helpers.history(run, "tokens_per_second"))


def test_a_log_over_several_steps_is_a_mean_over_tokens(bases: Path, tmp_path: Path) -> None:
    # learning rate 0: each step sees other tokens with the same student
    common = {"learning_rate": 0.0, "max_steps": 4, "per_device_train_batch_size": 1}
    every = helpers.trainer(helpers.student(bases), tmp_path / "a", logging_steps=1, **common)
    rare = helpers.trainer(helpers.student(bases), tmp_path / "b", logging_steps=4, **common)
    every.train()
    rare.train()
    seen = [row["labels"] for row in every.train_dataset]
    order = helpers.history(every, "num_tokens")
    lengths = [now - before for before, now in zip([0, *order[:-1]], order, strict=True)]
    by_length = {len(labels): sum(label != -100 for label in labels[1:]) for labels in seen}
    targets = [by_length[int(length)] for length in lengths]
    for key in ("loss", "forward_kl", "ce", "agreement"):
        expected = sum(n * v for n, v in zip(targets, helpers.history(every, key), strict=True)) / sum(targets)
        assert helpers.history(rare, key) == [pytest.approx(expected, rel=1e-5)]


@pytest.mark.parametrize("size", [1, 3, 16])
def test_evaluation_is_a_mean_over_tokens_whatever_the_batch(bases: Path, tmp_path: Path, size: int) -> None:
    model = helpers.student(bases)
    rows = helpers.dataset(10, seed=9)
    total, count = helpers.textbook_loss(model, helpers.batch(rows), gamma=0.4)
    run = helpers.trainer(model, tmp_path, eval_data=rows, per_device_eval_batch_size=size)
    metrics = run.evaluate()
    assert metrics["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    for key in ("forward_kl", "reverse_kl", "ce", "confidence", "agreement", "entropy"):
        assert f"eval_{key}" in metrics
    assert run.state.log_history[-1]["eval_loss"] == metrics["eval_loss"]


def test_evaluation_changes_neither_training_nor_its_figures(bases: Path, tmp_path: Path) -> None:
    quiet = helpers.trainer(helpers.student(bases), tmp_path / "a", max_steps=4, logging_steps=2)
    busy = helpers.trainer(
        helpers.student(bases),
        tmp_path / "b",
        max_steps=4,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        eval_data=helpers.dataset(4),
    )
    quiet.train()
    busy.train()
    assert helpers.difference(helpers.weights(quiet.model), helpers.weights(busy.model)) == 0
    assert [e["forward_kl"] for e in busy.state.log_history if "forward_kl" in e] == helpers.history(
        quiet, "forward_kl"
    )


def test_several_evaluation_sets_keep_their_names(bases: Path, tmp_path: Path) -> None:
    sets = {"one": helpers.dataset(4, 1), "two": helpers.dataset(4, 2)}
    metrics = helpers.trainer(helpers.student(bases), tmp_path, eval_data=sets).evaluate()
    assert metrics["eval_one_forward_kl"] != metrics["eval_two_forward_kl"]


def test_compute_metrics_gets_the_students_logits(bases: Path, tmp_path: Path) -> None:
    shapes = []

    def measure(prediction: object) -> dict[str, float]:
        shapes.append(prediction.predictions.shape)  # type: ignore[attr-defined]
        return {"answer": 42.0}

    rows = helpers.dataset(4)
    run = helpers.DistillTrainer(
        helpers.student(bases),
        helpers.config(tmp_path),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=helpers.tokenizer(),
        compute_metrics=measure,
    )
    assert run.evaluate()["eval_answer"] == 42.0
    assert shapes[0][0] == 4
    assert shapes[0][2] == 96


def test_the_flip_rate_is_the_share_of_codes_that_changed(bases: Path) -> None:
    model = helpers.student(bases)
    counter = FlipCounter(model, -1)
    assert counter.rate() == 0
    holder, name, _ = trained_weights(model)[0]
    before = quantized(holder, name)[0]
    with torch.no_grad():
        getattr(holder, name)[0].mul_(-1)
    changed = int((quantized(holder, name)[0] != before).sum())
    total = sum(getattr(m, n).numel() for m, n, _ in trained_weights(model))
    assert changed > 0
    assert counter.rate() == changed / total
    assert counter.rate() == 0


@pytest.mark.parametrize(("asked", "seen"), [(1, 1), (5, 5), (14, 14), (100, 14), (-1, 14)])
def test_the_flip_rate_looks_at_as_many_weights_as_asked(bases: Path, asked: int, seen: int) -> None:
    assert len(FlipCounter(helpers.student(bases), asked)._codes) == seen


def test_the_flip_rate_can_be_switched_off(bases: Path, tmp_path: Path) -> None:
    run = helpers.trainer(helpers.student(bases), tmp_path, log_flip_rate=False)
    run.train()
    assert helpers.history(run, "flip_rate") == []


def test_a_meter_divides_by_tokens_and_starts_again() -> None:
    meter, accelerator = Meter(), Accelerator(cpu=True)
    meter.add({"loss": torch.tensor(3.0), "cross_entropy": torch.tensor(1.0)}, 1)
    meter.add({"loss": torch.tensor(5.0), "cross_entropy": torch.tensor(7.0)}, 3)
    assert meter.drain(accelerator) == {"loss": 2.0, "ce": 2.0}
    assert meter.drain(accelerator) == {}
    meter.add({"loss": torch.tensor(0.0)}, 0)
    assert meter.drain(accelerator) == {}


def test_a_stopwatch_leaves_out_what_went_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 10.0, 12.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    watch = Stopwatch()
    watch.skip(5.0)
    assert watch.restart(100) == pytest.approx(20.0)
    assert watch.restart(110) == pytest.approx(5.0)
