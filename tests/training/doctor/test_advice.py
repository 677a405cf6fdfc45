"""Each known failure, made to happen in a real run, is found, and nothing else is; a healthy run has no findings."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel

from bitdistiller_peft import BitDistillerConfig, get_bitdistiller_model
from bitdistiller_peft.errors import BitDistillerError
from bitdistiller_peft.layers import companion
from bitdistiller_peft.training.doctor import diagnose
from bitdistiller_peft.training.metrics import trained_weights
from tests.training import helpers

ADAM: dict[str, Any] = {"optim": "adamw_torch", "learning_rate": 1e-4, "max_steps": 12}


def dead_scales(bases: Path) -> PeftModel:
    """Scales of three layers fell below zero, as too large a step leaves them."""
    model = helpers.student(bases)
    with torch.no_grad():
        for module, name, _ in trained_weights(model)[4:7]:
            companion(module, name, "_scale").fill_(-1.0)
    return model


def half_precision(bases: Path) -> PeftModel:
    model = helpers.base(bases, dtype=torch.bfloat16)
    config = BitDistillerConfig(bits=2, group_size=32, master_dtype="base")
    return get_bitdistiller_model(model, config, autocast_adapter_dtype=False)


ONE_TOKEN = Dataset.from_dict({"input_ids": [[5] * 20] * 16, "labels": [[5] * 20] * 16})
SEEDED: dict[str, tuple[Any, dict[str, Any]]] = {
    "dead_scales": (dead_scales, {}),
    # steps of one size whatever the gradient's, and about a tenth of the distance of two levels
    "oscillation": (
        lambda bases: helpers.student(bases, learn_scale=False),
        {"learning_rate": 2e-3, "adam_beta1": 0.0, "adam_beta2": 0.5, "max_steps": 9},
    ),
    "learning_rate_lost": (half_precision, {"optim": "sgd", "scale_learning_rate": 1e-3}),
    "no_flips": (helpers.student, {"learning_rate": 1e-9, "scale_learning_rate": 1e-7}),
    "loss_rising": (helpers.student, {"weight_decay": 1000.0, "max_steps": 20}),
    "entropy_collapse": (
        helpers.student,
        {
            "data": ONE_TOKEN,
            "loss_type": "mixture",
            "loss_weights": {"ce": 1.0, "forward_kl": 1e-3},
            "gamma": "estimate",
            "learning_rate": 1e-3,
            "max_steps": 20,
        },
    ),
    "not_finite": (helpers.student, {"optim": "sgd", "learning_rate": 1e30}),
}


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "doctor.json").read_text())


@pytest.mark.parametrize("failure", SEEDED)
def test_exactly_the_seeded_failure_is_found(
    failure: str, bases: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build, changes = SEEDED[failure]
    run = helpers.trainer(build(bases), tmp_path, **ADAM | changes)
    with caplog.at_level(logging.WARNING, "bitdistiller_peft.training.doctor"):
        if failure == "not_finite":
            with pytest.raises(BitDistillerError):
                run.train()
        else:
            run.train()
            assert [finding.name for finding in diagnose(run.state.log_history, run.model)] == [failure]
    (finding,) = report_of(tmp_path)["findings"]
    assert finding["name"] == failure
    assert finding["first_step"] <= finding["last_step"] <= run.state.max_steps
    said = [record.getMessage() for record in caplog.records if ".doctor" in record.name]
    assert len(said) == (1 if failure == "not_finite" else 2), "once when it appears, and once at the end"
    assert str(tmp_path / "doctor.json") in said[-1]


def test_a_healthy_run_has_no_findings(bases: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {**ADAM, "max_steps": 24, "warmup_steps": 4, "lr_scheduler_type": "cosine"}
    run = helpers.trainer(helpers.student(bases), tmp_path, **settings)
    with caplog.at_level(logging.WARNING, "bitdistiller_peft.training.doctor"):
        run.train()
    assert diagnose(run.state.log_history, run.model) == []
    report = report_of(tmp_path)
    assert report["findings"] == []
    assert report["step"] == 24
    assert len(report["layers"]) == 14
    assert set(report["layers"]["model.layers.0.mlp.up_proj.weight"]) == {
        "oscillation", "clamped", "dead_levels", "dead_scales", "scale_drift", "scale_drift_max",
    }  # fmt: skip
    assert not caplog.records


def test_checkpoints_hold_the_report_and_are_whole(bases: Path, tmp_path: Path) -> None:
    from bitdistiller_peft.training.checkpoints import damage_of

    run = helpers.trainer(helpers.student(bases), tmp_path, **ADAM | {"save_strategy": "steps", "save_steps": 6})
    run.train()
    folder = tmp_path / "checkpoint-6"
    assert (folder / "trainer_state.json").is_file()
    assert report_of(folder)["step"] == 6
    manifest = json.loads((folder / "bitdistiller-checkpoint.json").read_text())
    assert "doctor.json" in manifest["files"]
    assert damage_of(folder) is None
    stored = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert stored[-1]["oscillation"] == helpers.history(run, "oscillation")[5]


def test_the_doctor_can_stay_at_home_and_changes_no_weight(bases: Path, tmp_path: Path) -> None:
    watched = helpers.trainer(helpers.student(bases), tmp_path / "a", **ADAM)
    alone = helpers.trainer(helpers.student(bases), tmp_path / "b", doctor=False, **ADAM)
    watched.train()
    alone.train()
    assert helpers.difference(helpers.weights(watched.model), helpers.weights(alone.model)) == 0
    assert not (tmp_path / "b" / "doctor.json").exists()
    assert helpers.history(alone, "oscillation") == []
    assert len(helpers.history(alone, "flip_rate")) == 12


def test_a_second_run_starts_with_a_clean_sheet(bases: Path, tmp_path: Path) -> None:
    run = helpers.trainer(dead_scales(bases), tmp_path, **ADAM | {"max_steps": 4})
    run.train()
    assert [finding["name"] for finding in report_of(tmp_path)["findings"]] == ["dead_scales"]
    with torch.no_grad():
        for module, name, _ in trained_weights(run.model)[4:7]:
            companion(module, name, "_scale").fill_(0.02)
    run.train()
    assert report_of(tmp_path)["findings"] == []


# ------------------------------------------------------------------------------------------------ from a log alone


def log(count: int = 12, **figures: Any) -> list[dict[str, Any]]:
    """A log of equal entries; a list gives one value each, from the end."""
    entries: list[dict[str, Any]] = []
    for index in range(count):
        values = {k: v[index - count] if isinstance(v, list) else v for k, v in figures.items()}
        entries.append({"step": index + 1, "loss": 1.0, "learning_rate": 1e-4, **values})
    return entries


def found(history: list[dict[str, Any]]) -> list[str]:
    return [finding.name for finding in diagnose(history)]


def test_a_log_alone_is_enough() -> None:
    assert found([]) == found(log()) == []
    assert found(log(oscillation=0.5)) == ["oscillation"]
    assert found(log(dead_scales=0.5)) == ["dead_scales"]
    assert found(log(stuck_weights=0.9, flip_rate=0.0)) == ["learning_rate_lost"], "the cause hides the effect"
    assert found(log(loss=[1.0] * 5 + [float("nan")] * 7, oscillation=0.5)) == ["not_finite"]
    assert found(log(entropy=0.1, teacher_entropy=2.0)) == ["entropy_collapse"]
    assert found(log(entropy=0.01, teacher_entropy=0.09)) == [], "a teacher that is sure of itself"


def test_one_bad_look_is_an_accident() -> None:
    assert found(log(oscillation=[0.0] * 11 + [0.5])) == []
    assert found(log(oscillation=[0.5] * 11 + [0.0])) == []
    assert found(log(flip_rate=[0.0] * 7 + [1e-4] + [0.0] * 4)) == []


def test_the_ends_of_a_schedule_are_not_held_against_it() -> None:
    falling = [1e-4 * (12 - i) / 12 for i in range(12)]
    still = [1e-3] * 6 + [0.0] * 6
    assert found(log(learning_rate=falling, flip_rate=still)) == []
    assert found(log(learning_rate=falling, stuck_weights=[0.1] * 6 + [0.9] * 6)) == []
    assert found(log(learning_rate=falling[::-1], flip_rate=still[::-1])) == []
    assert found(log(learning_rate=0.0, flip_rate=0.0)) == [], "nobody asked them to move"


def test_noise_between_batches_is_no_rise() -> None:
    noisy = [0.6, 0.9, 0.5, 0.8, 0.7, 0.9, 0.4, 0.8, 0.6, 0.9, 0.7, 0.5]
    assert found(log(loss=noisy)) == []
    assert found(log(loss=noisy[:7] + [3 * value for value in noisy[7:]])) == ["loss_rising"]
    assert found(log(loss=[1e-9] * 6 + [1e-8] * 6)) == [], "both are nothing"


@pytest.mark.parametrize(("trainable", "expected"), [("all", 1), ("lora", 1), ("quantization", 0)])
def test_codes_are_expected_to_flip_where_weights_are_trained(bases: Path, trainable: str, expected: int) -> None:
    model = helpers.student(bases, trainable=trainable)
    assert len(diagnose(log(flip_rate=0.0), model)) == expected


def test_advice_names_values_that_work() -> None:
    (finding,) = diagnose(log(oscillation=0.5, learning_rate=4e-4))
    assert "learning_rate to 0.0001" in finding.advice
    assert "50.0%" in finding.seen
    assert str(finding).startswith("oscillation (warning): ")
    (finding,) = diagnose(log(flip_rate=0.0, learning_rate=1e-7))
    assert "learning_rate to 1e-05" in finding.advice
