"""What a config targets, trains besides, and sets for single layers, is what happens in the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from bitdistiller_peft import BitDistillerConfig, get_bitdistiller_model, quant_summary
from bitdistiller_peft.errors import TargetError
from tests.tiny import CONFIGS, token_ids
from tests.tuner.common import (
    MLP,
    Bases,
    config_for,
    logits,
    overlays,
    teacher_logits,
    train,
    trainable,
)

each_architecture = pytest.mark.parametrize("name", CONFIGS)

ATTENTION = {f"model.layers.{i}.self_attn.{p}" for i in (0, 1) for p in ("q_proj", "k_proj", "v_proj", "o_proj")}
MLPS = {f"model.layers.{i}.mlp.{p}" for i in (0, 1) for p in ("gate_proj", "up_proj", "down_proj")}


def of(*parts: str) -> set[str]:
    """The layers whose name contains one of these."""
    return {name for name in ATTENTION | MLPS if any(part in name for part in parts)}


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, ATTENTION | MLPS),
        ({"target_modules": "ALL-LINEAR"}, ATTENTION | MLPS),
        ({"target_modules": ["q_proj"]}, of("q_proj")),
        ({"target_modules": ("q_proj", "down_proj")}, of("q_proj", "down_proj")),
        ({"target_modules": ["model.layers.1.mlp.up_proj"]}, of("1.mlp.up_proj")),
        ({"target_modules": r".*\.0\.mlp\..*_proj"}, of("0.mlp")),
        ({"target_modules": r".*(q|v)_proj"}, of("q_proj", "v_proj")),
        ({"exclude_modules": ["o_proj", "gate_proj"]}, (ATTENTION | MLPS) - of("o_proj", "gate_proj")),
        ({"exclude_modules": r".*self_attn.*"}, MLPS),
        (
            {"target_modules": ["mlp.up_proj", "q_proj"], "exclude_modules": r".*\.1\..*"},
            of("0.mlp.up", "0.self_attn.q"),
        ),
        ({"layers_to_transform": 1}, of(".1.")),
        ({"layers_to_transform": [0, 1]}, ATTENTION | MLPS),
        ({"layers_to_transform": [0], "layers_pattern": "layers"}, of(".0.")),
        ({"layers_to_transform": [1], "exclude_modules": ["q_proj"]}, of(".1.") - of("q_proj")),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["layers"]}, of("1.self_attn.q")),
        ({"target_modules": ["lm_head"]}, {"lm_head"}),
    ],
    ids=lambda value: "-".join(value) or "default" if isinstance(value, dict) else "",
)
def test_exactly_the_asked_for_layers_are_overlaid(kwargs: dict[str, object], expected: set[str], bases: Bases) -> None:
    model = bases.base("llama")
    untouched = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    student = get_bitdistiller_model(model, config_for("llama", **kwargs))
    assert set(overlays(student)) == expected
    for name in untouched.keys() - expected:
        assert model.get_submodule(name) is untouched[name]
    assert torch.equal(teacher_logits(student), logits(bases.base("llama")))


def test_layers_to_transform_works_with_conv1d_and_experts(bases: Bases) -> None:
    for name, pattern in (("gpt2", "h"), ("mixtral", "layers")):
        student = bases.student(name, layers_to_transform=[1], layers_pattern=pattern)
        whole = set(overlays(bases.student(name)))
        assert set(overlays(student)) == {key for key in whole if ".1." in key}


def test_experts_are_a_target_and_an_exclusion_like_any_other(bases: Bases) -> None:
    """G3."""
    alone = bases.student("mixtral", target_modules=["experts"])
    assert set(overlays(alone)) == {f"model.layers.{i}.mlp.experts" for i in (0, 1)}
    without = bases.student("mixtral", exclude_modules=["experts"])
    assert set(overlays(without)) == ATTENTION


def test_the_head_of_a_sequence_classifier_is_left_alone(bases: Bases) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(bases.path("llama"), num_labels=3)
    model.config.pad_token_id = 0
    student = get_bitdistiller_model(model, config_for("llama", task_type="SEQ_CLS"))
    assert set(overlays(student)) == ATTENTION | MLPS
    assert student(token_ids()).logits.shape == (2, 3)
    assert [key for key in trainable(student) if "score" in key], "PEFT trains the new head, as with any method"


# -------------------------------------------------------------------------------------------------------- overrides


def test_overrides_set_single_layers(bases: Bases) -> None:
    student = bases.student(
        "llama",
        overrides={
            r"layers\.0\..*down_proj": {"bits": 8, "group_size": -1},
            "down_proj": {"bits": 4, "group_size": 64},
            "self_attn.q_proj": {"grid": "nf", "scale_dtype": "float32"},
            "self_attn.k_proj": {"group_size": "tensor"},
            "v_proj": {"zero_point_range": [1, 2]},
        },
    )
    found = {
        name: layer.student("weight", "default").quant_specs["weight"] for name, layer in overlays(student).items()
    }
    seen = {
        name.replace("model.layers.", "").replace("self_attn.", "").replace("mlp.", ""): (
            spec.grid.name,
            spec.grid.bits,
            spec.group_size,
            spec.scale_dtype_name,
            spec.zero_point_range,
        )
        for name, spec in found.items()
    }
    plain = ("int", 2, 32, "float16", None)
    assert seen["0.down_proj"] == ("int", 8, -1, "float16", None), "the first match counts"
    assert seen["1.down_proj"] == ("int", 4, 64, "float16", None)
    assert seen["0.q_proj"] == seen["1.q_proj"] == ("nf", 2, 32, "float32", None)
    assert seen["0.k_proj"] == ("int", 2, "tensor", "float16", None)
    assert seen["0.v_proj"] == ("int", 2, 32, "float16", (1, 2))
    assert seen["0.o_proj"] == seen["1.gate_proj"] == seen["1.up_proj"] == plain
    assert torch.isfinite(logits(student)).all()


def test_an_override_matches_whole_names_only(bases: Bases) -> None:
    student = bases.student("llama", overrides={"proj": {"bits": 4}, "p_proj": {"bits": 4}})
    bits = {layer.student("weight", "default").quant_specs["weight"].grid.bits for layer in overlays(student).values()}
    assert bits == {2}


def test_an_override_on_experts_holds_for_both_matrices(bases: Bases) -> None:
    student = bases.student("qwen3-moe", overrides={"experts": {"bits": 4, "group_size": 16}})
    layer = overlays(student)["model.layers.0.mlp.experts"]
    for parameter in ("gate_up_proj", "down_proj"):
        spec = layer.student(parameter, "default").quant_specs["weight"]
        assert (spec.grid.bits, spec.group_size) == (4, 16)


def test_a_learned_zero_point_is_skipped_where_the_overridden_grid_has_none(bases: Bases) -> None:
    student = bases.student("llama", learn_zero_point=True, overrides={"q_proj": {"grid": "nf"}})
    learned = {key.split(".")[-4] for key in trainable(student) if key.endswith("_zero_point")}
    assert learned == {"k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("group_size", [1, 2, 4, 43, 86, 172])
def test_group_sizes_that_divide_an_odd_width_work(group_size: int, bases: Bases) -> None:
    overrides = {"down_proj": {"group_size": group_size}}
    student = get_bitdistiller_model(
        bases.base("llama-172"), BitDistillerConfig(group_size=64, scale_dtype="float32", overrides=overrides)
    )
    layer = overlays(student)["model.layers.0.mlp.down_proj"]
    assert layer.student("weight", "default").weight_scale.shape == (64, 172 // group_size)
    before = logits(student)
    train(student)
    assert not torch.equal(logits(student), before)


# --------------------------------------------------------------------------------------------------- what else trains


NORMS = {
    "llama": 2 * 2 + 1,
    "llama-tied": 2 * 2 + 1,
    "llama-172": 2 * 2 + 1,
    "qwen2": 2 * 2 + 1,
    "qwen3": 2 * 4 + 1,
    "gpt2": 2 * (2 * 2 + 1),  # weights and biases
    "opt": 2 * (2 * 2 + 1),
    "gemma2": 2 * 4 + 1,
    "gemma3": 2 * 6 + 1,
    "mixtral": 2 * 2 + 1,
    "qwen3-moe": 2 * 4 + 1,
}


@each_architecture
def test_norms_are_trained_as_copies(name: str, bases: Bases) -> None:
    """G7."""
    student = bases.student(name, train_other="norms")
    others = {key for key in trainable(student) if ".bitdistiller_" not in key}
    assert all(".modules_to_save.default." in key for key in others)
    assert all("norm" in key or ".ln_" in key for key in others)
    assert len(others) == NORMS[name]
    teacher, start = logits(bases.base(name)), logits(student)
    assert torch.equal(start, logits(bases.student(name))), "before training the copies change nothing"
    train(student)
    assert torch.equal(teacher_logits(student), teacher)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_everything_can_be_trained(name: str, bases: Bases) -> None:
    """G7: norms, embeddings and head; only routers stay, which are not linear layers in transformers."""
    student = bases.student(name, train_other="all")
    others = {key.split(".modules_to_save.")[0] for key in trainable(student) if ".modules_to_save." in key}
    names = {key.removeprefix("base_model.model.") for key in others}
    assert {"model.embed_tokens", "lm_head", "model.norm", "model.layers.1.input_layernorm"} <= names
    before = {key: value.detach().clone() for key, value in trainable(student).items()}
    train(student)
    assert not [key for key, value in trainable(student).items() if torch.equal(value, before[key])]


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "gemma2"])
def test_tied_embeddings_are_not_trained_apart(name: str, bases: Bases) -> None:
    """G11."""
    with pytest.raises(
        TargetError, match=r"must not be 'all' where embeddings and head are tied.*Use train_other='norms'"
    ):
        bases.student(name, train_other="all")


def test_train_other_works_for_models_of_no_library() -> None:
    for train_other in ("norms", "all"):
        student = get_bitdistiller_model(MLP(), BitDistillerConfig(group_size=32, train_other=train_other))
        others = {key for key in trainable(student) if ".bitdistiller_" not in key}
        assert others == {f"base_model.model.norm.modules_to_save.default.{key}" for key in ("weight", "bias")}


def test_a_targeted_head_is_quantized_also_where_all_is_trained(bases: Bases) -> None:
    student = bases.student("llama", target_modules=["q_proj", "lm_head"], train_other="all")
    assert "lm_head" in overlays(student)
    others = {key.split(".modules_to_save.")[0] for key in trainable(student) if ".modules_to_save." in key}
    assert not [key for key in others if "lm_head" in key]
    assert "base_model.model.model.embed_tokens" in others


def test_modules_to_save_and_train_other_add_up(bases: Bases) -> None:
    student = bases.student("llama", modules_to_save=["lm_head"], train_other="norms")
    others = {key for key in trainable(student) if ".modules_to_save." in key}
    assert len(others) == NORMS["llama"] + 1
    assert "lm_head" not in overlays(student)


def test_a_module_to_save_is_not_quantized_as_well(bases: Bases) -> None:
    student = bases.student("llama", modules_to_save=["up_proj"])
    assert not [name for name in overlays(student) if name.endswith("up_proj")]
    assert len([key for key in trainable(student) if ".modules_to_save." in key]) == 2


def test_a_students_summary_counts_its_true_bits(bases: Bases) -> None:
    student = bases.student("llama", overrides={"down_proj": {"bits": 4}})
    rows = {(row.kind, row.bits): row.num_modules for row in quant_summary(student).rows}
    assert rows[("int", 2)] == 12
    assert rows[("int", 4)] == 2
