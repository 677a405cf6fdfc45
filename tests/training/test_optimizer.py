"""Scales and zero points have learning rates of their own, and no weight decay; weights are quantized once per step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bitdistiller_peft import use_backend
from bitdistiller_peft.layers import iter_quantized
from bitdistiller_peft.layers.kept import KEPT
from bitdistiller_peft.quantizers import Sweeps
from tests.training import helpers

STUDENT = {"learn_zero_point": True}


def groups(run: helpers.DistillTrainer) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of every parameter, by name."""
    optimizer = run.create_optimizer()
    of = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    return {name: of[id(p)] for name, p in run.model.named_parameters() if p.requires_grad}


def test_each_kind_of_parameter_has_its_rate(bases: Path, tmp_path: Path) -> None:
    run = helpers.trainer(
        helpers.student(bases, **STUDENT),
        tmp_path,
        learning_rate=1e-4,
        weight_decay=0.1,
        scale_learning_rate=1e-3,
        zero_point_learning_rate=1e-2,
    )
    found = {name.rpartition(".")[2]: value for name, value in groups(run).items()}
    assert found == {"weight": (1e-4, 0.1), "weight_scale": (1e-3, 0.0), "weight_zero_point": (1e-2, 0.0)}


def test_both_scales_of_a_signed_grid_have_the_scales_rate(bases: Path, tmp_path: Path) -> None:
    run = helpers.trainer(helpers.student(bases, grid="nf", bits=3), tmp_path, scale_learning_rate=1e-3)
    found = {name.rpartition(".")[2]: value[0] for name, value in groups(run).items()}
    assert found == {"weight": 0.01, "weight_scale": 1e-3, "weight_scale_negative": 1e-3}


@pytest.mark.parametrize("rate", [1e-3, None])
@pytest.mark.parametrize(("grid", "bits", "share"), [("int", 2, 3 / 255), ("int_fine", 3, 7 / 255), ("nf", 3, 2 / 255)])
def test_scales_of_finer_tables_move_outermost_levels_by_no_more_code_steps(
    bases: Path, tmp_path: Path, grid: str, bits: int, share: float, rate: float | None
) -> None:
    model = helpers.student(bases, grid=grid, bits=bits, embedding_bits=8)
    found = groups(helpers.trainer(model, tmp_path, scale_learning_rate=rate, weight_decay=0.1))
    of_tables = {name: value for name, value in found.items() if "embed" in name}
    usual = rate or 0.01
    assert {value for name, value in found.items() if "_scale" in name and name not in of_tables} == {(usual, 0.0)}
    scales = [value for name, value in of_tables.items() if "_scale" in name]
    assert scales == [(pytest.approx(usual * share**2), 0.0)]
    assert {value for name, value in of_tables.items() if name.endswith("weight")} == {(0.01, 0.1)}


def test_without_rates_of_their_own_they_follow_the_weights_but_do_not_decay(bases: Path, tmp_path: Path) -> None:
    run = helpers.trainer(helpers.student(bases, **STUDENT), tmp_path, weight_decay=0.1)
    found = {name.rpartition(".")[2]: value for name, value in groups(run).items()}
    assert found == {"weight": (0.01, 0.1), "weight_scale": (0.01, 0.0), "weight_zero_point": (0.01, 0.0)}


def test_the_logged_rate_is_that_of_the_weights(bases: Path, tmp_path: Path) -> None:
    run = helpers.trainer(helpers.student(bases), tmp_path, scale_learning_rate=1e-4)
    run.train()
    assert helpers.history(run, "learning_rate") == [0.01, 0.01]


def test_a_rate_of_zero_freezes(bases: Path, tmp_path: Path) -> None:
    model = helpers.student(bases)
    before = helpers.weights(model)
    helpers.trainer(model, tmp_path, scale_learning_rate=0.0).train()
    for name, value in helpers.weights(model).items():
        assert bool((value == before[name]).all()) == name.endswith("_scale"), name


def test_the_schedule_reaches_every_group(bases: Path, tmp_path: Path) -> None:
    run = helpers.trainer(
        helpers.student(bases), tmp_path, scale_learning_rate=1e-3, lr_scheduler_type="linear", max_steps=4
    )
    run.train()
    assert {group["lr"] for group in run.optimizer.param_groups} == {0.0}


@pytest.mark.parametrize("optim", ["adamw_8bit", "lion_8bit", "lion_32bit"])
def test_optimizers_of_bitsandbytes_have_our_groups_too(bases: Path, tmp_path: Path, optim: str) -> None:
    run = helpers.trainer(
        helpers.student(bases, **STUDENT), tmp_path, optim=optim, learning_rate=1e-4, weight_decay=0.1,
        scale_learning_rate=1e-3, zero_point_learning_rate=0.0, max_steps=1,
    )  # fmt: skip
    before = helpers.weights(run.model)
    run.train()
    assert "bitsandbytes" in type(run.optimizer.optimizer).__module__
    moved = {name: float((value - before[name]).abs().max()) for name, value in helpers.weights(run.model).items()}
    for name, distance in moved.items():
        rate = {"weight": 1e-4, "weight_scale": 1e-3, "weight_zero_point": 0.0}[name.rpartition(".")[2]]
        # a sign or Adam step is as long as the rate; decay of 1e-5 and rounding come on top
        assert distance == pytest.approx(rate, rel=0.05, abs=1e-9), name


def test_only_large_tensors_have_8_bit_states(bases: Path, tmp_path: Path) -> None:
    run = helpers.trainer(helpers.student(bases), tmp_path, optim="adamw_8bit", max_steps=1)
    run.train()
    states = run.optimizer.optimizer.state
    for name, parameter in run.model.named_parameters():
        if parameter.requires_grad:
            is_narrow = states[parameter]["state1"].dtype == torch.uint8
            assert is_narrow == (parameter.numel() >= 4096), name


# ------------------------------------------------------------------------------------------------- quantizing once


def quantized_in(bases: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[int, dict]:
    """How often a layer was quantized in a step of its student, and what the step made of the weights."""
    calls: list[int] = []
    original = Sweeps.values

    def values(self: Sweeps, *args: Any) -> torch.Tensor:
        calls.append(1)
        return original(self, *args)

    monkeypatch.setattr(Sweeps, "values", values)
    model = helpers.student(bases)
    run = helpers.trainer(model, folder, per_device_train_batch_size=2, max_steps=2, log_flip_rate=False, doctor=False,
                          **changes)  # fmt: skip
    with use_backend("reference"):
        calls.clear()
        run.train()
    layers = len(list(iter_quantized(model)))
    assert len(calls) % layers == 0
    assert not any(KEPT in module.__dict__ for module in model.modules())
    return len(calls) // layers, helpers.weights(model)


@pytest.mark.parametrize(
    ("changes", "plainly"),
    [
        ({"gradient_accumulation_steps": 4}, 8),
        ({"gradient_checkpointing": True}, 4),
        ({"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "optim": "adamw_torch"}, 8),
    ],
)
def test_weights_are_quantized_once_per_step(
    changes: dict[str, Any], plainly: int, bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    often, wanted = quantized_in(bases, tmp_path / "often", monkeypatch, quantize_once=False, **changes)
    once, got = quantized_in(bases, tmp_path / "once", monkeypatch, **changes)
    assert (often, once) == (plainly, 2)
    assert helpers.difference(got, wanted) == 0


def test_an_optimizer_that_writes_past_the_version_counters_is_followed(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"optim": "adamw_bnb_8bit", "gradient_accumulation_steps": 2, "learning_rate": 0.01}
    _, wanted = quantized_in(bases, tmp_path / "often", monkeypatch, quantize_once=False, **changes)
    _, got = quantized_in(bases, tmp_path / "once", monkeypatch, **changes)
    assert helpers.difference(got, wanted) == 0
