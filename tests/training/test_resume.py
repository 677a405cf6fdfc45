"""A run that was stopped and resumed is the run that was not, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.training import helpers

SETTINGS: dict[str, Any] = {
    "optim": "adamw_torch",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "max_steps": 6,
    "save_steps": 3,
    "save_strategy": "steps",
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 2,
    "max_grad_norm": 1.0,
}
KEYS = ("loss", "forward_kl", "ce", "gamma", "num_tokens", "flip_rate", "learning_rate", "grad_norm")


@pytest.mark.parametrize(
    ("student", "changes"),
    [
        ({"learn_zero_point": True}, {"gamma": "estimate", "scale_learning_rate": 1e-2}),
        ({"learn_scale": False, "train_other": "norms"}, {"bf16": True, "gradient_checkpointing": True}),
    ],
    ids=["learned", "recomputed"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    bases: Path, tmp_path: Path, student: dict[str, Any], changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = helpers.trainer(helpers.student(bases, **student), tmp_path / "a", **SETTINGS | changes)
    whole.train()
    again = helpers.trainer(helpers.student(bases, **student), tmp_path / "b", **SETTINGS | changes)

    def never() -> float:
        raise AssertionError("gamma was estimated again")

    monkeypatch.setattr(again, "_estimate_gamma", never)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert helpers.difference(helpers.weights(whole.model), helpers.weights(again.model)) == 0
    for key in KEYS:
        assert helpers.history(again, key) == helpers.history(whole, key), key
    assert again.gamma == whole.gamma


def test_the_checkpoint_is_an_ordinary_adapter_with_gamma_beside_it(bases: Path, tmp_path: Path) -> None:
    run = helpers.trainer(helpers.student(bases), tmp_path, **SETTINGS | {"max_steps": 3, "gamma": "estimate"})
    run.train()
    folder = tmp_path / "checkpoint-3"
    assert {"adapter_config.json", "adapter_model.safetensors", "trainer_state.json"} <= {
        path.name for path in folder.iterdir()
    }
    stored = json.loads((folder / "trainer_state.json").read_text())["stateful_callbacks"]["RunMemory"]["attributes"]
    assert stored == {"gamma": run.gamma, "num_tokens": helpers.history(run, "num_tokens")[-1]}


def test_resuming_also_works_where_callbacks_are_restored(bases: Path, tmp_path: Path) -> None:
    first = helpers.trainer(helpers.student(bases), tmp_path, **SETTINGS | {"gamma": "estimate", "max_steps": 3})
    first.train()
    settings = SETTINGS | {"gamma": "estimate", "restore_callback_states_from_checkpoint": True}
    again = helpers.trainer(helpers.student(bases), tmp_path, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.gamma == first.gamma
    assert again.state.global_step == 6


def test_the_best_checkpoint_can_be_chosen_by_a_divergence(bases: Path, tmp_path: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
    run = helpers.trainer(
        helpers.student(bases),
        tmp_path,
        eval_data=helpers.dataset(4, seed=5),
        **SETTINGS | settings | {"metric_for_best_model": "eval_forward_kl", "greater_is_better": False},
    )
    run.train()
    assert run.state.best_metric == min(helpers.history(run, "eval_forward_kl"))


def test_a_second_run_of_one_trainer_counts_from_zero(bases: Path, tmp_path: Path) -> None:
    run = helpers.trainer(helpers.student(bases), tmp_path)
    run.train()
    tokens = helpers.history(run, "num_tokens")
    run.train()
    assert helpers.history(run, "num_tokens") == tokens
