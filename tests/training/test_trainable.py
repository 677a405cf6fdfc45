"""Scales alone, or a low-rank update inside the rounding, through the trainer: what moves, stays and is resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.training import helpers

CHOICES = {"quantization": {"_scale"}, "lora": {"_scale", "_lora_A", "_lora_B"}}


def state(run: object) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in run.model.named_parameters() if "bitdistiller_" in name}


@pytest.mark.parametrize("choice", CHOICES)
def test_only_what_was_chosen_moves(choice: str, bases: Path, tmp_path: Path) -> None:
    run = helpers.trainer(helpers.student(bases, trainable=choice, lora_rank=4), tmp_path, learning_rate=0.1)
    before = state(run)
    run.train()
    moved = {name for name, value in state(run).items() if not torch.equal(value, before[name])}
    assert {name.rpartition("weight")[2] for name in moved} == CHOICES[choice]
    names = {name for name, p in run.model.named_parameters() if p.requires_grad}
    in_optimizer = sum(p.numel() for group in run.optimizer.param_groups for p in group["params"])
    assert in_optimizer == sum(p.numel() for name, p in run.model.named_parameters() if name in names)
    assert run.state.log_history[0]["flip_rate"] > 0


@pytest.mark.parametrize("choice", CHOICES)
def test_a_resumed_run_ends_the_same(choice: str, bases: Path, tmp_path: Path) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    whole = helpers.trainer(helpers.student(bases, trainable=choice), tmp_path / "a", **settings)
    whole.train()
    torch.manual_seed(1)  # other factors than those that the checkpoint holds
    again = helpers.trainer(helpers.student(bases, trainable=choice), tmp_path / "a", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    expected = state(whole)
    assert all(torch.equal(value, expected[name]) for name, value in state(again).items())
