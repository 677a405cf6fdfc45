"""Every format holds a packed model exactly, says so through its reader, and a damaged nibble never passes."""

from __future__ import annotations

import json
import random
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from bitdistiller_peft import export_model, verify_export
from bitdistiller_peft.errors import ExportError
from bitdistiller_peft.export import ExportReport, export_format_names
from bitdistiller_peft.hub.header import read_header

Packed = Callable[..., Path]


class Case(NamedTuple):
    """A format with options, and a model that it holds."""

    format: str
    options: dict[str, Any]
    arch: str
    model: dict[str, Any]

    def __str__(self) -> str:
        parts = [self.format, *(f"{k}={v}" for k, v in self.options.items()), self.arch]
        return "-".join([*parts, *(f"{k}={v}" for k, v in self.model.items())])


TERNARY = {"grid": "ternary", "group_size": "tensor", "activation_bits": 8, "scale_dtype": "float32"}
TWO_BIT_GGUF = Case("gguf", {}, "llama", {"bits": 2, "group_size": 64, "zero_point_range": (1, 2)})
CASES = [
    Case("dequantized", {}, "llama", {"grid": "nf", "bits": 3}),
    Case("dequantized", {}, "llama", {"grid": "fp", "bits": 4}),
    Case("dequantized", {}, "qwen3", {"grid": "r2q", "refine": "least_squares"}),
    Case("dequantized", {}, "llama", {"grid": "ternary", "packing": "base3"}),
    Case("dequantized", {"dtype": "float16"}, "gpt2", {"bits": 2}),
    Case("dequantized", {"dtype": "bfloat16"}, "mixtral", {"bits": 4}),
    Case("compressed-tensors", {}, "llama", {"bits": 2}),
    Case("compressed-tensors", {}, "llama", {"bits": 3}),
    Case("compressed-tensors", {}, "qwen2", {"grid": "int_sym", "bits": 4}),
    Case("compressed-tensors", {}, "opt", {"bits": 8, "group_size": -1}),
    Case("compressed-tensors", {}, "llama-172", {"bits": 3, "group_size": -1}),
    Case("compressed-tensors", {}, "llama", {"grid": "ternary", "group_size": "tensor"}),
    Case("compressed-tensors", {"widen_to": 4}, "mixtral", {"bits": 3}),
    Case("compressed-tensors", {"widen_to": 4}, "llama-tied", {"grid": "int_sym", "bits": 2}),
    Case("compressed-tensors", {}, "llama", {"bits": 2, "overrides": {"down_proj": {"bits": 4}}}),
    Case("gguf", {}, "llama", {"bits": 2}),
    Case("gguf", {}, "llama-tied", {"bits": 3}),
    Case("gguf", {}, "qwen2", {"grid": "int_sym", "bits": 4}),
    Case("gguf", {}, "llama", {"grid": "int_sym", "bits": 8}),
    TWO_BIT_GGUF,
    Case("gguf", {"carrier": "Q4_1"}, "llama", {"bits": 2, "zero_point_range": (1, 2)}),
    Case("gguf", {"carrier": "F16"}, "llama", {"grid": "nf", "bits": 3}),
    Case("gguf", {"carrier": "BF16"}, "qwen2", {"bits": 3, "group_size": 16}),
    Case("gptq", {}, "llama", {"bits": 2}),
    Case("gptq", {}, "qwen2", {"bits": 3}),
    Case("gptq", {"version": 1}, "llama", {"grid": "int_sym", "bits": 4}),
    Case("gptq", {}, "opt", {"bits": 8, "group_size": -1}),
    Case("awq", {}, "llama", {"bits": 4}),
    Case("awq", {}, "qwen2", {"bits": 2}),
    Case("bitnet", {}, "llama", TERNARY),
    Case("mlx", {}, "llama", {"bits": 2}),
    Case("mlx", {}, "qwen2", {"bits": 3, "group_size": 64}),
    Case("mlx", {}, "llama-tied", {"grid": "int_sym", "bits": 4}),
    Case("onnx", {}, "llama-tied", {"bits": 2}),
    Case("onnx", {"widen_to": 4}, "llama-tied", {"bits": 3}),
    Case("onnx", {}, "llama-tied", {"grid": "int_sym", "bits": 4, "scale_dtype": "bfloat16"}),
    Case("onnx", {}, "llama-tied", {"grid": "ternary", "group_size": "tensor"}),
    Case("onnx", {}, "llama-tied", {"bits": 8, "group_size": -1, "overrides": {"down_proj": {"bits": 2}}}),
    Case("openvino", {}, "llama-tied", {"bits": 2}),
    Case("openvino", {"widen_to": 4}, "llama-tied", {"bits": 3}),
    Case("openvino", {}, "llama-tied", {"grid": "int_sym", "bits": 4, "scale_dtype": "bfloat16"}),
    Case("openvino", {}, "llama-tied", {"grid": "ternary", "group_size": "tensor"}),
    Case("openvino", {}, "llama-tied", {"bits": 8, "group_size": -1, "overrides": {"down_proj": {"bits": 2}}}),
    Case("openvino", {}, "gpt2", {"bits": 2}),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(scope="module")
def exported(packed: Packed, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], ExportReport]:
    known: dict[str, ExportReport] = {}

    def get(case: Case) -> ExportReport:
        if case.format == "mlx":
            pytest.importorskip("mlx", reason="mlx has no wheels for some machines")
        if str(case) not in known:
            folder = tmp_path_factory.mktemp("exported") / case.format
            known[str(case)] = export_model(packed(case.arch, **case.model), case.format, folder, **case.options)
        return known[str(case)]

    return get


@each_case
def test_a_model_goes_over_code_by_code(case: Case, packed: Packed, exported: Callable[[Case], ExportReport]) -> None:
    report = exported(case)
    source = packed(case.arch, **case.model)
    assert report.verification == verify_export(source, report.folder, case.format)
    found = report.verification
    assert found.num_weights > 0
    is_dense = case.format == "dequantized" or case.options.get("carrier") in {"F16", "BF16"}
    assert (found.num_codes, found.num_scales > 0) == ((0, False) if is_dense else (found.num_values, True))
    assert (report.folder / "config.json").exists() == (case.format != "gguf")
    assert not list(report.folder.parent.glob(".*")), "nothing is left behind"


def places(folder: Path) -> Iterator[tuple[Path, int, int]]:
    """File, first and last byte of every tensor of an exported model."""
    for path in folder.glob("*.safetensors"):
        entries, start = read_header(path)
        for entry in entries.values():
            yield path, start + entry["data_offsets"][0], start + entry["data_offsets"][1]
    for path in folder.glob("*.onnx"):
        import onnx

        for initializer in onnx.load(path, load_external_data=False).graph.initializer:
            if initializer.data_location == onnx.TensorProto.EXTERNAL:
                entry = {item.key: item.value for item in initializer.external_data}
                start = int(entry["offset"])
                yield folder / entry["location"], start, start + int(entry["length"])
    for path in folder.glob("openvino_model.xml"):
        for layer in ElementTree.parse(path).iterfind(".//layer[@type='Const']"):
            data = layer.find("data")
            # the graph's own constants have other names
            if data is not None and (".weight" in layer.get("name", "") or layer.get("name", "").endswith(".bias")):
                start, size = int(data.get("offset", 0)), int(data.get("size", 0))
                yield path.with_suffix(".bin"), start, start + size
    for path in folder.glob("*.gguf"):
        import gguf

        reader = gguf.GGUFReader(path)
        for tensor in reader.tensors:
            yield path, tensor.data_offset, tensor.data_offset + tensor.n_bytes


# the released package cannot list the tensors of llama.cpp's newest type; the next test damages those
@pytest.mark.parametrize("case", [case for case in CASES if case != TWO_BIT_GGUF], ids=str)
def test_one_wrong_nibble_is_caught_wherever_it_is(
    case: Case, packed: Packed, exported: Callable[[Case], ExportReport], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(exported(case).folder, tmp_path / "copy"))
    draw = random.Random(str(case))
    for path, start, end in draw.sample(sorted(places(folder)), 6):
        content = bytearray(path.read_bytes())
        at = draw.randrange(start, end)
        kept = content[at]
        content[at] ^= draw.choice((0x01, 0x10, 0x02, 0x20))
        path.write_bytes(content)
        with pytest.raises(ExportError):
            verify_export(packed(case.arch, **case.model), folder, case.format)
        content[at] = kept
        path.write_bytes(content)
    verify_export(packed(case.arch, **case.model), folder, case.format, logits=False)


def test_a_wrong_nibble_in_llama_cpps_two_bit_type_is_caught(with_tokenizer: Path, tmp_path: Path) -> None:
    export_model(with_tokenizer, "gguf", tmp_path / "out")
    path = tmp_path / "out" / "model.gguf"
    content = np.fromfile(path, dtype=np.uint8)
    content[-40] ^= 0x10  # the last tensor ends the file, and is a quantized matrix
    content.tofile(path)
    with pytest.raises(ExportError, match="must equal the packed model's"):
        verify_export(with_tokenizer, tmp_path / "out", "gguf")


def test_every_registered_format_is_tested_here() -> None:
    assert {case.format for case in CASES} == set(export_format_names())


def test_a_model_in_memory_exports_like_its_folder(packed: Packed, tmp_path: Path) -> None:
    from tests.tiny import load

    folder = packed("llama", bits=2)
    export_model(load(folder), "compressed-tensors", tmp_path / "memory")
    export_model(folder, "compressed-tensors", tmp_path / "disk")
    ours, theirs = (tmp_path / name / "model.safetensors" for name in ("memory", "disk"))
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral"])
def test_transformers_loads_the_dequantized_model_with_equal_logits(arch: str, packed: Packed, tmp_path: Path) -> None:
    from tests.hub.models import logits
    from tests.tiny import load

    source = packed(arch, bits=2)
    export_model(source, "dequantized", tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(source)))


def test_transformers_loads_bitnet_and_multiplies_by_the_stored_scales(packed: Packed, tmp_path: Path) -> None:
    from tests.hub.models import logits
    from tests.tiny import load

    source = packed("llama", **TERNARY)
    export_model(source, "bitnet", tmp_path / "out")
    theirs, ours = logits(load(tmp_path / "out")), logits(load(source))
    # both quantize activations to int8; a value on the edge between two codes may fall to either side
    assert (theirs - ours).abs().max() < 0.02 * ours.abs().max()


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("bits", [2, 3])
def test_transformers_loads_compressed_tensors_with_equal_logits(bits: int, packed: Packed, tmp_path: Path) -> None:
    from transformers import CompressedTensorsConfig

    from tests.hub.models import logits
    from tests.tiny import load

    source = packed("llama", bits=bits)
    dense, out = tmp_path / "dense", tmp_path / "out"
    export_model(source, "dequantized", dense, dtype="float16")
    export_model(source, "compressed-tensors", out)
    theirs = load(out, quantization_config=CompressedTensorsConfig(dequantize=True), dtype=torch.float32)
    # the library multiplies in the scale's dtype, float16: one rounding of the very same products
    assert torch.equal(logits(theirs), logits(load(dense, dtype=torch.float32)))
