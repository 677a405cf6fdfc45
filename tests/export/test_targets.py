"""A config that an engine cannot run is refused before training, and one that is let through does export."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bitdistiller_peft import BitDistillerConfig, export_model, get_bitdistiller_model
from bitdistiller_peft.errors import ConfigError, ExportError, UnknownNameError
from bitdistiller_peft.export import TARGETS, check_target
from tests.tiny import load, save_base

FORMATS = {
    "vllm": "compressed-tensors",
    "llama.cpp": "gguf",
    "mlx": "mlx",
    "onnx": "onnx",
    "transformers": "compressed-tensors",
}
PACKAGES = {"llama.cpp": ("gguf",), "mlx": ("mlx",), "onnx": ("onnx", "onnxscript")}


@pytest.mark.parametrize(
    ("target", "settings", "reason"),
    [
        ("vllm", {"grid": "nf", "bits": 3}, r"grid='nf' \(use one of"),
        ("vllm", {"group_size": 48}, r"group_size=48 \(use one of \[-1, 32, 64, 128, 'tensor'\]\)"),
        ("vllm", {"scale_dtype": "float32"}, "scale_dtype='float32'"),
        ("vllm", {"overrides": {"q_proj": {"bits": 4}}}, r"different settings for \['self_attn.q_proj'"),
        ("vllm", {"overrides": {r"layers\.3\.mlp\.up_proj": {"bits": 4}}}, "'mlp.up_proj'"),
        ("vllm", {"activation_bits": 8}, r"activation_bits=8 \(use None\)"),
        ("vllm", {"subln": "output"}, "subln='output'"),
        ("llama.cpp", {"bits": 2, "group_size": 64}, r"zero_point_range=None \(use \(1, 2\) at 2 bits\)"),
        ("llama.cpp", {"bits": 2, "group_size": 32, "zero_point_range": [1, 2]}, "use a multiple of 64"),
        ("llama.cpp", {"bits": 4}, "bits=4 with grid='int'"),
        ("llama.cpp", {"bits": 3, "scale_dtype": "bfloat16"}, r"use one of \['float16'\]"),
        ("llama.cpp", {"bits": 3, "group_size": 48}, "use a multiple of 32"),
        (
            "mlx",
            {"bits": 3, "overrides": {"down_proj": {"group_size": 16}}},
            r"overrides\['down_proj'\]: group_size=16",
        ),
        ("onnx", {"bits": 3}, r"use one of \[2, 4, 8\]"),
        ("transformers", {"overrides": {"down_proj": {"bits": 4}}}, "all layers must be quantized alike"),
    ],
    ids=str,
)
def test_what_an_engine_cannot_run_is_named_with_what_it_can(
    target: str, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        check_target(BitDistillerConfig(**settings), target)


def test_all_faults_are_said_at_once() -> None:
    config = BitDistillerConfig(bits=3, group_size=24, scale_dtype="float32")
    with pytest.raises(ConfigError) as caught:
        check_target(config, "onnx")
    assert "bits=3" in str(caught.value)
    assert "group_size=24" in str(caught.value)


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'vllm'"):
        check_target(BitDistillerConfig(), "vlm")


class Limit(NamedTuple):
    """A setting that a target takes, the same beyond its limit, and what the file format says to the latter.

    Engines are stricter than their files in places: a file may hold what no kernel runs, or only in a larger type.
    """

    target: str
    inside: dict[str, Any]
    outside: dict[str, Any]
    format_refuses: bool

    def __str__(self) -> str:
        return f"{self.target}-{self.outside}"


# tests/tiny.py: hidden width 64, MLP width 128
RANGE = {"bits": 2, "group_size": 64, "zero_point_range": [1, 2]}
LIMITS = [
    *(Limit(target, {"grid": "ternary"}, {"grid": "nf", "bits": 3}, True) for target in FORMATS),
    *(Limit(target, {"grid": "int_sym"}, {"grid": "r2q"}, True) for target in FORMATS),
    Limit("vllm", {"group_size": -1}, {"group_size": 16}, False),  # Marlin has no kernel for it
    Limit("vllm", {"scale_dtype": "bfloat16"}, {"scale_dtype": "float32"}, False),  # held in the model's dtype
    Limit("vllm", {"overrides": {"(q|k|v)_proj": {"bits": 4}}}, {"overrides": {"q_proj": {"bits": 4}}}, False),
    Limit("llama.cpp", RANGE, {"bits": 2, "group_size": 64, "zero_point_range": [0, 3]}, False),  # as Q4_0, twice it
    Limit("llama.cpp", RANGE, {**RANGE, "group_size": 32}, False),  # as Q4_0, twice the size
    Limit("llama.cpp", {"bits": 3}, {"bits": 4}, False),  # as Q8_0, twice the size
    Limit("llama.cpp", {"grid": "int_sym", "bits": 8}, {"bits": 8}, True),
    Limit("llama.cpp", {"bits": 3, "group_size": 64}, {"bits": 3, "group_size": 16}, True),
    Limit("llama.cpp", {"bits": 3}, {"bits": 3, "scale_dtype": "float32"}, True),
    Limit("mlx", {"group_size": -1}, {"group_size": 16}, True),
    Limit("mlx", {"scale_dtype": "bfloat16"}, {"bits": 3, "scale_dtype": "float32"}, True),
    Limit("onnx", {"bits": 4}, {"bits": 3}, True),
    Limit("onnx", {"group_size": 16}, {"group_size": 8}, True),
    Limit("transformers", {"bits": 4}, {"overrides": {"down_proj": {"bits": 4}}}, False),  # loads one scheme
]


def _slowly(target: str, value: object) -> Any:
    """A parameter that waits for `make test-all` where torch's ONNX exporter has to trace a model."""
    return pytest.param(value, marks=[pytest.mark.slow] if target == "onnx" else [], id=str(value))


@pytest.mark.parametrize("limit", [_slowly(limit.target, limit) for limit in LIMITS])
def test_each_limit_from_both_sides(limit: Limit, packed: Callable[..., Path], tmp_path: Path) -> None:
    for package in PACKAGES.get(limit.target, ()):
        pytest.importorskip(package, reason=f"{package} has no wheels for some machines")
    defaults = {"bits": 2, "group_size": 64 if limit.target == "llama.cpp" else 32}
    inside, outside = defaults | limit.inside, defaults | limit.outside
    accepted = BitDistillerConfig(**inside, target=limit.target)  # may add zero_point_range
    if accepted.zero_point_range:
        inside["zero_point_range"] = accepted.zero_point_range
    export_model(packed("llama", **inside), FORMATS[limit.target], tmp_path / "inside")
    with pytest.raises(ConfigError, match="must suit target="):
        BitDistillerConfig(**outside, target=limit.target)
    if limit.format_refuses:
        with pytest.raises(ExportError):
            export_model(packed("llama", **outside), FORMATS[limit.target], tmp_path / "outside")
    else:
        export_model(packed("llama", **outside), FORMATS[limit.target], tmp_path / "outside")


@pytest.mark.parametrize("target", [_slowly(target, target) for target in sorted(TARGETS)])
def test_whatever_a_target_takes_its_format_holds(target: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    for package in PACKAGES.get(target, ()):
        pytest.importorskip(package, reason=f"{package} has no wheels for some machines")
    draw = random.Random(target)
    base, count = save_base("llama", tmp_path_factory.mktemp("base")), 0
    while count < 3:
        settings = {
            "grid": draw.choice(["int", "int_sym", "ternary", "nf", "fp", "r2q"]),
            "bits": draw.choice([2, 3, 4, 8]),
            "group_size": draw.choice([8, 16, 32, 64, -1, "tensor"]),
            "scale_dtype": draw.choice(["float16", "bfloat16", "float32"]),
        }
        try:
            config = BitDistillerConfig(**settings, target=target)
        except ConfigError:
            continue
        packed_model = get_bitdistiller_model(load(base), config).pack_and_unload(progressbar=False)
        export_model(packed_model, FORMATS[target], tmp_path_factory.mktemp("out") / "model")
        count += 1


# ------------------------------------------------------------------------------------------------ with the model


@pytest.mark.parametrize(
    ("target", "arch", "settings", "reason"),
    [
        ("vllm", "gpt2", {}, r"layer 'transformer.h.0.attn.c_attn': it is a Conv1D \(only a linear layer and"),
        (
            "vllm",
            "llama",
            {"exclude_modules": ["up_proj"]},
            r"layers \['model.layers.0.mlp.gate_proj', 'model.layers.0.mlp.up_proj'\] run as one",
        ),
        (
            "vllm",
            "llama",
            {"overrides": {r"layers\.1\.self_attn\.[kv]_proj": {"bits": 4}}},
            r"different settings for \['self_attn.q_proj'",
        ),
        (
            "vllm",
            "llama",
            {"overrides": {r"layers\.\d\.mlp\.up_proj": {"bits": 4}}},
            "different settings for|'model.layers.1.mlp.up_proj'] run as one",
        ),
        ("llama.cpp", "opt", {}, r"architecture 'OPTForCausalLM' \(use one of \['LlamaForCausalLM'"),
        ("llama.cpp", "mixtral", {}, "layer 'model.layers.0.mlp.experts': it is a module of fused experts"),
        (
            "llama.cpp",
            "llama-172",
            {"bits": 3, "group_size": -1},
            r"layer 'model.layers.0.mlp.down_proj': group_size=-1 makes groups of 172 \(use a multiple of 32\)",
        ),
        ("mlx", "llama-172", {"group_size": -1}, r"layer 'model.layers.1.mlp.down_proj'.*multiple of 32"),
        ("mlx", "qwen3-moe", {}, "'model.layers.0.mlp.experts': it is a module of fused experts"),
    ],
    ids=str,
)
def test_a_model_that_an_engine_cannot_run_is_refused_with_its_layers(
    target: str, arch: str, settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    model = load(save_base(arch, tmp_path))
    before = [type(module) for module in model.modules()]
    defaults = {"bits": 2, "group_size": 64 if target == "llama.cpp" else 32}
    with pytest.raises(ConfigError, match=reason):
        get_bitdistiller_model(model, BitDistillerConfig(**defaults | settings, target=target))
    assert [type(module) for module in model.modules()] == before


def test_a_quantized_head_counts_like_any_layer(tmp_path: Path) -> None:
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    config = BitDistillerConfig(bits=3, group_size=32, target="llama.cpp", target_modules=modules)
    model = get_bitdistiller_model(load(save_base("llama", tmp_path)), config).pack_and_unload(progressbar=False)
    pytest.importorskip("gguf")
    assert export_model(model, "gguf", tmp_path / "out").verification.num_weights == 15
    with pytest.raises(ConfigError, match=r"overrides\['lm_head'\]: bits=4"):
        BitDistillerConfig(
            bits=3, group_size=32, target="llama.cpp", target_modules=modules, overrides={"lm_head": {"bits": 4}}
        )


def test_long_lists_of_faults_are_cut(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"and 4 more\. Leave such layers out with exclude_modules"):
        get_bitdistiller_model(load(save_base("gpt2", tmp_path)), BitDistillerConfig(group_size=32, target="vllm"))


def test_the_architectures_are_those_of_the_writers() -> None:
    from bitdistiller_peft.export import gguf_metadata

    assert set(TARGETS["llama.cpp"].architectures) == set(gguf_metadata.ARCHITECTURES)
