"""Parts of different systems go together: any recipe's model, calibration and training, packed, saved, loaded."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from bitdistiller_peft import BitDistillerConfig, DistillConfig, DistillTrainer, calibrate, get_bitdistiller_model
from bitdistiller_peft.layers import PackedLinear
from bitdistiller_peft.recipes import get_recipe, recipe_names
from bitdistiller_peft.tuner import BitDistillerLayer
from tests.hub.models import assert_same_state
from tests.tiny import load, token_ids
from tests.training import helpers

IDS = token_ids(batch=4, length=16)
FEW: dict[str, Any] = {
    "max_steps": 2,
    "learning_rate": 1e-2,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "packing": False,
    "max_length": 32,
}
TRAINED = [name for name in recipe_names() if "distill" in get_recipe(name).stages]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


def student(name: str, bases: Path, **overrides: Any) -> PeftModel:
    if get_recipe(name).model.get("group_size") != "tensor":
        overrides["group_size"] = 32
    return get_bitdistiller_model(helpers.base(bases), BitDistillerConfig.from_recipe(name, **overrides))


def codes(model: PeftModel) -> dict[str, torch.Tensor]:
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BitDistillerLayer)}
    return {name: layer.student("weight", "default")().detach() for name, layer in layers.items()}


def train(model: PeftModel, name: str, folder: Path, **overrides: Any) -> PeftModel:
    """Two steps of a recipe's training: the loss is finite, and every quantized weight shows other values."""
    before = codes(model)
    args = DistillConfig.from_recipe(name, output_dir=str(folder), **{**FEW, **overrides})
    trainer = DistillTrainer(model, args, train_dataset=helpers.dataset(8), processing_class=helpers.tokenizer())
    trainer.train()
    assert all(0 < loss < torch.inf for loss in helpers.history(trainer))
    after = codes(trainer.model)
    assert all(not torch.equal(after[key], before[key]) for key in before)
    return trainer.model


@torch.no_grad()
def check_packed(model: PeftModel, folder: Path) -> None:
    model.eval()
    expected, values = model(input_ids=IDS).logits, codes(model)
    packed = model.pack_and_unload(progressbar=False)
    assert torch.equal(packed(input_ids=IDS).logits, expected)
    for name, value in values.items():
        layer = packed.get_submodule(name.removeprefix("base_model.model."))
        assert isinstance(layer, PackedLinear)
        assert torch.equal(layer.dequantize(), value)
    packed.save_pretrained(folder)
    loaded = load(folder)
    assert_same_state(loaded, packed)
    assert torch.equal(loaded(input_ids=IDS).logits, expected)


def test_r2q_is_trained_with_cakld(bases: Path, tmp_path: Path) -> None:
    model = train(student("r2q", bases), "r2q", tmp_path / "run", loss_type="cakld")
    check_packed(model, tmp_path / "packed")


def test_nf3_begins_block_by_block(bases: Path, tmp_path: Path) -> None:
    model = student("afpq-nf3", bases)
    before = codes(model)
    result = calibrate(model, None, IDS, method="blockwise", epochs=2, learning_rate=0.02, show_progress=False)
    assert all(block.error_after < block.error_before for block in result.blocks)
    assert all(not torch.equal(values, before[name]) for name, values in codes(model).items())
    check_packed(model, tmp_path)


def test_ternary_with_its_norms_and_int8_is_trained_with_cakld(bases: Path, tmp_path: Path) -> None:
    model = train(student("bitnet-distillation", bases), "bitdistiller", tmp_path / "run")
    check_packed(model, tmp_path / "packed")


@pytest.mark.slow
@pytest.mark.parametrize(("model", "training"), [*itertools.product(recipe_names(), TRAINED)])
def test_every_student_is_trained_by_every_training(model: str, training: str, bases: Path, tmp_path: Path) -> None:
    split = {"attention_split_heads": 4} if training == "bitnet-distillation" else {}
    check_packed(train(student(model, bases), training, tmp_path / "run", **split), tmp_path / "packed")
