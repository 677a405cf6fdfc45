"""The section of config.json goes there and comes back whole, and takes nothing that it does not know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig
from transformers.quantizers import AutoQuantizationConfig

from bitdistiller_peft import BitDistillerQuantConfig, __version__
from bitdistiller_peft.errors import ConfigError, GroupSizeError, UnknownNameError
from bitdistiller_peft.hub import FORMAT_VERSION, QUANT_METHOD

EVERYTHING: dict[str, Any] = {
    "bits": 3,
    "group_size": 64,
    "grid": "int",
    "scale_dtype": "bfloat16",
    "zero_point_range": [1, 6],
    "refine": None,
    "tied": False,
    "modules_to_not_convert": ["lm_head"],
    "overrides": {"model.layers.0.mlp.down_proj": {"bits": 4, "group_size": -1}},
    "packing": "bitstream",
    "provenance": {"base_model": "team/model", "gamma": 0.25, "steps": 3, "done": True, "teacher": None},
    "written_by": "bitdistiller_peft 0.0.1",
    "install": "somehow",
}
BITNET: dict[str, Any] = {
    "grid": "ternary",
    "group_size": "tensor",
    "activation_bits": 8,
    "subln": "output",
    "subln_eps": 1e-6,
    "subln_modules": ["model.layers.0.self_attn.o_proj"],
    "packing": "base3",
}
LATENT = {"state": "latent", "learn_scale": True, "learn_zero_point": True, "gradient": "ste"}


@pytest.mark.parametrize(
    "settings", [{}, EVERYTHING, BITNET, {**EVERYTHING, **LATENT}], ids=["default", "packed", "bitnet", "latent"]
)
def test_a_config_survives_json_and_config_json(settings: dict[str, Any], tmp_path: Path) -> None:
    config = BitDistillerQuantConfig(**settings)
    stored = config.to_dict()
    assert BitDistillerQuantConfig.from_dict(json.loads(json.dumps(stored))).to_dict() == stored
    assert json.loads(config.to_json_string(use_diff=False)) == stored
    assert AutoQuantizationConfig.from_dict(stored).to_dict() == stored
    assert {key: stored[key] for key in settings} == settings
    model_config = LlamaConfig(num_hidden_layers=1)
    model_config.quantization_config = config
    model_config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).quantization_config == stored


def test_what_is_stored_is_complete_and_plain() -> None:
    packed, latent = BitDistillerQuantConfig().to_dict(), BitDistillerQuantConfig(state="latent").to_dict()
    assert packed["quant_method"] == QUANT_METHOD == "bitdistiller"
    assert packed["format_version"] == FORMAT_VERSION == 1
    assert packed["written_by"] == f"bitdistiller_peft {__version__}"
    assert (packed["bits"], packed["group_size"], packed["grid"], packed["state"]) == (2, 128, "int", "packed")
    assert packed.keys() == {*EVERYTHING, "quant_method", "format_version", "state"}
    assert latent.keys() == packed.keys() | LATENT.keys()
    assert json.loads(json.dumps(packed)) == packed


def test_how_to_verify_is_a_matter_of_the_load_and_never_stored() -> None:
    config = BitDistillerQuantConfig(verify="full")
    assert "verify" not in config.to_dict()
    assert config.get_loading_attributes() == {"verify": "full"}
    with pytest.raises(UnknownNameError, match="got quantization_config='verify'"):
        BitDistillerQuantConfig.from_dict({"verify": "none"})


def test_a_stored_config_is_a_copy() -> None:
    config = BitDistillerQuantConfig(**EVERYTHING)
    config.to_dict()["overrides"]["model.layers.0.mlp.down_proj"]["bits"] = 2
    assert config.overrides["model.layers.0.mlp.down_proj"]["bits"] == 4


def test_every_module_has_its_spec() -> None:
    config = BitDistillerQuantConfig(**EVERYTHING)
    own, other = config.spec("model.layers.0.mlp.down_proj"), config.spec("model.layers.1.mlp.down_proj")
    assert (own.grid.bits, own.group_size, own.scale_dtype) == (4, -1, torch.bfloat16)
    assert (other.grid.bits, other.group_size, other.zero_point_range) == (3, 64, (1, 6))
    assert config.spec() == other


@pytest.mark.parametrize(
    "stored",
    [
        {"bitz": 2},
        {"load_in_4bit": True},
        {"quantizer_class": "os.system"},
        {"auto_map": {"AutoModel": "code.Model"}},
        {"dequantize": True},
        {"": 1},
        {1: 2},
    ],
    ids=str,
)
def test_an_unknown_key_is_refused_whatever_it_holds(stored: dict[Any, Any]) -> None:
    with pytest.raises(UnknownNameError, match="`quantization_config` must be one of"):
        BitDistillerQuantConfig.from_dict(stored)


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq"},
        {"bits": 2.0},
        {"bits": None},
        {"bits": "__import__('os')"},
        {"group_size": "64"},
        {"group_size": -2},
        {"group_size": 1.5},
        {"group_size": True},
        {"grid": "int; import os"},
        {"grid": None},
        {"grid": {"name": "int"}},
        {"grid": "nf", "bits": 8},
        {"scale_dtype": "float64"},
        {"scale_dtype": ["float16"]},
        {"scale_dtype": 16},
        {"zero_point_range": [1]},
        {"zero_point_range": [2, 1]},
        {"zero_point_range": [0, 4]},
        {"zero_point_range": {"low": 1}},
        {"zero_point_range": [1, 2], "grid": "int_sym"},
        {"refine": "alternating"},
        {"refine": "greedy", "grid": "r2q"},
        {"refine": ["alternating"], "grid": "r2q"},
        {"tied": True},
        {"tied": "yes", "grid": "r2q"},
        {"grid": "ternary", "bits": 3},
        {"grid": "fp"},
        {"state": ""},
        {"state": ["packed"]},
        {"packing": None},
        {"gradient": 1},
        {"learn_scale": "yes"},
        {"learn_zero_point": 0},
        {"format_version": 0},
        {"format_version": 2},
        {"format_version": True},
        {"format_version": 1.0},
        {"modules_to_not_convert": "lm_head"},
        {"modules_to_not_convert": [1]},
        {"modules_to_not_convert": {"lm_head": True}},
        {"overrides": []},
        {"overrides": {"a": None}},
        {"overrides": {"a": {"bits": 9}}},
        {"overrides": {"a": {"state": "latent"}}},
        {"provenance": [1]},
        {"provenance": {"a": {"b": 1}}},
        {"provenance": {"a": b"bytes"}},
        {"provenance": {1: "a"}},
        {"written_by": ["x"]},
        {"install": None},
        {"verify": "maybe"},
        {"verify": None},
    ],
    ids=str,
)
def test_a_value_outside_its_rule_is_refused_in_code_and_in_json(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"must|Did you mean"):
        BitDistillerQuantConfig(**settings)
    with pytest.raises(ConfigError):
        BitDistillerQuantConfig.from_dict(settings)


def test_a_group_size_that_does_not_divide_is_refused_with_the_ones_that_do() -> None:
    with pytest.raises(GroupSizeError, match=r"group_size=64, in_features=172.*\[43, 86, 172\]"):
        BitDistillerQuantConfig(group_size=64).spec().param_shape((8, 172))
