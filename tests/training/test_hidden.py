"""The hidden-state part in training: the right layer of both sides, exact under any split, logged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.losses import hidden_state_loss, shift_labels
from bitdistiller_peft.training import DistillTrainer, cache_teacher
from tests.training import helpers

WEIGHT = 3.0


def expected(model: torch.nn.Module, inputs: dict[str, torch.Tensor], layer: int) -> float:
    """Sum over the targets, from what transformers itself shows of every layer."""
    plain = {name: value for name, value in inputs.items() if name != "labels"}
    index = layer if layer < 0 else layer + 1
    with torch.no_grad():
        ours = model(**plain, output_hidden_states=True).hidden_states[index]
        with model.disable_adapter():
            theirs = model(**plain, output_hidden_states=True).hidden_states[index]
    labels = shift_labels(inputs["labels"])
    return float(hidden_state_loss(ours.flatten(0, 1), theirs.flatten(0, 1), labels.flatten()))


@pytest.mark.parametrize("layer", [-1, -2, 0])
def test_the_loss_is_that_without_plus_the_part(bases: Path, tmp_path: Path, layer: int) -> None:
    model = helpers.student(bases)
    inputs = helpers.batch(helpers.dataset(4))
    targets = int((inputs["labels"][:, 1:] != -100).sum())
    without = helpers.trainer(model, tmp_path).compute_loss(model.eval(), inputs).item()
    run = helpers.trainer(helpers.student(bases), tmp_path, hidden_weight=WEIGHT, hidden_layer=layer)
    loss = run.compute_loss(run.model.eval(), inputs).item()
    part = expected(run.model, inputs, layer) / targets
    assert part > 1e-4
    assert loss == pytest.approx(without + WEIGHT * part, rel=1e-5)


def test_it_moves_the_weights_is_logged_and_exact_under_any_split(bases: Path, tmp_path: Path) -> None:
    ends = {}
    for size, steps in ((8, 1), (2, 4)):
        run = helpers.trainer(
            helpers.student(bases), tmp_path, loss_type="ce", gamma=None, hidden_weight=WEIGHT, hidden_layer=0,
            per_device_train_batch_size=size, gradient_accumulation_steps=steps,
        )  # fmt: skip
        run.train()
        ends[size] = (helpers.weights(run.model), helpers.history(run), helpers.history(run, "hidden_states"))
    assert helpers.difference(ends[8][0], ends[2][0]) < 1e-6
    assert ends[8][2] == pytest.approx(ends[2][2], rel=1e-4)
    plain = helpers.trainer(helpers.student(bases), tmp_path, loss_type="ce", gamma=None, per_device_train_batch_size=8)
    plain.train()
    assert ends[8][1][0] == pytest.approx(helpers.history(plain)[0] + WEIGHT * ends[8][2][0], rel=1e-4)
    assert helpers.difference(ends[8][0], helpers.weights(plain.model)) > 1e-4


def test_a_cache_of_hidden_states_serves_for_the_last_layer_alone(bases: Path, tmp_path: Path) -> None:
    live = helpers.trainer(helpers.student(bases), tmp_path / "live", hidden_weight=WEIGHT)
    cache_teacher(live.model, helpers.tokenizer(), live.train_dataset, tmp_path / "cache", dtype="float32")
    settings = {"teacher": "cached", "teacher_cache": str(tmp_path / "cache"), "hidden_weight": WEIGHT}

    def trainer(**changes: object) -> DistillTrainer:
        args = helpers.config(tmp_path / "run", **settings, **changes)
        data, words = helpers.dataset(), helpers.tokenizer()
        return DistillTrainer(helpers.student(bases), args, train_dataset=data, processing_class=words)

    run = trainer()
    inputs = helpers.batch(helpers.dataset().select(range(4)))
    ours, theirs = (one.compute_loss(one.model.eval(), inputs).item() for one in (run, live))
    assert ours == pytest.approx(theirs, rel=1e-5)
    with pytest.raises(ConfigError, match="`hidden_layer` must be -1 with teacher='cached'"):
        trainer(hidden_layer=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_weight": -1.0}, "`hidden_weight` must not be negative"),
        (
            {"hidden_weight": 1.0, "hidden_layer": 2},
            "`hidden_layer` must be a layer of the student: got hidden_layer=2",
        ),
        ({"hidden_weight": 1.0, "hidden_layer": -3}, "`hidden_layer` must be a layer of the student"),
    ],
)
def test_what_cannot_be_is_refused(bases: Path, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        helpers.trainer(helpers.student(bases), tmp_path, **changes)
