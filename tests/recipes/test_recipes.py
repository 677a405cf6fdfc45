"""A recipe's values are accepted by the classes they are for, and an override that nobody knows is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from bitdistiller_peft import BitDistillerConfig, DistillConfig, get_bitdistiller_model, get_recipe, register_recipe
from bitdistiller_peft.calibration.options import make_options
from bitdistiller_peft.errors import ConfigError, UnknownNameError
from bitdistiller_peft.recipes import Recipe, base, recipe_names
from tests.tiny import load, save_base

PUBLISHED = {"bitdistiller", "bitnet-distillation", "afpq-nf3", "afpq-nf4", "afpq-fp3", "afpq-fp4", "r2q"}
OURS = {"best-2bit", "best-3bit"}


def test_the_named_systems_are_there() -> None:
    assert set(recipe_names()) >= PUBLISHED | OURS


@pytest.mark.parametrize("preset", base.PRESETS)
@pytest.mark.parametrize("name", sorted(PUBLISHED | OURS))
def test_every_part_is_accepted_by_what_it_is_for(name: str, preset: str, tmp_path: Path) -> None:
    recipe = get_recipe(name, preset)
    assert (recipe.name, recipe.preset) == (name, preset)
    config = BitDistillerConfig.from_recipe(name, preset=preset)
    assert all(getattr(config, key) == value for key, value in recipe.model.items())
    arguments = {"num_samples", "seq_len", "batch_size"}
    for call in recipe.calibration:
        make_options(call["method"], {k: v for k, v in call.items() if k not in {"method", *arguments}})
    for stage in set(recipe.stages) & {"pretrain", "distill"}:
        args = DistillConfig.from_recipe(name, preset=preset, stage=stage, output_dir=str(tmp_path), report_to="none")
        expected = {key: value for key, value in recipe.training_for(stage).items() if key != "lr_scheduler_type"}
        assert all(getattr(args, key) == value for key, value in expected.items())


@pytest.mark.parametrize("name", sorted(PUBLISHED | OURS))
def test_every_student_can_be_made(name: str, tmp_path: Path) -> None:
    student = get_bitdistiller_model(
        load(save_base("llama", tmp_path)), BitDistillerConfig.from_recipe(name, group_size=-1)
    )
    assert isinstance(student, nn.Module)
    assert any("bitdistiller_weight" in key for key, _ in student.named_parameters())


def test_bitdistiller_is_int2_and_at_three_bits_nf3() -> None:
    two, three = get_recipe("bitdistiller").model, get_recipe("bitdistiller", bits=3).model
    assert (two["bits"], two["grid"], two["group_size"]) == (2, "int", 128)
    assert (three["bits"], three["grid"], three["group_size"]) == (3, "nf", 128)
    assert get_recipe("bitdistiller", bits=3, grid="int").model["grid"] == "int"


def test_three_bits_are_trained_more_gently_than_two_and_scaled_first() -> None:
    for recipe in (get_recipe("best-3bit"), get_recipe("best-2bit", bits=3)):
        assert recipe.model["bits"] == 3
        assert [call["method"] for call in recipe.calibration] == ["awq", "blockwise"]
        two = get_recipe("best-2bit")
        assert recipe.training["learning_rate"] < two.training["learning_rate"]
        assert recipe.calibration[-1]["learning_rate"] < two.calibration[-1]["learning_rate"]
        assert recipe.training.keys() == two.training.keys()


def test_hidden_states_are_compared_where_the_teacher_surely_has_them() -> None:
    assert get_recipe("best-2bit").training["hidden_weight"] > 0
    assert get_recipe("best-2bit", teacher="self").training["hidden_weight"] > 0
    for teacher in ("cached", "someone/larger-model"):
        assert get_recipe("best-2bit", teacher=teacher).training["hidden_weight"] == 0
    assert get_recipe("best-2bit", teacher="cached", hidden_weight=0.5).training["hidden_weight"] == 0.5


@pytest.mark.parametrize("preset", ["balanced", "max"])
def test_three_quarters_of_the_tokens_are_spent_end_to_end(preset: str) -> None:
    recipe = get_recipe("best-2bit", preset)
    blocks, training = recipe.calibration[-1], recipe.training
    of_blocks = blocks["num_samples"] * blocks["seq_len"] * blocks["epochs"]
    assert training["max_steps"] * training["max_length"] * training["per_device_train_batch_size"] == 3 * of_blocks
    fast = get_recipe("best-2bit", "fast")
    assert (fast.stages, fast.training) == (("calibrate",), {})
    assert fast.calibration[-1]["num_samples"] * fast.calibration[-1]["seq_len"] == of_blocks // (
        4 if preset == "balanced" else 20
    )


def test_an_override_goes_where_its_name_belongs(tmp_path: Path) -> None:
    recipe = get_recipe("r2q", group_size=64, learning_rate=1e-3, loss_type="cakld")
    assert recipe.model["group_size"] == 64
    assert (recipe.training["learning_rate"], recipe.training["loss_type"]) == (1e-3, "cakld")
    assert "learning_rate" not in recipe.model
    assert "group_size" not in recipe.training
    both: dict[str, Any] = {"group_size": 64, "learning_rate": 1e-3}
    assert BitDistillerConfig.from_recipe("r2q", **both).group_size == 64
    args = DistillConfig.from_recipe("r2q", output_dir=str(tmp_path), report_to="none", **both)
    assert args.learning_rate == 1e-3


@pytest.mark.parametrize("reader", [get_recipe, BitDistillerConfig.from_recipe, DistillConfig.from_recipe])
def test_an_override_that_nobody_knows_is_refused(reader: Any) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'learning_rate'"):
        reader("bitdistiller", learning_rte=1e-3)


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="bitdistiller"):
        get_recipe("bitdistillr")
    with pytest.raises(UnknownNameError, match="balanced"):
        get_recipe("r2q", "balancd")
    with pytest.raises(ConfigError, match="calibrate and pack"):
        get_recipe("afpq-nf3").training_for()
    with pytest.raises(ConfigError, match="pretrain"):
        get_recipe("bitnet-distillation").training_for("finetune")


def test_anyone_may_register_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_FACTORIES", dict(base._FACTORIES))
    register_recipe("mine", lambda preset, given: Recipe("mine", model={"bits": 4}))
    assert get_recipe("mine", "max", group_size=32).model == {"bits": 4, "group_size": 32}
    with pytest.raises(ConfigError, match="must be new"):
        register_recipe("mine", lambda preset, given: Recipe("mine"))


def test_a_recipe_and_a_model_override_need_no_trainer() -> None:
    code = (
        "import sys, bitdistiller_peft as b\n"
        "b.get_recipe('best-2bit')\n"
        "assert not {'torch', 'trl', 'transformers'} & set(sys.modules), 'slow'\n"
        "b.BitDistillerConfig.from_recipe('best-2bit', bits=3)\n"
        "assert 'trl' not in sys.modules\n"
        "b.get_recipe('best-2bit', learning_rate=1.0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
