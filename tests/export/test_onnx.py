"""onnxruntime multiplies by exactly the packed weights, and its graph with a cache answers as the packed model does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from benchmarks import _serve_onnx
from bitdistiller_peft import export_model, use_backend, verify_export
from bitdistiller_peft.errors import ExportError
from bitdistiller_peft.export.onnx_graph import float_graph, refuse_model
from bitdistiller_peft.export.source import open_source
from tests.tiny import load, token_ids

Packed = Callable[..., Path]
Feed = dict[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def exported(packed: Packed, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """`exported("llama-tied", bits=2)`: the folders of the packed and of the exported model."""
    known: dict[str, tuple[Path, Path]] = {}

    def get(arch: str, *, widen_to: int | None = None, **settings: Any) -> tuple[Path, Path]:
        key = f"{arch} {widen_to} {settings}"
        if key not in known:
            folder = tmp_path_factory.mktemp("onnx") / "out"
            export_model(packed(arch, **settings), "onnx", folder, widen_to=widen_to)
            known[key] = packed(arch, **settings), folder
        return known[key]

    return get


def initializers(folder: Path) -> dict[str, onnx.TensorProto]:
    model = onnx.load(folder / "model.onnx")
    return {tensor.name: tensor for tensor in model.graph.initializer}


def weight_in_onnxruntime(node: onnx.NodeProto, folder: Path) -> np.ndarray[Any, Any]:
    """The matrix ``[out, in]`` that a node multiplies by: its product with the identity."""
    sizes = {attribute.name: attribute.i for attribute in node.attribute}
    stored = initializers(folder)
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    casts = [other for other in graph.node if other.op_type == "Cast" and other.output[0] in node.input]
    names = [other.input[0] for other in casts] + [name for name in node.input if name in stored]
    kind, x, y = onnx.TensorProto.FLOAT, node.input[0], node.output[0]
    small = onnx.helper.make_graph(
        [*casts, node],
        "product",
        [onnx.helper.make_tensor_value_info(x, kind, ["rows", sizes["K"]])],
        [onnx.helper.make_tensor_value_info(y, kind, ["rows", sizes["N"]])],
        [stored[name] for name in names],
    )
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(small, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    product: np.ndarray[Any, Any] = session.run(None, {x: np.eye(sizes["K"], dtype=np.float32)})[0]
    return product.T


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 2, "group_size": 16},
        {"bits": 2, "group_size": 64},
        {"bits": 4, "scale_dtype": "bfloat16"},
        {"bits": 8, "scale_dtype": "float32"},
        {"bits": 3, "widen_to": 4},
        {"bits": 2, "widen_to": 8},
        {"grid": "int_sym", "bits": 2},
        {"grid": "int_sym", "bits": 2, "widen_to": 4},
        {"grid": "ternary", "group_size": "tensor"},
        {"grid": "r2q", "bits": 2, "tied": True},
        {"grid": "int_fine", "bits": 2},
        {"grid": "int_fine", "bits": 3, "scale_dtype": "bfloat16", "widen_to": 4},
        {"grid": "int_fine", "bits": 4, "group_size": 16},
    ],
    ids=str,
)
def test_onnxruntime_multiplies_by_exactly_the_packed_weights(
    settings: dict[str, Any], exported: Callable[..., tuple[Path, Path]]
) -> None:
    source, folder = exported("llama-tied", **settings)
    products = [n for n in onnx.load(folder / "model.onnx").graph.node if n.op_type == "MatMulNBits"]
    with open_source(source) as opened:
        dense = {weight.name: weight.dense() for weight in opened.weights()}
        assert sorted(dense) == sorted(node.input[1] for node in products)
        for node in products[:7]:  # one layer: q, k, v, o, gate, up, down
            found = weight_in_onnxruntime(node, folder)
            assert torch.equal(torch.from_numpy(found.copy()), dense[node.input[1]]), node.name


def run(session: Any, feed: Feed) -> tuple[np.ndarray[Any, Any], Feed]:
    names = [entry.name for entry in session.get_inputs()]
    found = session.run(None, {name: feed[name] for name in names})
    return found[0], dict(zip([name for name in names if name.startswith("past")], found[1:], strict=True))


def assert_logits_are_those_of_the_packed_model(source: Path, folder: Path, length: int) -> None:
    """A padded batch in three pieces, the first behind an empty cache, the last two behind what came before."""
    ids = token_ids(length=length)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), use_backend("reference"):
        ours = load(source)(input_ids=ids, attention_mask=mask, position_ids=positions).logits.numpy()
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    cached = [entry for entry in session.get_inputs() if entry.name.startswith("past")]
    past: Feed = {entry.name: np.zeros((len(ids), entry.shape[1], 0, entry.shape[3]), np.float32) for entry in cached}
    pieces = []
    for start, end in ((0, 5), (5, length - 1), (length - 1, length)):
        part = {
            "input_ids": ids[:, start:end],
            "position_ids": positions[:, start:end],
            "attention_mask": mask[:, :end],
        }
        logits, past = run(session, {name: tensor.numpy() for name, tensor in part.items()} | past)
        pieces.append(logits)
    difference = np.abs(np.concatenate(pieces, 1) - ours)[mask.numpy().astype(bool)]
    assert difference.max() < 2e-6 * np.abs(ours).max()


def test_a_padded_batch_behind_a_cache_gives_the_packed_models_logits(
    exported: Callable[..., tuple[Path, Path]],
) -> None:
    assert_logits_are_those_of_the_packed_model(*exported("llama-tied", bits=2, group_size=64), length=9)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "llama-172", "qwen2", "qwen3", "gpt2", "opt", "gemma2", "gemma3", "mistral"])
def test_every_architecture_gives_the_packed_models_logits(
    arch: str, exported: Callable[..., tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import MistralConfig

    from tests import tiny

    mistral = {"mistral": lambda: MistralConfig(**tiny.DECODER, sliding_window=32)}
    monkeypatch.setattr(tiny, "CONFIGS", tiny.CONFIGS | mistral)
    group_size = -1 if arch == "llama-172" else 32
    # longer than the sliding windows, which are of 32 tokens
    assert_logits_are_those_of_the_packed_model(*exported(arch, bits=2, group_size=group_size), length=41)


def test_the_benchmarks_engine_generates_what_the_packed_model_does(
    exported: Callable[..., tuple[Path, Path]],
) -> None:
    source, folder = exported("llama-tied", bits=2, group_size=64)
    model, prompt = load(source), token_ids(batch=1, length=5)
    ours = model.generate(prompt, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)[0, 5:].tolist()
    ids, best, second = _serve_onnx.generate(folder, prompt[0].tolist(), 12)
    assert ids == ours
    assert all(low <= high <= 0 for low, high in zip(second, best, strict=True))
    found = verify_export(
        source,
        folder,
        "onnx",
        engine=lambda where, tokens: torch.from_numpy(_serve_onnx.logits(where, tokens.numpy()[None])[0]),
        engine_tolerance=1e-5,
    )
    assert len(found.logits) == 2


def test_onnxs_own_checker_accepts_the_file_and_it_tells_no_paths(exported: Callable[..., tuple[Path, Path]]) -> None:
    _, folder = exported("llama-tied", bits=2, group_size=64)
    onnx.checker.check_model(str(folder / "model.onnx"))
    assert b".py" not in (folder / "model.onnx").read_bytes()


def test_tensors_are_stored_in_the_dtypes_they_were_trained_in(exported: Callable[..., tuple[Path, Path]]) -> None:
    source, folder = exported("llama-tied", bits=2, group_size=64)
    stored = initializers(folder)
    assert stored["model.layers.0.mlp.down_proj.weight_scale"].data_type == onnx.TensorProto.FLOAT16
    assert numpy_helper.to_array(stored["model.layers.0.mlp.down_proj.weight"]).shape == (64, 2, 16)  # 4 codes a byte
    with open_source(source) as opened:
        outside = [name for name, tensor in stored.items() if len(tensor.raw_data) > 64 and "weight" not in name]
        assert not outside, "nothing large beside the model's own tensors"
        assert set(opened.plain_names) <= set(stored)


def test_a_wrong_nibble_of_half_step_levels_is_caught(
    exported: Callable[..., tuple[Path, Path]], packed: Packed
) -> None:
    source, folder = exported("llama-tied", grid="r2q", bits=2, tied=True)
    path = folder / "model.onnx.data"
    content = bytearray(path.read_bytes())
    content[len(content) // 4] ^= 0x10
    try:
        path.write_bytes(content)
        with pytest.raises(ExportError, match="must equal the packed model's"):
            verify_export(source, folder, "onnx", logits=False)
    finally:
        content[len(content) // 4] ^= 0x10
        path.write_bytes(content)


@pytest.mark.parametrize("change", ["scales of another layer", "another width", "a permutation", "a product lost"])
def test_a_graph_that_uses_the_tensors_wrongly_is_caught(
    change: str, exported: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    source, folder = exported("llama-tied", bits=2, group_size=64)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    first, second = [n for n in model.graph.node if n.op_type == "MatMulNBits" and n.name.endswith("down_proj")]
    if change == "scales of another layer":
        first.input[2] = second.input[2]
    elif change == "another width":
        next(attribute for attribute in first.attribute if attribute.name == "bits").i = 4
    elif change == "a permutation":
        first.input.extend([""] * (4 - len(first.input)) + ["g_idx"])
    else:
        first.op_type = "MatMul"
    onnx.save(model, tmp_path / "model.onnx")
    (tmp_path / "model.onnx.data").write_bytes((folder / "model.onnx.data").read_bytes())
    with pytest.raises(ExportError, match="down_proj"):
        verify_export(source, tmp_path, "onnx", logits=False)


def test_the_float_graph_has_every_tensor_as_an_input_and_no_weight_inside(packed: Packed) -> None:
    with open_source(packed("llama-tied", bits=2, group_size=64)) as source:
        graph = float_graph(source).graph
        names = {entry.name for entry in graph.input}
        assert {*source.quantized_names, *source.plain_names} <= names
    assert {"input_ids", "attention_mask", "position_ids", "past_key_values.1.value"} <= names
    assert [entry.name for entry in graph.output][:3] == ["logits", "present.0.key", "present.0.value"]
    assert sum(len(tensor.raw_data) for tensor in graph.initializer) < 1024


def test_rotations_that_depend_on_the_length_are_refused(packed: Packed) -> None:
    with open_source(packed("llama-tied", bits=2, group_size=64)) as source:
        assert refuse_model(source, {}) is None
        source.config["rope_parameters"] = {"full_attention": {"rope_type": "dynamic", "factor": 2.0}}
        assert "rope_type='dynamic' depends on the length" in str(refuse_model(source, {}))
