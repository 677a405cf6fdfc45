"""The moving average of weights: what is evaluated, kept, packed, saved and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from bitdistiller_peft.errors import CheckpointError, ConfigError
from bitdistiller_peft.training.averages import AVERAGES_NAME
from tests.training import helpers

STUDENT = {"learn_zero_point": True}


class Recorder(TrainerCallback):
    """Remembers the weights after every step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_train_begin(self, *args: object, model: torch.nn.Module, **kwargs: object) -> None:
        self.seen.append(helpers.weights(model))

    def on_step_end(self, *args: object, model: torch.nn.Module, **kwargs: object) -> None:
        self.seen.append(helpers.weights(model))


def by_hand(steps: list[dict[str, torch.Tensor]], decay: float) -> dict[str, torch.Tensor]:
    """The recurrence, in fp64."""
    average = {name: value.double() for name, value in steps[0].items()}
    for number, weights in enumerate(steps[1:], start=1):
        keep = min(decay, (1 + number) / (10 + number))
        average = {name: keep * average[name] + (1 - keep) * value.double() for name, value in weights.items()}
    return average


@pytest.mark.parametrize("decay", [0.2, 0.9])
def test_the_model_ends_as_the_average_of_all_steps(bases: Path, tmp_path: Path, decay: float) -> None:
    run = helpers.trainer(helpers.student(bases, **STUDENT), tmp_path, ema_decay=decay, max_steps=5, learning_rate=0.1)
    recorder = Recorder()
    run.add_callback(recorder)
    run.train()
    expected = {name: value.float() for name, value in by_hand(recorder.seen, decay).items()}
    assert helpers.difference(helpers.weights(run.model), expected) < 1e-6
    assert helpers.difference(expected, recorder.seen[-1]) > 1e-4


def test_evaluation_sees_the_average_and_training_goes_on_from_the_weights(bases: Path, tmp_path: Path) -> None:
    losses = {}
    for decay in (None, 0.5):
        run = helpers.trainer(
            helpers.student(bases), tmp_path, eval_data=helpers.dataset(4, seed=1), ema_decay=decay,
            max_steps=3, eval_strategy="steps", eval_steps=1, learning_rate=0.1,
        )  # fmt: skip
        run.train()
        losses[decay] = run
    assert helpers.history(losses[None]) == helpers.history(losses[0.5])
    plain, averaged = (helpers.history(losses[decay], "eval_loss") for decay in (None, 0.5))
    assert plain != averaged
    assert losses[0.5].evaluate()["eval_loss"] == averaged[-1]


def test_a_resumed_run_ends_with_the_same_average(bases: Path, tmp_path: Path) -> None:
    settings = {"ema_decay": 0.5, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = helpers.trainer(helpers.student(bases, **STUDENT), tmp_path / "whole", **settings)
    whole.train()
    again = helpers.trainer(helpers.student(bases, **STUDENT), tmp_path / "again", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert helpers.difference(helpers.weights(whole.model), helpers.weights(again.model)) == 0


def test_the_best_checkpoint_brings_its_average(bases: Path, tmp_path: Path) -> None:
    run = helpers.trainer(
        helpers.student(bases), tmp_path, eval_data=helpers.dataset(4, seed=1), ema_decay=0.5, max_steps=3,
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="eval_forward_kl", greater_is_better=False, learning_rate=0.1,
    )  # fmt: skip
    run.train()  # with such a learning rate, the first step is the best
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    kept = load_file(tmp_path / "checkpoint-1" / AVERAGES_NAME)
    assert helpers.difference(helpers.weights(run.model), kept) == 0


def test_a_checkpoint_without_averages_is_refused(bases: Path, tmp_path: Path) -> None:
    helpers.trainer(helpers.student(bases), tmp_path, save_strategy="steps", save_steps=1).train()
    run = helpers.trainer(helpers.student(bases), tmp_path / "again", ema_decay=0.5, max_steps=3)
    with pytest.raises(CheckpointError, match="ema_decay=None"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("decay", [0.0, 1.0, 1.5, float("nan")])
def test_a_decay_outside_its_range_is_refused(tmp_path: Path, decay: float) -> None:
    with pytest.raises(ConfigError, match="`ema_decay` must lie in"):
        helpers.config(tmp_path, ema_decay=decay)
