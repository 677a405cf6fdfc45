"""Activations may leave between forward and backward: whatever keeps them for us, the gradients are the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from bitdistiller_peft.errors import ConfigError
from tests.training import helpers


@pytest.mark.parametrize("trainable", ["all", "lora"])
def test_a_step_is_the_same_where_saved_tensors_are_taken_away(bases: Path, tmp_path: Path, trainable: str) -> None:
    found, kept = [], []

    def away(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor.clone()

    for is_offloaded in (False, True):
        torch.manual_seed(0)
        run = helpers.trainer(helpers.student(bases, trainable=trainable), tmp_path, gradient_accumulation_steps=2)
        if is_offloaded:  # what TRL does on a GPU with activation_offloading=True: the same hooks, another device
            run.maybe_activation_offload_context = saved_tensors_hooks(away, lambda tensor: tensor)
        run.train()
        found.append(helpers.weights(run.model))
    assert len(kept) > 100
    assert helpers.difference(*found) == 0.0


def test_there_is_nothing_to_offload_on_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`activation_offloading` is not supported: got activation_offloading=True"):
        helpers.config(tmp_path, activation_offloading=True)
