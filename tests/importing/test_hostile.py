"""Damaged and lying files of other tools are refused by our own errors, at once, and without their memory."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file

from bitdistiller_peft import import_model
from bitdistiller_peft.errors import BitDistillerError, CheckpointError, ForeignModelError
from bitdistiller_peft.importing.gguf import _sizes
from bitdistiller_peft.importing.gguf_file import GgufFile
from tests.importing import foreign as f
from tests.importing.test_foreign_writers import write_gguf


@pytest.fixture
def folder(base: Path, tmp_path: Path, generator: torch.Generator) -> Path:
    """A GPTQ checkpoint (v1, 4 bits) to be damaged."""
    weights = {layer: f.draw(shape, 4, generator) for layer, shape in f.LAYERS.items()}
    return f.gptq_folder(base, tmp_path / "gptq", weights, 4)


@pytest.fixture
def nf4(base: Path, tmp_path: Path, generator: torch.Generator) -> Path:
    """A double-quantized NF4 checkpoint to be damaged."""
    from bitsandbytes.functional import quantize_4bit

    def compress(layer: str) -> f.Tensors:
        weight = torch.randn(f.LAYERS[layer], generator=generator)
        data, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
        return {"weight": data, **{f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}}

    section = {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}
    return f.write_folder(base, tmp_path / "nf4", section, compress)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


Damage = Callable[[Path], object]
FOLDERS: dict[str, Damage] = {
    "pickle": lambda p: (p / f.WEIGHTS).rename(p / "pytorch_model.bin"),
    "no-config": lambda p: (p / "config.json").unlink(),
    "cut": lambda p: (p / f.WEIGHTS).write_bytes((p / f.WEIGHTS).read_bytes()[:-100]),
    "long-header": lambda p: (p / f.WEIGHTS).write_bytes(b"\xff" * 8 + (p / f.WEIGHTS).read_bytes()[8:]),
    "elsewhere": lambda p: ((p / f.WEIGHTS).rename(p.parent / "x"), (p / f.WEIGHTS).symlink_to(p.parent / "x")),
    "huge-model": lambda p: edit_json(p / "config.json", hidden_size=1 << 40),
    "many-layers": lambda p: edit_json(p / "config.json", num_hidden_layers=10**6),
    "more-layers": lambda p: edit_json(p / "config.json", num_hidden_layers=3),
    "other-width": lambda p: edit_json(p / "config.json", intermediate_size=256),
    "heads": lambda p: edit_json(p / "config.json", num_attention_heads=0),
    "no-type": lambda p: edit_json(p / "config.json", model_type=None),
    "unknown-type": lambda p: edit_json(p / "config.json", model_type="mine", auto_map={"AutoConfig": "evil.Config"}),
    "code": lambda p: edit_json(p / "config.json", attn_implementation="somebody/kernel:run"),
    "section-a-list": lambda p: edit_json(p / "config.json", quantization_config=[1]),
    "two-widths": lambda p: f.edit(p, {}, bits=3),
    "words": lambda p: f.edit(p, {f"{f.DOWN}.qweight": torch.zeros(15, 64, dtype=torch.int32)}),
    "floats-for-words": lambda p: f.edit(p, {f"{f.DOWN}.qweight": torch.zeros(16, 64)}),
    "no-scales": lambda p: f.edit(p, {f"{f.DOWN}.scales": None}),
    "no-groups": lambda p: f.edit(p, {f"{f.DOWN}.scales": torch.zeros(0, 64).half()}),
    "other-groups": lambda p: f.edit(p, {f"{f.DOWN}.scales": torch.ones(3, 64).half()}),
    "scalar-scale": lambda p: f.edit(p, {f"{f.DOWN}.scales": torch.tensor(1.0).half()}),
    "norm-of-another-width": lambda p: f.edit(p, {"model.norm.weight": torch.ones(63)}),
    "embedding-of-integers": lambda p: f.edit(p, {"model.norm.weight": torch.ones(64, dtype=torch.int32)}),
}


@pytest.mark.parametrize("damage", FOLDERS)
def test_damaged_folders_are_refused(damage: str, folder: Path) -> None:
    FOLDERS[damage](folder)
    with pytest.raises((CheckpointError, ForeignModelError)):
        import_model(folder)


def state_of(changes: dict[str, Any]) -> Damage:
    def damage(folder: Path) -> object:
        name = f"{f.DOWN}.weight.quant_state.bitsandbytes__nf4"
        state = json.loads(bytes(load_file(folder / f.WEIGHTS)[name].tolist()))
        return f.edit(folder, {name: torch.tensor(list(json.dumps(state | changes).encode()), dtype=torch.uint8)})

    return damage


NAME = f"{f.DOWN}.weight"
STATES: dict[str, Damage] = {
    "not-json": lambda p: f.edit(p, {f"{NAME}.quant_state.bitsandbytes__nf4": torch.ones(9, dtype=torch.uint8)}),
    "a-list": lambda p: f.edit(
        p, {f"{NAME}.quant_state.bitsandbytes__nf4": torch.tensor(list(b"[1]"), dtype=torch.uint8)}
    ),
    "blocksize-0": state_of({"blocksize": 0}),
    "blocksize-text": state_of({"blocksize": "64"}),
    "blocksize-32": state_of({"blocksize": 32}),
    "blocksize-huge": state_of({"blocksize": 1 << 60}),
    "shape": state_of({"shape": [128, 64]}),
    "type": state_of({"quant_type": "fp4"}),
    "nested-0": state_of({"nested_blocksize": 0}),
    "offset": state_of({"nested_offset": None}),
    "table": lambda p: f.edit(p, {f"{NAME}.quant_map": torch.linspace(-1, 1, 16)}),
    "half-the-codes": lambda p: f.edit(p, {NAME: torch.zeros(2048, 1, dtype=torch.uint8)}),
    "negative": lambda p: f.edit(p, {f"{NAME}.nested_absmax": torch.tensor([-1e9])}),
    "nan": lambda p: f.edit(p, {f"{NAME}.nested_absmax": torch.tensor([torch.nan])}),
}


@pytest.mark.parametrize("damage", STATES)
def test_damaged_states_of_bitsandbytes_are_refused(damage: str, nf4: Path) -> None:
    STATES[damage](nf4)
    with pytest.raises((CheckpointError, ForeignModelError)):
        import_model(nf4)


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole GGUF file."""
    kind = gguf.GGMLQuantizationType.Q4_0
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(base, path, "Q4_0", lambda array: gguf.quants.quantize(array, kind))
    return path


def test_a_gguf_file_cut_anywhere_is_refused(whole: Path, tmp_path: Path) -> None:
    content, sizes = whole.read_bytes(), _sizes()
    header = content.index(b"blk.1.ffn_up.weight")
    for length in (*range(0, header, 7), header, len(content) // 2, len(content) - 1000):
        (tmp_path / "cut.gguf").write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            GgufFile(tmp_path / "cut.gguf", sizes)


def test_a_gguf_file_with_other_bytes_opens_or_is_refused(whole: Path, tmp_path: Path) -> None:
    """Lengths of 2**63, types that do not exist, offsets outside: whatever a flipped header byte makes."""
    content, sizes, draw = whole.read_bytes(), _sizes(), random.Random(0)
    header = content.index(b"blk.1.ffn_up.weight")
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        at = draw.randrange(header)
        damaged[at] = draw.choice((0, 255, 128, damaged[at] ^ (1 << draw.randrange(8))))
        (tmp_path / "damaged.gguf").write_bytes(damaged)
        try:
            GgufFile(tmp_path / "damaged.gguf", sizes)
        except BitDistillerError:
            refused += 1
    assert refused > 30


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.block_count", 1 << 30),
        ("llama.block_count", 3),
        ("llama.embedding_length", 128),
        ("llama.attention.head_count", 0),
        ("llama.attention.head_count_kv", 3),
        ("llama.feed_forward_length", 64),
    ],
)
def test_a_gguf_file_that_describes_another_model_is_refused(key: str, value: int, whole: Path, tmp_path: Path) -> None:
    content = bytearray(whole.read_bytes())
    at = content.index(struct.pack("<Q", len(key)) + key.encode()) + 8 + len(key)
    assert struct.unpack_from("<I", content, at) == (4,)  # uint32
    struct.pack_into("<I", content, at + 4, value)
    (tmp_path / "other.gguf").write_bytes(content)
    with pytest.raises((CheckpointError, ForeignModelError)):
        import_model(tmp_path / "other.gguf")


def test_other_architectures_are_refused(whole: Path, tmp_path: Path) -> None:
    content = whole.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0gemma", 1)
    (tmp_path / "gemma.gguf").write_bytes(content)
    with pytest.raises(ForeignModelError, match=r"must be one of \['llama', 'qwen2', 'qwen3'\]: got 'gemma'"):
        import_model(tmp_path / "gemma.gguf")
