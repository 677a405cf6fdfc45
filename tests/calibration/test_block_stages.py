"""Options inside a block: stages, soft rounding and progressive widths do what they say, and leave a proper student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitdistiller_peft.calibration import CalibrationResult, blockwise, calibrate
from bitdistiller_peft.calibration.block_training import other_bits, stages_of
from bitdistiller_peft.calibration.options import BlockwiseOptions
from bitdistiller_peft.calibration.slots import find_student
from bitdistiller_peft.calibration.soft_rounding import COLDEST, SoftRounding
from bitdistiller_peft.errors import ConfigError
from tests.calibration.models import IDS, student

QUICK = {"method": "blockwise", "epochs": 4, "learning_rate": 0.02, "show_progress": False}
GSQ = (("q_proj", "k_proj"), ("v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj"))


def run(model: torch.nn.Module, **options: Any) -> CalibrationResult:
    return calibrate(model, None, IDS, **{**QUICK, **options})


def endings(stage: list[Any]) -> set[str]:
    return {slot.layer_name.rpartition(".")[2] for slot in stage}


@pytest.mark.parametrize("stages", [GSQ, "order", (("down_proj",),)])
def test_each_stage_trains_its_layers_alone(stages: Any, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[set[str], dict[str, Tensor], dict[str, Tensor]]] = []
    original = blockwise.fit

    def fit(name: str, block: Any, slots: Any, loss: Any, options: Any, steps: int) -> None:
        inside = [slot for slot in find_student(model)[1] if slot.name.startswith(f"{name}.")]
        shown = {slot.name: slot.student().detach().clone() for slot in inside}
        rounded = {slot.name: type(slot.student).forward(slot.student).detach() for slot in inside}
        before = {slot.name: slot.weight.clone() for slot in inside}
        original(name, block, slots, loss, options, steps)
        mine = {slot.name for slot in slots}
        assert {slot.name for slot in inside if not torch.equal(slot.weight, before[slot.name])} == mine
        later = {slot.name for slot in inside if torch.equal(shown[slot.name], slot.weight)} - mine
        assert all(torch.equal(shown[n], rounded[n]) for n in before if n not in later)
        seen.append((endings(slots), later, before))

    model = student(models)
    monkeypatch.setattr(blockwise, "fit", fit)
    result = run(model, stages=stages)
    assert all(block.error_after < block.error_clipped for block in result.blocks)
    layers = {name for trained, *_ in seen for name in trained}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    if stages == GSQ:
        assert [trained for trained, *_ in seen[:3]] == [set(names) for names in GSQ]
        assert [len(later) for _, later, _ in seen[:3]] == [5, 3, 0]
    if stages == "order":
        assert [trained for trained, *_ in seen[:4]] == [
            {"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"},
        ]  # fmt: skip


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_the_order_is_found_on_other_decoders(name: str, models: Path) -> None:
    result = run(student(models, name), stages="order")
    assert all(block.error_after < block.error_clipped for block in result.blocks)


def test_layers_that_no_stage_names_are_trained_in_the_last(models: Path) -> None:
    _, slots = find_student(student(models))
    stages = stages_of(slots[:7], BlockwiseOptions(stages=(("q_proj",), ("q_proj", "k_proj"))), lambda index: None)
    assert [endings(stage) for stage in stages] == [
        {"q_proj"}, {"k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    ]  # fmt: skip


SOFT = [{"grid": "int_sym"}, {"learn_zero_point": True}, {"grid": "int_fine", "learn_zero_point": True}]


@pytest.mark.parametrize("config", [{}, *SOFT, {"group_size": "tensor"}], ids=str)
def test_soft_rounding_ends_hard(config: dict[str, Any], models: Path) -> None:
    model = student(models, **config)
    result = run(model, rounding="soft", epochs=8, rounding_learning_rate=0.2)
    assert all(block.error_after < block.error_clipped for block in result.blocks)
    for slot in find_student(model)[1]:
        assert "forward" not in slot.student.__dict__
        torch.testing.assert_close(slot.student(), slot.weight, rtol=1e-5, atol=1e-7)  # on their levels


def test_a_soft_weight_starts_at_its_value_and_ends_at_its_code(models: Path) -> None:
    slot = find_student(student(models))[1][0]
    hard = slot.student().detach()
    with SoftRounding([slot]) as soft:
        started = (slot.student() - slot.weight).abs() < 0.02 * slot.step_size()
        assert started.float().mean() > 0.85  # the others lie beyond the outermost levels
        soft.anneal(1.0)
        assert soft.temperature == COLDEST
        near = (slot.student() - hard).abs() < 0.01 * slot.step_size()
        assert near.float().mean() > 0.9
    soft.harden()
    torch.testing.assert_close(slot.student(), hard, rtol=1e-5, atol=1e-7)


def test_soft_rounding_trains_choices_and_no_weights(models: Path) -> None:
    slot = find_student(student(models))[1][0]
    with SoftRounding([slot]) as soft:
        slot.student().square().sum().backward()
        assert slot.student.weight.grad is None
        assert slot.student.weight_scale.grad is not None
        (logit,) = soft.groups(0.1)[0]["params"]
        assert logit.grad.abs().sum() > 0


def test_progressive_widths_come_first_and_leave_the_spec(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = blockwise.fit

    def fit(name: str, block: Any, slots: Any, *rest: Any) -> None:
        seen.append(slots[0].spec.grid.bits)
        original(name, block, slots, *rest)

    monkeypatch.setattr(blockwise, "fit", fit)
    model = student(models, zero_point_range=(1, 2))
    specs = [slot.spec for slot in find_student(model)[1]]
    result = run(model, progressive_bits=(8, 4))
    assert seen == [8, 4, 2] * 2
    assert [slot.spec for slot in find_student(model)[1]] == specs
    assert all(block.error_after < block.error_before for block in result.blocks)
    assert not torch.equal(find_student(student(models))[1][0].weight, find_student(model)[1][0].weight)


def test_layers_with_more_bits_are_left_out_of_a_finer_stage(models: Path) -> None:
    _, slots = find_student(student(models, overrides={"q_proj": {"bits": 8}}))
    with other_bits(slots[:7], 4) as finer:
        assert "q_proj" not in endings(finer)
        assert {slot.spec.grid.bits for slot in finer} == {4}
    assert {slot.spec.grid.bits for slot in slots[:7]} == {2, 8}


def test_an_interrupted_finer_stage_gives_the_spec_back(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = student(models)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(blockwise, "fit", stop)
    with pytest.raises(KeyboardInterrupt):
        run(model, progressive_bits=(4,))
    assert {slot.spec.grid.bits for slot in find_student(model)[1]} == {2}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({}, {"stages": (("q_prj",),)}, "q_prj"),
        ({}, {"stages": ("q_proj",)}, "stages"),
        ({}, {"stages": ()}, "stages"),
        ({}, {"progressive_bits": (4, 8)}, "progressive_bits"),
        ({}, {"progressive_bits": (5,)}, "progressive_bits"),
        ({"grid": "nf"}, {"rounding": "soft"}, "rounding"),
        ({"learn_scale": False}, {"rounding": "soft"}, "rounding"),
        ({}, {"device": "elsewhere"}, "device"),
        ({}, {"rounding_learning_rate": -1.0}, "rounding_learning_rate"),
    ],
)
def test_what_does_not_suit_is_refused(
    config: dict[str, Any], options: dict[str, Any], message: str, models: Path
) -> None:
    model = student(models, **config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError, match=message):
        run(model, **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("depth", [0, 1])
def test_a_block_at_work_is_elsewhere_and_comes_back(depth: int, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a second device: what is sent there and back is watched, and changes nothing."""
    moves: list[tuple[str, str]] = []

    class Elsewhere(torch.nn.Module):
        """Notes where a block is sent."""

        def to(self, device: torch.device) -> Any:
            moves.append((type(self).__name__, str(device)))
            return self

    plain, moved = student(models), student(models)
    run(plain, look_ahead=depth)
    base, _ = find_student(moved)
    block = type(base.model.layers[0])
    monkeypatch.setattr(block, "to", Elsewhere.to)
    run(moved, device="cpu:0", look_ahead=depth)  # not equal to "cpu", and the same
    there, back = (block.__name__, "cpu:0"), (block.__name__, "cpu")
    assert moves == [*[there] * (1 + depth), *[back] * (1 + depth), there, back]  # nothing is behind the last
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), moved.parameters(), strict=True))
