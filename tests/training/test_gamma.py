"""Gamma is the teacher's mean probability of the target tokens, and measuring it leaves no trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, IterableDataset

from bitdistiller_peft.errors import ConfigError, DataError
from bitdistiller_peft.training.gamma import sample_batches
from tests.training import helpers


def mean_target_probability(model: torch.nn.Module, rows: Dataset) -> float:
    inputs = helpers.batch(rows)
    labels = inputs.pop("labels")[:, 1:]
    with torch.no_grad():
        probs = model(**inputs).logits[:, :-1].double().softmax(-1)
    chosen = probs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return float(chosen[labels != -100].mean())


def test_the_estimate_is_the_mean_probability_of_the_target_tokens(bases: Path, tmp_path: Path) -> None:
    rows = helpers.dataset(16)
    run = helpers.trainer(helpers.student(bases), tmp_path, data=rows, gamma="estimate")
    assert run.gamma == pytest.approx(mean_target_probability(helpers.base(bases), rows), rel=1e-5)
    assert run.gamma > 1e-4


def test_training_with_the_estimate_equals_training_with_the_number(bases: Path, tmp_path: Path) -> None:
    estimated = helpers.trainer(helpers.student(bases), tmp_path / "a", gamma="estimate", gamma_num_batches=2)
    estimated.train()
    given = helpers.trainer(helpers.student(bases), tmp_path / "b", gamma=estimated.gamma)
    given.train()
    assert helpers.history(given) == helpers.history(estimated)
    assert helpers.difference(helpers.weights(given.model), helpers.weights(estimated.model)) == 0


def test_gamma_moves_the_loss_from_one_divergence_to_the_other(bases: Path, tmp_path: Path) -> None:
    losses = {}
    for gamma in (0.0, 1.0):
        run = helpers.trainer(helpers.student(bases), tmp_path / str(gamma), gamma=gamma, max_steps=1)
        run.train()
        losses[gamma] = helpers.history(run)
        assert losses[gamma] == pytest.approx(helpers.history(run, "reverse_kl" if gamma else "forward_kl"))
    assert losses[0.0] != losses[1.0]


def test_gamma_can_be_taken_per_token(bases: Path, tmp_path: Path) -> None:
    per_token = helpers.trainer(helpers.student(bases), tmp_path / "a", gamma="per_token")
    forward = helpers.trainer(helpers.student(bases), tmp_path / "b", gamma=0.0)
    per_token.train()
    forward.train()
    assert per_token.gamma == "per_token"
    assert helpers.history(per_token, "gamma") == []
    assert helpers.history(per_token) != helpers.history(forward)


@pytest.mark.parametrize(("size", "world"), [(4, 1), (2, 2), (1, 4)])
def test_the_same_examples_are_drawn_on_any_number_of_ranks(size: int, world: int) -> None:
    class Rank(Accelerator):  # only what is asked of it
        def __init__(self, index: int) -> None:
            self.index = index

        num_processes = world
        process_index = property(lambda self: self.index)
        device = torch.device("cpu")

    rows = Dataset.from_dict({"input_ids": [[i] for i in range(50)]})
    drawn: list[int] = []
    for rank in range(world):
        batches = sample_batches(
            rows, lambda b: {"ids": [r["input_ids"][0] for r in b]}, Rank(rank), batch_size=size, num_batches=2, seed=3
        )
        drawn += [i for batch in batches for i in batch["ids"]]
    expected = torch.randperm(50, generator=torch.Generator().manual_seed(3))[:8].tolist()
    assert sorted(drawn) == sorted(expected)


def test_a_stream_gives_its_first_examples(bases: Path, tmp_path: Path) -> None:
    rows = helpers.dataset(8)
    stream = IterableDataset.from_generator(lambda: iter(rows))
    run = helpers.trainer(helpers.student(bases), tmp_path, data=stream, gamma="estimate", gamma_num_batches=1)
    first = Dataset.from_dict(rows[:4])
    assert run.gamma == pytest.approx(mean_target_probability(helpers.base(bases), first), rel=1e-5)


@pytest.mark.parametrize("gamma", [-0.1, 1.1, float("nan"), "max"])
def test_a_gamma_that_is_no_share_is_refused(tmp_path: Path, gamma: object) -> None:
    with pytest.raises(ConfigError, match="gamma"):
        helpers.config(tmp_path, gamma=gamma)


def test_a_number_without_a_cakld_part_is_refused_and_the_default_is_not(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gamma"):
        helpers.config(tmp_path, gamma=0.3, loss_type="forward_kl")
    assert helpers.config(tmp_path, gamma="estimate", loss_type="forward_kl").objective(None).gamma is None


def test_sampled_batches_without_targets_are_refused(bases: Path, tmp_path: Path) -> None:
    rows = Dataset.from_dict(
        {"input_ids": [[5, 6, 7]] * 20, "labels": [[-100] * 3] * 19 + [[-100, -100, 7]]},
    )
    run = helpers.trainer(
        helpers.student(bases),
        tmp_path,
        data=rows,
        gamma="estimate",
        gamma_num_batches=1,
        per_device_train_batch_size=1,
        max_length=None,
        seed=1,
    )
    with pytest.raises(DataError, match="gamma"):
        _ = run.gamma
