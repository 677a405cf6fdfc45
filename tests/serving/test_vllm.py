"""The vLLM plug-in multiplies as the packed model does, for every grid, fused and split over devices, or refuses."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bitdistiller_peft.errors import CheckpointError, ChecksumError, ConfigError, StateError, TargetError
from bitdistiller_peft.grids import get_grid, grid_names
from bitdistiller_peft.kernels import use_backend
from bitdistiller_peft.layers import SUFFIXES
from bitdistiller_peft.serving import register_vllm
from bitdistiller_peft.serving.parts import NORM
from tests.hub.models import ROOT, Saved
from tests.serving import engine

GetSaved = Callable[..., Saved]
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
ATTENTION, MLP = "model.layers.1.self_attn", "model.layers.1.mlp"
# tests/tiny.py: hidden 64, MLP 128, 4 heads of 16 with 2 for k and v, 96 words
GRIDS = [
    *({"grid": "int", "bits": bits} for bits in (2, 3, 4, 8)),
    {"grid": "int_sym", "bits": 4, "group_size": -1, "scale_dtype": "bfloat16"},
    {"grid": "int_fine", "bits": 3},
    {"grid": "nf", "bits": 3},
    {"grid": "nf_sym", "bits": 2},
    {"grid": "nf4", "bits": 4},
    {"grid": "fp", "bits": 4},
    {"grid": "fp_sym", "bits": 3},
    {"grid": "ternary", "group_size": "tensor"},
    {"grid": "ternary", "packing": "base3"},
    {"grid": "ternary", "group_size": "tensor", "activation_bits": 8, "subln": "all"},
    {"grid": "r2q"},
    {"grid": "r2q", "tied": True},
    {"grid": "int", "bits": 2, "activation_bits": 8, "subln": "output"},
]


@pytest.fixture(scope="module")
def plugin() -> Iterator[ModuleType]:
    with engine.installed() as module:
        yield module


def config_of(plugin: ModuleType, saved: Saved) -> Any:
    config = plugin.BitDistillerVllmConfig.from_config(saved.model.config.quantization_config.to_dict())
    config.packed_modules_mapping = dict(FUSED)
    return config


def load(layer: Any, folder: Path, shards: dict[str, Any]) -> Any:
    """Load as vLLM does: every stored tensor of each layer in `shards`, by the parameter's own loader."""
    tensors = load_file(folder / "model.safetensors")
    for name, shard in shards.items():
        for suffix in ("", *SUFFIXES, NORM):
            stored = f"{name}{suffix}" if suffix == NORM else f"{name}.weight{suffix}"
            if stored in tensors:
                parameter = layer.get_parameter(stored.removeprefix(f"{name}."))
                parameter.weight_loader(parameter, tensors[stored], *(() if shard is None else (shard,)))
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def qkv(plugin: ModuleType, saved: Saved, **split: int) -> Any:
    layer = engine.QKVParallelLinear(64, 16, 4, 2, **split)
    layer.build(config_of(plugin, saved).get_quant_method(layer, f"{ATTENTION}.qkv_proj"))
    return load(layer, saved.folder, {f"{ATTENTION}.{s}_proj": s for s in "qkv"})


def gate_up(plugin: ModuleType, saved: Saved, *, ranks: int = 1, rank: int = 0) -> Any:
    layer = engine.LinearBase(64, [128 // ranks] * 2, [128, 128], rank=rank)
    layer.build(config_of(plugin, saved).get_quant_method(layer, f"{MLP}.gate_up_proj"))
    return load(layer, saved.folder, {f"{MLP}.gate_proj": 0, f"{MLP}.up_proj": 1})


def down(plugin: ModuleType, saved: Saved, *, ranks: int = 1, rank: int = 0) -> Any:
    layer = engine.LinearBase(128 // ranks, [64], [64], full_width=128, rank=rank)
    layer.build(config_of(plugin, saved).get_quant_method(layer, f"{MLP}.down_proj"))
    return load(layer, saved.folder, {f"{MLP}.down_proj": None})


def inputs(width: int) -> Tensor:
    return torch.randn(5, width, generator=torch.Generator().manual_seed(0))


def expected(saved: Saved, parent: str, names: list[str], x: Tensor) -> Tensor:
    layers = [saved.model.get_submodule(f"{parent}.{name}") for name in names]
    return torch.cat([layer(x) for layer in layers], -1)


@pytest.mark.parametrize("settings", GRIDS, ids=str)
def test_every_grid_multiplies_as_the_packed_layers_do(
    settings: dict[str, Any], plugin: ModuleType, saved: GetSaved
) -> None:
    original, x = saved("llama", steps=0, **settings), inputs(64)
    with torch.no_grad(), use_backend("reference"):
        for layer, parent, names in (
            (qkv(plugin, original), ATTENTION, FUSED["qkv_proj"]),
            (gate_up(plugin, original), MLP, FUSED["gate_up_proj"]),
        ):
            # one product of the fused matrix may add in another order than one for each
            torch.testing.assert_close(
                layer.quant_method.apply(layer, x), expected(original, parent, names, x), rtol=1e-6, atol=1e-6
            )
            dense = torch.cat([original.model.get_submodule(f"{parent}.{name}").dequantize() for name in names])
            assert torch.equal(layer.quant_method.dequantize_weight(layer), dense)
        single, wide = down(plugin, original), inputs(128)
        found = single.quant_method.apply(single, wide)
        assert torch.equal(found, expected(original, MLP, ["down_proj"], wide))


def test_every_registered_grid_is_tested_here() -> None:
    assert {settings["grid"] for settings in GRIDS} == set(grid_names())


def test_parts_with_different_settings_keep_them(plugin: ModuleType, saved: GetSaved) -> None:
    overrides = {
        "q_proj": {"bits": 4},
        "k_proj": {"bits": 3, "scale_dtype": "float32"},
        "up_proj": {"grid": "nf", "bits": 4, "group_size": -1},
    }
    original, x = saved("qwen2", bits=2, overrides=overrides), inputs(64)
    names = FUSED["qkv_proj"]
    layers = [original.model.get_submodule(f"{ATTENTION}.{name}") for name in names]
    bias = torch.cat([layer.bias for layer in layers])
    with torch.no_grad(), use_backend("reference"):
        fused, pair = qkv(plugin, original), gate_up(plugin, original)
        assert torch.equal(fused.quant_method.apply(fused, x, bias), expected(original, ATTENTION, names, x))
        assert torch.equal(pair.quant_method.apply(pair, x), expected(original, MLP, FUSED["gate_up_proj"], x))
    assert [module.spec.grid.bits for module in fused.bitdistiller_parts] == [4, 3, 2]
    assert {module.weight_scale.dtype for module in fused.bitdistiller_parts} == {torch.float16, torch.float32}


SPLIT = [
    {"bits": 2},
    {"bits": 3, "group_size": 16},
    {"grid": "nf", "bits": 3},
    {"grid": "int_sym", "bits": 4, "group_size": -1},
    {"grid": "ternary", "group_size": "tensor"},
    {"grid": "ternary", "packing": "base3"},
    {"grid": "r2q"},
]


@pytest.mark.parametrize("settings", SPLIT, ids=str)
@pytest.mark.parametrize("ranks", [2, 4])
def test_shares_of_all_devices_are_the_whole(
    settings: dict[str, Any], ranks: int, plugin: ModuleType, saved: GetSaved
) -> None:
    original = saved("llama", **settings)
    shares = [qkv(plugin, original, ranks=ranks, rank=rank) for rank in range(ranks)]
    dense = [share.quant_method.dequantize_weight(share) for share in shares]
    query = torch.cat([weight[: 64 // ranks] for weight in dense])
    assert torch.equal(query, original.model.get_submodule(f"{ATTENTION}.q_proj").dequantize())
    for index, name in enumerate(("k_proj", "v_proj")):
        rows = 16 * max(1, 2 // ranks)
        parts = [w[64 // ranks + index * rows : 64 // ranks + (index + 1) * rows] for w in dense]
        whole = torch.cat(parts[:: max(1, ranks // 2)])  # with 4 devices, two share a head
        assert torch.equal(whole, original.model.get_submodule(f"{ATTENTION}.{name}").dequantize())
    columns = [down(plugin, original, ranks=ranks, rank=rank) for rank in range(ranks)]
    dense = [share.quant_method.dequantize_weight(share) for share in columns]
    assert torch.equal(torch.cat(dense, 1), original.model.get_submodule(f"{MLP}.down_proj").dequantize())


def test_a_split_that_cuts_a_group_or_a_norm_is_refused(plugin: ModuleType, saved: GetSaved) -> None:
    with pytest.raises(ConfigError, match=r"whole groups of 32 inputs: got layer .*down_proj.*Use one of \[1, 2, 4\]"):
        down(plugin, saved("llama", bits=2), ranks=8)
    for settings, what in (({"activation_bits": 8}, "int8 activations"), ({"subln": "output"}, "a SubLN")):
        with pytest.raises(ConfigError, match=rf"`tensor_parallel_size` must be 1 for layers with {what}"):
            down(plugin, saved("llama", bits=2, **settings), ranks=2)


HEAD = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]}


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_output_head_is_padded_and_split(ranks: int, plugin: ModuleType, saved: GetSaved) -> None:
    original, x = saved("llama", bits=3, **HEAD), inputs(64)
    pieces = []
    for rank in range(ranks):
        layer = engine.ParallelLMHead(96, 64, ranks=ranks, rank=rank)
        layer.build(config_of(plugin, original).get_quant_method(layer, "lm_head"))
        load(layer, original.folder, {"lm_head": None})
        with torch.no_grad(), use_backend("reference"):
            pieces.append(layer.quant_method.apply(layer, x))
    logits = torch.cat(pieces, -1)
    torch.testing.assert_close(logits[:, :96], original.model.lm_head(x).detach(), rtol=1e-6, atol=1e-6)
    assert not logits[:, 96:].any()


def test_what_is_not_quantized_stays_so(plugin: ModuleType, saved: GetSaved) -> None:
    config = config_of(plugin, saved("llama", bits=2, exclude_modules=["gate_proj", "up_proj"]))
    pair = engine.LinearBase(64, [128, 128], [128, 128])
    assert isinstance(config.get_quant_method(pair, f"{MLP}.gate_up_proj"), engine.UnquantizedLinearMethod)
    assert config.get_quant_method(engine.ParallelLMHead(96, 64), "lm_head") is None
    assert config.get_quant_method(nn.LayerNorm(4), "model.norm") is None


def test_a_fused_layer_quantized_in_part_and_fused_experts_are_refused(plugin: ModuleType, saved: GetSaved) -> None:
    config = config_of(plugin, saved("llama", bits=2, exclude_modules=["up_proj"]))
    with pytest.raises(TargetError, match=r"must all be quantized or none.*'model.layers.1.mlp.up_proj'\] are not"):
        config.get_quant_method(engine.LinearBase(64, [128, 128], [128, 128]), f"{MLP}.gate_up_proj")
    experts = nn.Module()
    experts.moe_config = SimpleNamespace()
    with pytest.raises(TargetError, match="fused experts must be served in another format"):
        config.get_quant_method(experts, f"{MLP}.experts")


def test_a_layer_that_is_fused_in_the_checkpoint_is_taken_apart(plugin: ModuleType, saved: GetSaved) -> None:
    """As Phi-3 stores its gate and up: one tensor for both, without a shard id."""
    original = saved("llama", bits=2)
    whole = saved("llama", bits=2).model.get_submodule(f"{MLP}.down_proj")  # any packed matrix with even rows
    config = config_of(plugin, original)
    config.packed_modules_mapping = {"down_proj": ["down_proj"]}
    for rank in range(2):
        layer = engine.LinearBase(128, [16, 16], [32, 32], rank=rank)
        layer.build(config.get_quant_method(layer, f"{MLP}.down_proj"))
        load(layer, original.folder, {f"{MLP}.down_proj": None})
        dense = whole.dequantize()
        mine = torch.cat([dense[16 * rank : 16 * rank + 16], dense[32 + 16 * rank : 48 + 16 * rank]])
        assert torch.equal(layer.quant_method.dequantize_weight(layer), mine)


def test_a_tensor_that_does_not_fit_is_named(plugin: ModuleType, saved: GetSaved) -> None:
    original = saved("llama", bits=2)
    layer = engine.LinearBase(128, [64], [64])
    layer.build(config_of(plugin, original).get_quant_method(layer, f"{MLP}.down_proj"))
    for wrong in (torch.zeros(64, 9, dtype=torch.int32), torch.zeros(64, 8)):
        with pytest.raises(CheckpointError, match=r"tensor 'model.layers.1.mlp.down_proj.weight' must be"):
            layer.weight.weight_loader(layer.weight, wrong)


def test_the_config_is_ours_and_closed(plugin: ModuleType, saved: GetSaved, tmp_path: Path) -> None:
    original = saved("llama", bits=2)
    section = original.model.config.quantization_config.to_dict()
    cls = plugin.BitDistillerVllmConfig
    assert engine.CONFIGS["bitdistiller"] is cls
    assert cls.from_config(section).get_name() == section["quant_method"]
    with pytest.raises(ConfigError, match="quantization_config"):
        cls.from_config({**section, "run": "this"})
    with pytest.raises(StateError, match="must be packed"):
        cls.from_config({**section, "state": "latent"})
    with pytest.raises(StateError, match="full-precision embedding"):
        cls.from_config({**section, "embeddings": ["model.embed_tokens"]})
    config = cls.from_config(section)
    config.maybe_update_config(str(original.folder))
    folder = Path(shutil.copytree(original.folder, tmp_path / "copy"))
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ChecksumError):
        config.maybe_update_config(str(folder))


def test_names_follow_the_mapping_of_the_engines_model(plugin: ModuleType, saved: GetSaved) -> None:
    def rename(name: str) -> str:
        return f"language_model.{name}"

    mapper = SimpleNamespace(
        apply_list=lambda names: [rename(name) for name in names],
        apply_dict=lambda entries: {rename(name): value for name, value in entries.items()},
    )
    config = config_of(plugin, saved("llama", bits=2, overrides={"down_proj": {"bits": 4}}))
    config.apply_vllm_mapper(mapper)
    layer = engine.LinearBase(128, [64], [64])
    layer.build(config.get_quant_method(layer, f"language_model.{MLP}.down_proj"))
    (part,) = layer.bitdistiller_layout.parts
    assert part.spec.grid == get_grid("int", 4)
    assert replace(part, rows=32).layout()[""][0] == (32, 16)
    assert config.get_quant_method(engine.ParallelLMHead(96, 64), "language_model.lm_head") is None


def test_the_entry_point_names_the_function_that_registers() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["bitdistiller"].partition(":")
    assert getattr(import_module(module), name) is register_vllm
