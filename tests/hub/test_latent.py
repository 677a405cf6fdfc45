"""The second route: float master weights under fake quantization, ordinary checkpoints, and a plain `Trainer`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from bitdistiller_peft import BitDistillerQuantConfig, pack_latent
from bitdistiller_peft.errors import CheckpointError, StateError, WeightError
from bitdistiller_peft.hub import MANIFEST_NAME
from bitdistiller_peft.layers import SUFFIXES, FakeQuantExperts, FakeQuantLinear, iter_quantized
from tests.hub.models import WEIGHTS, assert_same_state, edit_tensors, logits, make_student
from tests.tiny import CONFIGS, VOCAB, load, save_base


class Texts(Dataset):
    """Eight random sequences."""

    def __init__(self) -> None:
        self.ids = torch.randint(3, VOCAB, (8, 9), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def load_latent(arch: str, bases: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    config = BitDistillerQuantConfig(state="latent", **{"group_size": 32, **settings})
    return load(save_base(arch, bases, dtype=dtype), quantization_config=config)


def train(model: nn.Module, folder: Path, *, steps: int, resume: bool = False) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Texts())
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    return trainer


@pytest.mark.parametrize("arch", CONFIGS)
def test_parameters_start_from_min_max_and_survive_saving(bases: Path, arch: str, tmp_path: Path) -> None:
    """G20: what the full-precision checkpoint lacks is made from its weights, and is not uninitialised memory."""
    model = load_latent(arch, bases, group_size=-1)
    student = make_student(arch, bases, group_size=-1, steps=0)
    overlays = {name: module for name, module, _, _ in iter_quantized(student.base_model.model)}
    assert len(list(iter_quantized(model))) == len(overlays) > 0
    for name, module, parameter, _ in iter_quantized(model):
        expected = overlays[f"{name}.bitdistiller_{parameter}.default"]
        for suffix in ("", *SUFFIXES):
            found, theirs = getattr(module, parameter + suffix, None), getattr(expected, "weight" + suffix, None)
            assert (found is None) == (theirs is None)
            assert found is None or torch.equal(found, theirs), f"{name}.{parameter}{suffix}"
    assert torch.equal(logits(model), logits(student))
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert_same_state(again, model)
    assert torch.equal(logits(again), logits(model))
    assert sum(isinstance(m, (FakeQuantLinear, FakeQuantExperts)) for m in again.modules()) > 0


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        ({}, {"", "_scale"}),
        ({"learn_zero_point": True}, {"", "_scale", "_zero_point"}),
        ({"learn_scale": False}, {""}),
        ({"grid": "nf", "bits": 3}, {"", "_scale", "_scale_negative"}),
        ({"grid": "r2q", "refine": "least_squares"}, {"", "_scale", "_scale_residual"}),
        ({"grid": "ternary"}, {"", "_scale"}),
    ],
    ids=["scale", "zero-point", "nothing", "both-scales", "residual-scale", "ternary"],
)
def test_what_the_config_says_is_trained_and_nothing_else_of_the_quantizer(
    bases: Path, settings: dict[str, Any], trained: set[str], tmp_path: Path
) -> None:
    load_latent("llama", bases, **settings).save_pretrained(tmp_path)
    for model in (load_latent("llama", bases, **settings), load(tmp_path)):
        for _, module, name, spec in iter_quantized(model):
            for suffix in ("", *SUFFIXES):
                tensor = getattr(module, name + suffix, None)
                assert bool(tensor is not None and tensor.requires_grad) == (suffix in trained)
            assert (spec.grid.name, spec.grid.bits) == (settings.get("grid", "int"), settings.get("bits", 2))


def test_a_plain_trainer_trains_and_resumes_as_if_it_had_never_stopped(bases: Path, tmp_path: Path) -> None:
    """The quantizer says that it is trainable, in general and under fake quantization; `Trainer` asks for both."""
    start = load_latent("llama", bases)
    unbroken = load_latent("llama", bases)
    train(unbroken, tmp_path / "unbroken", steps=4)
    train(load_latent("llama", bases), tmp_path / "broken", steps=2)
    resumed = load_latent("llama", bases)
    trainer = train(resumed, tmp_path / "broken", steps=4, resume=True)
    assert trainer.state.global_step == 4
    assert_same_state(resumed, unbroken)
    before, after = start.state_dict(), resumed.state_dict()
    name = "model.layers.1.mlp.down_proj.weight"
    assert not torch.equal(before[name], after[name])
    assert not torch.equal(before[f"{name}_scale"], after[f"{name}_scale"])
    checkpoint = tmp_path / "broken" / "checkpoint-4"
    assert (checkpoint / MANIFEST_NAME).is_file()
    assert_same_state(load(checkpoint), resumed)


def test_experts_resume_in_a_model_that_is_loaded_from_the_checkpoint(bases: Path, tmp_path: Path) -> None:
    """`Trainer` of transformers 5 reads expert names from disk that it does not convert back, for any such model.

    It says so in its log and goes on with the experts that the model has; so they must come from `from_pretrained`.
    """
    unbroken = load_latent("qwen3-moe", bases)
    train(unbroken, tmp_path / "unbroken", steps=4)
    train(load_latent("qwen3-moe", bases), tmp_path / "broken", steps=2)
    resumed = load(tmp_path / "broken" / "checkpoint-2")
    train(resumed, tmp_path / "broken", steps=4, resume=True)
    assert_same_state(resumed, unbroken)


def test_a_trainer_refuses_to_train_the_weights_of_a_packed_model(bases: Path, tmp_path: Path) -> None:
    model = load(save_base("llama", bases), quantization_config=BitDistillerQuantConfig(group_size=32))
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        train(model, tmp_path, steps=1)


def test_a_latent_checkpoint_says_so(bases: Path, tmp_path: Path) -> None:
    model = load_latent("llama", bases, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert (config["state"], config["learn_scale"], config["gradient"]) == ("latent", True, "exact")
    assert "not yet the quantized model" in (tmp_path / "README.md").read_text(encoding="utf-8")
    dtypes = {name.rpartition(".")[2]: tensor.dtype for name, tensor in load_file(tmp_path / WEIGHTS).items()}
    assert dtypes == {"weight": torch.bfloat16, "weight_scale": torch.float32, "weight_zero_point": torch.uint8}
    assert torch.equal(logits(load(tmp_path)), logits(model))


@pytest.mark.parametrize("suffix", ["", "_scale", "_zero_point"])
def test_a_tensor_that_a_latent_checkpoint_lacks_is_named(bases: Path, suffix: str, tmp_path: Path) -> None:
    load_latent("llama", bases).save_pretrained(tmp_path)
    name = f"model.layers.0.self_attn.k_proj.weight{suffix}"
    edit_tensors(tmp_path, {name: None})
    with pytest.warns(UserWarning, match="unverified"), pytest.raises(CheckpointError, match=name):
        load(tmp_path)


@pytest.mark.parametrize(
    ("arch", "settings"),
    [("llama", {}), ("llama", {"learn_zero_point": True, "subln": "output"}), ("gpt2", {}), ("qwen3-moe", {})],
    ids=str,
)
def test_a_trained_latent_model_packs_to_what_it_computed(
    arch: str, settings: dict[str, Any], bases: Path, tmp_path: Path
) -> None:
    model = load_latent(arch, bases, **settings)
    train(model, tmp_path / "run", steps=2)
    expected = logits(model.eval())
    packed = pack_latent(model)
    assert packed is model
    assert torch.equal(logits(packed), expected)
    assert not any(parameter.requires_grad for parameter in packed.parameters())
    packed.save_pretrained(tmp_path / "packed")
    reloaded = load(tmp_path / "packed")
    assert reloaded.config.quantization_config.state == "packed"
    assert torch.equal(logits(reloaded), expected)
    assert_same_state(reloaded, packed)
    with pytest.raises(StateError, match="must be latent"):
        pack_latent(packed)


def test_a_weight_that_cannot_be_packed_is_named(bases: Path) -> None:
    model = load_latent("llama", bases)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(WeightError, match=r"layer 'model.layers.1.mlp.up_proj'"):
        pack_latent(model)
