"""OpenVINO multiplies by exactly the packed weights, and its graph with a cache answers as the packed model does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import torch
from torch import Tensor

from benchmarks._serve_openvino import Graph
from bitdistiller_peft import export_model, use_backend, verify_export
from bitdistiller_peft.errors import ExportError
from tests.tiny import load, token_ids

Packed = Callable[..., Path]
SETTINGS = {"bits": 2, "group_size": 64}
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


@pytest.fixture(scope="module")
def exported(packed: Packed, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of a packed and of the exported model."""
    folder = tmp_path_factory.mktemp("openvino") / "out"
    export_model(packed("llama-tied", **SETTINGS), "openvino", folder)
    return packed("llama-tied", **SETTINGS), folder


def run(folder: Path, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of padded sequences, without a cache and with activations in float32."""
    request = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", EXACT).create_infer_request()
    feed: dict[str, Any] = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    feed["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0).numpy()
    for entry in request.model_inputs:
        shape = entry.get_partial_shape()
        if entry.get_any_name().startswith("past_key_values."):
            sizes = (len(ids), shape[1].get_length(), 0, shape[3].get_length())
            feed[entry.get_any_name()] = np.zeros(sizes, np.float32)
    request.infer(feed)
    return torch.from_numpy(request.get_tensor("logits").data.copy())


@torch.no_grad()
def test_logits_of_padded_sequences_are_those_of_the_packed_model(exported: tuple[Path, Path]) -> None:
    source, folder = exported
    ids, mask = token_ids(batch=2, length=9), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :3] = 0
    with use_backend("reference"):
        model = load(source, dtype=torch.float32)
        ours = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    theirs = run(folder, ids, mask)
    seen = mask.bool()
    torch.testing.assert_close(theirs[seen], ours[seen], rtol=0, atol=1e-5 * float(ours.abs().max()))


def test_a_cache_gives_the_logits_of_the_whole_sequence(exported: tuple[Path, Path]) -> None:
    graph, ids = Graph(exported[1]), token_ids(batch=1, length=11)[0].tolist()
    whole, _ = graph.step(ids, graph.empty_cache())
    head, cache = graph.step(ids[:7], graph.empty_cache())
    tail, _ = graph.step(ids[7:], cache)
    torch.testing.assert_close(torch.cat([head, tail]), whole, rtol=0, atol=1e-3 * float(whole.abs().max()))


def test_as_it_comes_the_engine_is_as_near_as_its_int8_activations_allow(exported: tuple[Path, Path]) -> None:
    source, folder = exported

    def engine(where: Path, ids: Tensor) -> Tensor:
        graph = Graph(where)
        return graph.step(ids.tolist(), graph.empty_cache())[0]

    assert len(verify_export(source, folder, "openvino", engine=engine, engine_tolerance=0.03).logits) == 2


def test_integers_are_stored_in_their_own_width(exported: tuple[Path, Path]) -> None:
    model = openvino.Core().read_model(exported[1] / "openvino_model.xml")
    kinds = {
        node.get_friendly_name(): node.get_element_type().get_type_name()
        for node in model.get_ordered_ops()
        if node.get_type_name() == "Constant" and ".down_proj." in node.get_friendly_name()
    }
    name = "model.layers.0.mlp.down_proj.weight"
    assert [kinds[name + suffix] for suffix in ("", "_zero_point", "_scale")] == ["u2", "u2", "f16"]


@pytest.mark.parametrize(
    ("arch", "settings", "options", "reason"),
    [
        ("llama-tied", {"bits": 3}, {}, "3-bit codes are none of the widths that OpenVINO stores"),
        ("llama-tied", {"bits": 8}, {"widen_to": 4}, "8-bit codes do not fit into 4 bits"),
        ("llama-tied", {"bits": 3, "grid": "nf"}, {"widen_to": 4}, "grid 'nf' is not scale"),
        ("mixtral", {"bits": 2}, {}, "architecture 'MixtralForCausalLM'"),
    ],
    ids=["three-bits", "too-narrow", "nf", "architecture"],
)
def test_what_it_cannot_hold_is_refused(
    arch: str, settings: dict[str, Any], options: dict[str, Any], reason: str, packed: Packed, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=reason):
        export_model(packed(arch, **settings), "openvino", tmp_path / "out", **options)
