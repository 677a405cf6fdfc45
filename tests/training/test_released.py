"""`arithmetic="released"`: gamma, mask and reduction of BitDistiller's released code, against whole logits in fp64."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitdistiller_peft import BitDistillerConfig, DistillConfig, get_recipe
from bitdistiller_peft.errors import ConfigError, UnknownNameError
from bitdistiller_peft.training.gamma import sample_batches
from tests.training import helpers

MODEL = {"arithmetic": "released", "learn_scale": False, "scale_dtype": "float32"}


def logits(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Of student and teacher, fp64, `[batch, time, vocab]`."""
    plain = {name: value for name, value in inputs.items() if name != "labels"}
    student = model(**plain).logits.double()
    with torch.no_grad(), model.disable_adapter():
        teacher = model(**plain).logits.double()
    return student, teacher


def released_loss(model: Any, inputs: dict[str, Tensor], gamma: float) -> Tensor:
    """Sum over the positions whose own label counts, mean over texts."""
    student, teacher = (side.log_softmax(-1) for side in logits(model, inputs))
    reverse = (student.exp() * (student - teacher)).sum(-1)
    forward = (teacher.exp() * (teacher - student)).sum(-1)
    mask = (inputs["labels"] != -100).double()
    return ((gamma * reverse + (1 - gamma) * forward) * mask).sum(-1).mean()


def run_of(bases: Path, folder: Path, **changes: Any) -> Any:
    return helpers.trainer(helpers.student(bases, **MODEL), folder, arithmetic="released", **changes)


@pytest.mark.parametrize("gamma", [0.4, 1.05])
def test_loss_and_gradient_are_those_of_the_equations(gamma: float, bases: Path, tmp_path: Path) -> None:
    run = run_of(bases, tmp_path, gamma=gamma, gamma_num_batches=11)
    inputs = helpers.batch(helpers.dataset(4))
    formula = partial(released_loss, run.model, inputs, gamma)
    helpers.assert_loss_and_gradients(run, inputs, formula, rel=1e-4, atol=1e-5)


def test_it_is_another_loss_than_the_papers(bases: Path, tmp_path: Path) -> None:
    inputs = helpers.batch(helpers.dataset(4))
    run = run_of(bases, tmp_path)
    total, count = helpers.textbook_loss(run.model, inputs, 0.4)
    assert run.compute_loss(run.model, inputs).item() > 2 * total / count


def test_texts_count_once_however_they_are_accumulated(bases: Path, tmp_path: Path) -> None:
    once = run_of(bases, tmp_path / "a", per_device_train_batch_size=4)
    split = run_of(bases, tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=4)
    for run in (once, split):
        run.train()
    assert helpers.difference(helpers.weights(once.model), helpers.weights(split.model)) < 1e-5


def test_gamma_is_the_mean_largest_probability_times_eleven_tenths(bases: Path, tmp_path: Path) -> None:
    rows = helpers.dataset(48)
    run = run_of(bases, tmp_path, data=rows, gamma="estimate", gamma_num_batches=11)
    settings = {"batch_size": 4, "num_batches": 11, "seed": run.args.seed}
    total = 0.0
    for inputs in sample_batches(run.train_dataset, run.data_collator, run.accelerator, **settings):
        _, teacher = logits(run.model, dict(inputs))
        total += float(teacher.softmax(-1).amax(-1).mean())
    assert run.gamma == pytest.approx(total / 10, rel=1e-5)


def test_a_sure_teacher_gets_a_gamma_above_one(bases: Path, tmp_path: Path) -> None:
    model = helpers.student(bases, **MODEL)
    model.get_output_embeddings().weight.data.mul_(1e4)
    run = helpers.trainer(model, tmp_path, arithmetic="released", gamma="estimate", gamma_num_batches=3, max_steps=1)
    assert 1.2 < run.gamma <= 1.5
    run.train()
    assert run.state.log_history[0]["gamma"] == run.gamma


def test_the_recipe_takes_the_whole_arithmetic(tmp_path: Path) -> None:
    recipe = get_recipe("bitdistiller", arithmetic="released")
    assert recipe.model["arithmetic"] == recipe.training["arithmetic"] == "released"
    assert BitDistillerConfig.from_recipe("bitdistiller", arithmetic="released").spec().arithmetic == "released"
    options = {"arithmetic": "released", "output_dir": str(tmp_path), "report_to": "none"}
    args = DistillConfig.from_recipe("bitdistiller", **options)
    assert (args.gamma_num_batches, args.completion_only_loss, args.is_released) == (11, False, True)
    assert not DistillConfig.from_recipe("bitdistiller", output_dir=str(tmp_path), report_to="none").is_released
    three = BitDistillerConfig.from_recipe("bitdistiller", bits=3, **options).spec()
    assert (three.grid.name, three.arithmetic) == ("nf", "released")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "forward_kl", "gamma": "estimate"}, "`loss_type` must be 'cakld' with arithmetic='released'"),
        ({"ce_weight": 0.1}, "`ce_weight` must be 0.0"),
        ({"packing": True}, "`packing` must be False"),
        ({"gamma_num_batches": 1}, "`gamma_num_batches` must be at least 2"),
        ({"gamma": 1.2, "gamma_num_batches": 11}, r"`gamma` must lie in \[0, 1\]"),
        ({"teacher": "cached", "teacher_cache": "x"}, "`teacher` must see every position"),
    ],
    ids=["loss", "ce", "packing", "batches", "gamma", "cached"],
)
def test_what_the_released_code_has_no_form_of_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        helpers.config(tmp_path, arithmetic="released", **changes)


def test_unknown_arithmetics_and_learned_scales_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="arithmetic"):
        helpers.config(tmp_path, arithmetic="official")
    with pytest.raises(ConfigError, match="`learn_scale` must be False with arithmetic='released'"):
        BitDistillerConfig(arithmetic="released")
