"""Errors, sizes and histograms are those of the loaded models, whatever the grid and the architecture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from bitdistiller_peft import BitDistillerQuantConfig, quant_summary
from bitdistiller_peft.errors import CheckpointError, UnknownNameError
from bitdistiller_peft.layers import PackedExperts, PackedLinear, iter_quantized
from bitdistiller_peft.report import measure_weights
from bitdistiller_peft.report.weights import place_of
from tests.tiny import save_base

WEIGHTS = "model.safetensors"
CASES = {
    "int": ("llama", {"grid": "int", "bits": 2, "group_size": 32}),
    "int_fine": ("llama", {"grid": "int_fine", "bits": 2, "group_size": 32}),
    "int-rows": ("llama-172", {"grid": "int", "bits": 3, "group_size": -1}),
    "int_sym-tied": ("llama-tied", {"grid": "int_sym", "bits": 4, "group_size": 32}),
    "nf": ("qwen2", {"grid": "nf", "bits": 3, "group_size": 32}),
    "nf_sym-bf16": ("llama", {"grid": "nf_sym", "bits": 4, "group_size": 64}),
    "ternary": ("llama", {"grid": "ternary", "bits": 2, "group_size": "tensor", "packing": "base3"}),
    "r2q": ("llama", {"grid": "r2q", "bits": 2, "group_size": 32}),
    "transposed": ("gpt2", {"grid": "int", "bits": 2, "group_size": 32}),
    "experts": ("mixtral", {"grid": "int", "bits": 2, "group_size": 32}),
}


def pack(case: str, folder: Path) -> tuple[Path, Path]:
    name, options = CASES[case]
    dtype = torch.bfloat16 if case.endswith("bf16") else torch.float32
    base = save_base(name, folder, dtype=dtype)
    config = BitDistillerQuantConfig(**options)
    AutoModelForCausalLM.from_pretrained(base, dtype=dtype, quantization_config=config).save_pretrained(folder / case)
    return base, folder / case


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


def errors_of_loaded_models(base: Path, packed: Path) -> dict[str, float]:
    """The relative errors, from the two models as transformers loads them."""
    full, quantized = (AutoModelForCausalLM.from_pretrained(folder) for folder in (base, packed))
    found = {}
    for name, module, parameter, _ in iter_quantized(quantized):
        if isinstance(module, PackedExperts):
            continue
        assert isinstance(module, PackedLinear)
        source = full.get_submodule(name)
        original = source.weight.detach().double()
        original = original.T if isinstance(source, Conv1D) else original
        difference = module.dequantize().double() - original
        found[f"{name}.{parameter}"] = float(difference.norm() / original.norm())
    return found


@pytest.mark.parametrize("case", CASES)
def test_errors_and_sizes_are_those_of_the_loaded_models(case: str, folders: Path) -> None:
    base, packed = pack(case, folders)
    found = measure_weights(packed, base, show_progress=False)
    expected = errors_of_loaded_models(base, packed)
    assert found.no_errors == ""
    errors = {error.name: error.relative for error in found.errors}
    assert {name: errors.pop(name) for name in expected} == pytest.approx(expected, rel=1e-5)
    assert bool(errors) == (case == "experts"), "what is left are the experts' matrices"
    assert all(0 < error < 1 for error in errors.values())
    summary = quant_summary(AutoModelForCausalLM.from_pretrained(packed)).with_files(packed)
    assert found.parts == summary.parts
    assert sum(part.stored_bits for part in found.parts) == 8 * (packed / WEIGHTS).stat().st_size


@pytest.mark.parametrize("case", ["int", "int_fine", "nf", "nf_sym-bf16", "r2q", "ternary"])
def test_a_histogram_counts_the_codes_and_knows_the_levels(case: str, folders: Path) -> None:
    base, packed = pack(case, folders)
    name = "model.layers.1.mlp.up_proj.weight"
    histogram = measure_weights(packed, base, weight=name, show_progress=False).histogram
    assert histogram is not None
    assert histogram.before is not None
    layer = AutoModelForCausalLM.from_pretrained(packed).get_submodule("model.layers.1.mlp.up_proj")
    values = layer.dequantize()
    grid = layer.spec.grid
    match case:
        case "int" | "int_fine":
            assert histogram.levels == (0, 1, 2, 3)
        case "nf" | "nf_sym-bf16":
            assert histogram.levels == pytest.approx(grid.levels, abs=1e-3)
        case "ternary":
            assert histogram.levels == (-1, 0, 1)
            shares = [float((values == value).double().mean()) for value in values.unique().tolist()]
            assert histogram.shares == pytest.approx(shares)
        case "r2q":
            low, high = histogram.levels[2:]
            assert histogram.levels == pytest.approx((-high, -low, low, high), abs=0.02)
            assert (low + high) / 2 == pytest.approx(1, abs=0.02), "plus and minus the residual, around the scale"
    assert sum(histogram.before) == pytest.approx(1)
    assert sum(histogram.after) == pytest.approx(1)
    assert sum(histogram.shares) == pytest.approx(1)
    width = histogram.edges[1] - histogram.edges[0]
    for level, share in zip(histogram.levels, histogram.shares, strict=True):
        if len(histogram.levels) <= 8 and case != "r2q":  # bins are finer than the distance of levels
            near = [
                s
                for s, at in zip(histogram.after, histogram.edges, strict=False)
                if at - width < level < at + 2 * width
            ]
            assert sum(near) == pytest.approx(share, abs=1e-6)


def test_the_histogram_before_is_that_of_the_full_precision_weight(folders: Path) -> None:
    base, packed = pack("int_sym-tied", folders)
    name = "model.layers.0.self_attn.q_proj.weight"
    found = measure_weights(packed, base, weight=name, show_progress=False).histogram
    layer = AutoModelForCausalLM.from_pretrained(packed).get_submodule("model.layers.0.self_attn.q_proj")
    scale = layer.weight_scale.float().repeat_interleave(32, dim=1)
    steps = load_file(base / WEIGHTS)[name].double() / scale.double()
    edges = torch.tensor(found.edges, dtype=torch.float64)
    counts = torch.histogram(steps.flatten().clamp(edges[0], edges[-1]), edges).hist / steps.numel()
    assert found.before == pytest.approx(counts.tolist(), abs=2 / steps.numel())
    assert found.outside < 0.003


def test_without_the_base_there_are_sizes_and_codes_but_no_errors(folders: Path, tmp_path: Path) -> None:
    base, packed = pack("int", folders)
    nothing = measure_weights(packed, None, show_progress=False)
    assert nothing.errors == ()
    assert "not on this machine" in nothing.no_errors
    assert nothing.histogram is not None
    assert nothing.histogram.before is None
    assert nothing.parts == measure_weights(packed, base, show_progress=False).parts
    assert "cannot be read" in measure_weights(packed, tmp_path, show_progress=False).no_errors
    other = save_base("gpt2", folders)
    assert "has the name and shape" in measure_weights(packed, other, show_progress=False).no_errors


def test_a_base_that_was_saved_without_its_head_is_found_by_the_end_of_the_names(folders: Path, tmp_path: Path) -> None:
    base, packed = pack("int", folders)
    bare = shutil.copytree(base, tmp_path / "bare")
    tensors = load_file(base / WEIGHTS)
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, bare / WEIGHTS)
    found = measure_weights(packed, bare, show_progress=False)
    assert [e.relative for e in found.errors] == [
        e.relative for e in measure_weights(packed, base, show_progress=False).errors
    ]


def test_the_worst_matrix_is_drawn_unless_another_is_named(folders: Path) -> None:
    base, packed = pack("int", folders)
    found = measure_weights(packed, base, show_progress=False)
    assert found.histogram is not None
    assert found.histogram.name == max(found.errors, key=lambda error: error.relative).name
    with pytest.raises(UnknownNameError, match=r"Did you mean 'model\.layers\.0\.mlp\.up_proj\.weight'"):
        measure_weights(packed, base, weight="model.layers.0.mlp.up_proj", show_progress=False)


def test_a_damaged_model_is_refused(folders: Path, tmp_path: Path) -> None:
    base, packed = pack("int", folders)
    damaged = shutil.copytree(packed, tmp_path / "damaged")
    content = bytearray((damaged / WEIGHTS).read_bytes())
    content[-3] ^= 1
    (damaged / WEIGHTS).write_bytes(content)
    with pytest.raises(CheckpointError, match=WEIGHTS):
        measure_weights(damaged, base, show_progress=False)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.mlp.up_proj.weight", (3, "mlp.up_proj")),
        ("model.layers.3.mlp.experts.7.up_proj.weight", (3, "mlp.experts.up_proj")),
        ("transformer.h.0.attn.c_attn.weight", (0, "attn.c_attn")),
        ("lm_head.weight", (-1, "lm_head")),
    ],
)
def test_a_name_has_a_layer_and_a_module(name: str, place: tuple[int, str]) -> None:
    assert place_of(name) == place


def test_the_config_of_the_packed_model_is_left_alone(folders: Path) -> None:
    base, packed = pack("int", folders)
    before = {path.name: path.read_bytes() for path in packed.iterdir()}
    measure_weights(packed, base, show_progress=False)
    assert {path.name: path.read_bytes() for path in packed.iterdir()} == before
    assert json.loads(before["config.json"])["quantization_config"]["state"] == "packed"
