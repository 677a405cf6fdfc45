"""The divergence of a layer is that of the model with this layer quantized, or all others; nothing is left changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bitdistiller_peft.errors import StateError, UnknownNameError
from bitdistiller_peft.training.doctor import divergence_by_layer
from tests import tiny
from tests.training import helpers

IDS = tiny.token_ids(2, 9)


def textbook_kl(student: torch.Tensor, teacher: torch.Tensor) -> float:
    p, q = (logits[:, :-1].double().log_softmax(-1) for logits in (teacher, student))
    return float((p.exp() * (p - q)).sum(-1).mean())


@torch.no_grad()
def test_one_layer_quantized_is_the_base_model_with_that_weight_replaced(bases: Path) -> None:
    model = helpers.student(bases)
    found = divergence_by_layer(model, IDS)
    assert len(found) == 14
    name = "model.layers.1.mlp.down_proj"
    layer = model.get_submodule(f"base_model.model.{name}")
    plain = helpers.base(bases)
    teacher = plain(IDS).logits
    plain.get_submodule(name).weight.copy_(layer.active_student("weight")())
    assert found[name] == pytest.approx(textbook_kl(plain(IDS).logits, teacher), rel=1e-4)


@torch.no_grad()
def test_all_but_one_takes_one_layer_back(bases: Path) -> None:
    model = helpers.student(bases)
    found = divergence_by_layer(model, IDS, quantized="all_but_one")
    name = "model.layers.0.self_attn.q_proj"
    layer = model.get_submodule(f"base_model.model.{name}")
    with model.disable_adapter():
        teacher = model(IDS).logits
    layer.enable_adapters(False)
    assert found[name] == pytest.approx(textbook_kl(model(IDS).logits, teacher), rel=1e-4)
    layer.enable_adapters(True)
    whole = textbook_kl(model(IDS).logits, teacher)
    assert sum(value < whole for value in found.values()) > 7, "most layers cost something"


def test_blocks_and_several_batches(bases: Path) -> None:
    model = helpers.student(bases)
    both = divergence_by_layer(model, [IDS, IDS], by="block")
    assert list(both) == ["model.layers.0", "model.layers.1"]
    assert both == pytest.approx(divergence_by_layer(model, IDS, by="block"))
    layers = divergence_by_layer(model, IDS)
    assert both["model.layers.0"] > layers["model.layers.0.mlp.down_proj"]


def test_the_student_is_given_back_as_it_was(bases: Path) -> None:
    model = helpers.student(bases).train()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with torch.no_grad():
        before = model(IDS).logits
    for quantized in ("one", "all_but_one"):
        divergence_by_layer(model, IDS, quantized=quantized)
    assert model.training
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, before)


def test_what_cannot_be_measured_is_refused(bases: Path) -> None:
    with pytest.raises(StateError, match="must have quantized layers in force"):
        divergence_by_layer(helpers.base(bases), IDS)
    with pytest.raises(UnknownNameError, match="all_but_one"):
        divergence_by_layer(helpers.student(bases), IDS, quantized="all_but_on")
