"""Looking ahead adds the error behind the next blocks, in full precision, and changes nothing else."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitdistiller_peft.calibration import blockwise, calibrate
from bitdistiller_peft.calibration.slots import find_student
from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.tuner import full_precision
from tests.calibration.models import ARCHITECTURES, IDS, student

QUICK: dict[str, Any] = {
    "method": "blockwise", "epochs": 3, "learning_rate": 0.02, "batch_size": 2, "show_progress": False,
}  # fmt: skip


def leaving(base: nn.Module, ids: Tensor) -> list[Tensor]:
    """What leaves each block in a pass through the whole model."""
    found: list[Tensor] = []
    with ExitStack() as stack, torch.no_grad():
        for block in base.model.layers:
            hook = block.register_forward_hook(
                lambda m, args, out: found.append(out if torch.is_tensor(out) else out[0])
            )
            stack.callback(hook.remove)
        base(input_ids=ids)
    return found


def error(one: Tensor, other: Tensor) -> Tensor:
    """Mean squared difference of hidden states over their root mean square, token by token."""
    one, other = (states / (states.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() for states in (one, other))
    return (one - other).pow(2).mean()


@pytest.mark.parametrize("depth", [0, 1, 5])
def test_the_loss_is_the_error_of_the_block_and_that_behind_the_next(
    depth: int, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = student(models)
    base = find_student(model)[0]
    batch = IDS[:2]
    with full_precision(base):
        wanted = leaving(base, batch)
    losses: list[tuple[float, float]] = []

    def fit(name: str, block: nn.Module, slots: Any, loss: Any, options: Any, steps: int) -> None:
        place = len(losses)
        others = [other for number, other in enumerate(base.model.layers) if number > place]
        with ExitStack() as stack:
            for other in others:
                stack.enter_context(full_precision(other))
            got = leaving(base, batch)
        behind = range(place, min(place + depth, len(wanted) - 1) + 1)
        expected = {error(got[place], wanted[place])} | {error(got[n], wanted[n]) for n in behind[-1:] if n > place}
        losses.append((float(loss(0).detach()), float(sum(expected))))

    monkeypatch.setattr(blockwise, "fit", fit)
    monkeypatch.setattr(blockwise, "multiplies_bf16", lambda device: False)
    calibrate(model, None, batch, **QUICK, look_ahead=depth, clip_search=False)
    assert len(losses) == 2
    for ours, expected in losses:
        assert ours == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_only_the_block_at_work_is_trained(name: str, models: Path) -> None:
    model = student(models, name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    flags = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    result = calibrate(model, None, IDS, **QUICK, look_ahead=1)
    for report in result.blocks:
        assert report.error_after < report.error_before
    assert flags == {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    assert all(parameter.grad is None for parameter in model.parameters())
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed
    assert all(".bitdistiller_" in key for key in changed)


def test_it_helps_behind_the_next_block(models: Path) -> None:
    errors = []
    for depth in (0, 1):
        model = student(models)
        base = find_student(model)[0]
        with full_precision(base):
            wanted = leaving(base, IDS)
        calibrate(model, None, IDS, **{**QUICK, "epochs": 10}, look_ahead=depth)
        with full_precision(base.model.layers[1]):
            errors.append(float(error(leaving(base, IDS)[1], wanted[1])))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("value", [-1, 1.0, True, "1"])
def test_depths_that_are_none_are_refused(value: Any, models: Path) -> None:
    with pytest.raises(ConfigError, match="look_ahead"):
        calibrate(student(models), None, IDS, **QUICK, look_ahead=value)
