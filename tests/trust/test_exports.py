"""Files that an export starts from, and files that one has written, are not believed either."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from bitdistiller_peft import export_model, verify_export
from bitdistiller_peft.errors import BitDistillerError, CheckpointError, ExportError
from bitdistiller_peft.export.source import PackedSource
from bitdistiller_peft.importing.locate import open_foreign
from tests.hub.models import copy_of
from tests.trust import damage as d
from tests.trust.reader_files import Reader
from tests.trust.test_readers import REMEDY, TEXTS, outcome, variants

GetFolder = Callable[..., Path]
FORMATS = {"dequantized": "model.safetensors", "compressed-tensors": "model.safetensors", "gguf": "model.gguf"}
CUTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda b: b"",
    "cut-in-the-header": lambda b: b[:60],
    "cut-in-half": lambda b: b[: len(b) // 2],
    "cut-by-a-byte": lambda b: b[:-1],
    "zeros": lambda b: bytes(len(b)),
    "ones": lambda b: b[:8] + b"\xff" * (len(b) - 8),
}


@pytest.fixture(scope="module")
def exports(packed_folder: GetFolder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A packed model of 4 bits, exported."""
    folder, made = tmp_path_factory.mktemp("exports"), {}
    for name in FORMATS:
        export_model(packed_folder("llama", bits=4, grid="int_sym"), name, folder / name)
        made[name] = folder / name
    return made


def message_of(call: Callable[[], object], *names: str) -> str:
    with pytest.raises(BitDistillerError) as caught:
        call()
    message = str(caught.value)
    assert any(name in message for name in names), message
    assert REMEDY.search(message), message
    assert len(message) < 1500
    return message


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_export_is_told_in_our_words(
    name: str, cut: str, exports: dict[str, Path], packed_folder: GetFolder, tmp_path: Path
) -> None:
    folder = copy_of(exports[name], tmp_path / "export")
    path = folder / FORMATS[name]
    path.write_bytes(CUTS[cut](path.read_bytes()))
    packed = packed_folder("llama", bits=4, grid="int_sym")
    with pytest.raises(ExportError):
        verify_export(packed, folder, name, logits=False)
    message_of(lambda: verify_export(packed, folder, name, logits=False), str(folder), path.name)
    if name == "gguf":
        message_of(lambda: open_foreign(path), path.name)


@pytest.mark.parametrize("text", TEXTS)
def test_a_damaged_config_of_an_export_is_told_in_our_words(
    text: str, exports: dict[str, Path], packed_folder: GetFolder, tmp_path: Path
) -> None:
    folder = copy_of(exports["compressed-tensors"], tmp_path / "export")
    path = folder / "config.json"
    path.write_bytes(TEXTS[text](path.read_bytes()))
    packed = packed_folder("llama", bits=4, grid="int_sym")
    message_of(lambda: verify_export(packed, folder, "compressed-tensors", logits=False), str(folder))
    message_of(lambda: open_foreign(folder), "config.json")


def read_source(folder: Path) -> None:
    source = PackedSource(folder)
    assert source.dtype.is_floating_point
    assert source.architecture is not None
    assert source._structure.widths


def test_a_source_with_a_wrong_entry_is_exported_or_refused_in_our_words(
    packed_folder: GetFolder, tmp_path: Path
) -> None:
    folder = copy_of(packed_folder("llama"), tmp_path / "model")
    path = folder / d.CONFIG
    whole = json.loads(path.read_text())
    keys = ("architectures", "dtype", "hidden_size", "num_hidden_layers", "rope_parameters", "model_type")
    reader = Reader("source", d.CONFIG, lambda folder: None, read_source)
    refused = set()
    for name, content in variants({key: whole[key] for key in keys}):
        path.write_text(json.dumps({key: value for key, value in whole.items() if key not in keys} | content))
        try:
            message = outcome(reader, folder)
        except Exception as error:
            error.add_note(name)
            raise
        refused |= {name} if message else set()
    assert {"dtype=true", "model_type=gone", "rope_parameters=[]", "num_hidden_layers=" + "1" + "0" * 30} <= refused


def test_an_architecture_that_is_no_model_is_not_called(
    packed_folder: GetFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    called = []
    monkeypatch.setattr(transformers, "evil", called.append, raising=False)
    folder = copy_of(packed_folder("llama"), tmp_path / "model")
    d.model_config(architectures=["evil"])(folder)
    assert PackedSource(folder)._structure.widths
    assert called == []


def test_numbers_that_an_export_needs_are_asked_for_by_name(packed_folder: GetFolder, tmp_path: Path) -> None:
    for key, value in (("hidden_size", None), ("rms_norm_eps", "1e-6"), ("num_key_value_heads", 1.5)):
        folder = copy_of(packed_folder("llama", bits=4, grid="int_sym"), tmp_path / key)
        d.model_config(**{key: value})(folder)
        with pytest.raises(CheckpointError, match=rf"config\.json must hold `{re.escape(key)}`"):
            export_model(folder, "gguf", tmp_path / "out")
