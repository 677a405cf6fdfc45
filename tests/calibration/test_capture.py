"""Gram matrices are those of the activations, and stages are what reads the same tensor, in the order it is reached."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bitdistiller_peft.calibration.blocks import run_model
from bitdistiller_peft.calibration.capture import Gram, Stage, capture, find_stages
from bitdistiller_peft.calibration.slots import Slot, find_student
from tests.calibration.models import IDS, student


def test_gram_matrices_add_up_over_batches(generator: torch.Generator) -> None:
    inputs = torch.randn(7, 5, 64, generator=generator)
    gram = Gram(16)
    for part in inputs.split([3, 4]):
        gram.add(part)
    gram.add(torch.empty(0, 64))
    groups = inputs.double().reshape(35, 4, 16)
    expected = torch.einsum("tgi,tgj->gij", groups, groups) / 35
    mean = gram.mean()
    assert mean is not None
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean.double(), expected, rtol=1e-5, atol=1e-6)
    assert gram.tokens == 35
    assert Gram(16).mean() is None


def stages_of(folder: Path, name: str) -> tuple[list[list[str]], list[Slot]]:
    base, slots = find_student(student(folder, name))
    first = [slot for slot in slots if ".0." in slot.name]
    with torch.no_grad():
        stages, unseen = find_stages([*first[::-1]], lambda _: run_model(base, IDS))
    short = [[s.name.partition(".0.")[2].replace(".weight", "") for s in stage.slots] for stage in stages]
    return [sorted(names) for names in short], unseen


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "llama",
            [
                ["self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"],
                ["self_attn.o_proj"],
                ["mlp.gate_proj", "mlp.up_proj"],
                ["mlp.down_proj"],
            ],
        ),
        ("gpt2", [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]]),
        (
            "mixtral",
            [
                ["self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"],
                ["self_attn.o_proj"],
                ["mlp.experts.gate_up_proj"],
                ["mlp.experts.down_proj"],
            ],
        ),
    ],
)
def test_layers_that_read_the_same_tensor_share_a_stage(name: str, expected: list[list[str]], models: Path) -> None:
    stages, unseen = stages_of(models, name)
    if name == "mixtral":  # the slots came in reverse, and so did the two parameters of one module
        stages[2:] = stages[2:][::-1]
    assert stages == expected
    assert not unseen


@torch.no_grad()
def test_a_pass_ends_at_its_stage(models: Path) -> None:
    base, slots = find_student(student(models))
    stages, _ = find_stages(slots, lambda _: run_model(base, IDS))
    reached: list[str] = []
    for slot in slots:
        slot.layer.register_forward_hook(lambda *_, name=slot.name: reached.append(name))
    capture([stages[1]], lambda _: run_model(base, IDS), 1, stop=True)
    assert [name.rpartition("_proj")[0][-1] for name in reached] == ["q", "k", "v"]
    assert stages[1].grams[32][0].tokens == IDS.numel()


@torch.no_grad()
def test_every_expert_gets_the_gram_of_its_own_inputs(models: Path) -> None:
    base, slots = find_student(student(models, "mixtral"))
    by_name = {slot.name: slot for slot in slots}
    gate_up, down = (by_name[f"model.layers.0.mlp.experts.{name}_proj"] for name in ("gate_up", "down"))
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    handle = gate_up.layer.register_forward_pre_hook(lambda module, args: calls.append(args))
    run_model(base, IDS)
    handle.remove()
    hidden, indices, _ = calls[0]
    stages = [Stage([gate_up]), Stage([down])]
    capture(stages, lambda _: run_model(base, IDS), 1, stop=False)
    assert "forward" not in gate_up.layer.__dict__
    weights = gate_up.student()
    for expert in range(4):
        own = hidden[(indices == expert).any(-1)]
        gate, up = F.linear(own, weights[expert]).chunk(2, -1)
        inner = F.silu(gate) * up
        for stage, inputs in zip(stages, (own, inner), strict=True):
            gram = Gram(32)
            gram.add(inputs)
            found, expected = stage.grams[32][expert].mean(), gram.mean()
            assert found is not None
            assert expected is not None
            torch.testing.assert_close(found, expected)
            assert stage.grams[32][expert].tokens == len(own)


@torch.no_grad()
def test_inputs_are_those_behind_the_norm_that_the_student_puts_there(models: Path) -> None:
    base, slots = find_student(student(models, subln="all"))
    random = torch.Generator().manual_seed(0)
    for slot in slots:
        slot.layer.input_norm("default").weight.uniform_(0.5, 2, generator=random)
    queries, keys = slots[:2]
    caught: list[Tensor] = []
    queries.layer.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    stages, _ = find_stages([queries, keys], lambda _: run_model(base, IDS))
    assert [stage.slots for stage in stages] == [[queries], [keys]]
    capture(stages, lambda _: run_model(base, IDS), 1, stop=False)
    for stage in stages:
        gram = Gram(32)
        gram.add(stage.slots[0].layer.input_norm("default")(caught[0]))
        found, expected = stage.grams[32][0].mean(), gram.mean()
        assert found is not None
        assert expected is not None
        torch.testing.assert_close(found, expected)
