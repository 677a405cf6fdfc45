"""One word says where the teacher lives; in fewer bits or in main memory, it says (nearly) the same."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig

from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.training import DistillTrainer, placement
from bitdistiller_peft.training.forward import logits_of
from tests import tiny
from tests.training import helpers


def trainer(bases: Path, folder: Path, model: nn.Module | None = None, **changes: Any) -> DistillTrainer:
    return DistillTrainer(
        helpers.student(bases) if model is None else model,
        helpers.config(folder, **changes),
        train_dataset=helpers.dataset(),
        processing_class=helpers.tokenizer(),
    )


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mixtral"])
def test_an_offloaded_teacher_says_exactly_the_same(bases: Path, tmp_path: Path, name: str) -> None:
    folder = tiny.save_base(name, bases)
    separate = trainer(bases, tmp_path / "a", tiny_student(bases, name), teacher=str(folder))
    offloaded = trainer(bases, tmp_path / "b", tiny_student(bases, name), teacher="offload")
    assert offloaded.teacher.description == f"{folder} (offloaded)"
    layers = [p for n, p in offloaded.teacher.model.named_parameters() if ".layers." in n]
    assert all(p.is_meta for p in layers)  # nothing of the layers stays on the device
    for run in (separate, offloaded):
        run.train()
    assert helpers.history(offloaded) == helpers.history(separate)


def tiny_student(bases: Path, name: str) -> nn.Module:
    config = helpers.BitDistillerConfig(bits=2, group_size=32)
    return helpers.get_bitdistiller_model(tiny.load(tiny.save_base(name, bases)), config)


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.05), (4, 0.5)])
def test_a_teacher_in_few_bits_says_nearly_the_same(bases: Path, tmp_path: Path, bits: int, bound: float) -> None:
    pytest.importorskip("bitsandbytes")
    settings = {"teacher_init_kwargs": {"load_in_4bit": True}} if bits == 4 else {}
    run = trainer(bases, tmp_path, teacher="quantized", **settings)
    assert run.teacher.description.endswith(f"(in {bits} bits)")
    tokens = tiny.token_ids()
    full = tiny.load(tiny.save_base("llama", bases))(input_ids=tokens).logits.detach()
    got = logits_of(run.teacher({"input_ids": tokens})).view_as(full)
    assert 0 < float((got - full).norm() / full.norm()) < bound
    run.train()
    assert all(torch.isfinite(torch.tensor(helpers.history(run))))


def test_another_model_can_be_named_behind_the_placement(bases: Path, tmp_path: Path) -> None:
    other = tiny.save_base("llama", bases, seed=1)
    run = trainer(bases, tmp_path, teacher=f"offload:{other}")
    assert run.teacher.description == f"{other} (offloaded)"


def test_a_base_without_a_name_asks_for_one(bases: Path, tmp_path: Path) -> None:
    model = helpers.student(bases)
    model.get_base_model().config._name_or_path = ""
    with pytest.raises(ConfigError, match="Use 'offload:PATH'"):
        trainer(bases, tmp_path, model, teacher="offload")


def test_without_bitsandbytes_the_alternatives_are_named(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(ConfigError, match="pip install bitsandbytes, or use 'self' or 'cached'"):
        trainer(bases, tmp_path, teacher="quantized")


@pytest.mark.parametrize("kind", ["quantized", "offload"])
def test_neither_is_for_fsdp(bases: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(bases, tmp_path)
    state = type("State", (), {"fsdp_plugin": object()})()
    accelerator = type("Sharded", (), {"state": state, "device": torch.device("cpu")})()
    with pytest.raises(ConfigError, match=f"must not be '{kind}' under FSDP"):
        placement.build_teacher(kind, run.model, accelerator, run.args)


def test_what_is_for_bitsandbytes_goes_into_its_config(bases: Path, tmp_path: Path) -> None:
    accelerator = trainer(bases, tmp_path).accelerator
    kwargs = placement._in_few_bits({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "dtype": "auto"}, accelerator)
    config = kwargs.pop("quantization_config")
    assert isinstance(config, BitsAndBytesConfig)
    assert config.load_in_4bit
    assert config.bnb_4bit_quant_type == "nf4"
    assert not config.load_in_8bit
    assert kwargs == {"dtype": "auto", "device_map": {"": torch.device("cpu")}}
