"""`verify_checkpoint`: says of the files alone whether they are what was written, and what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bitdistiller_peft.errors import CheckpointError, ChecksumError, ConfigError, UnknownNameError
from bitdistiller_peft.hub import MANIFEST_NAME, verify_checkpoint
from bitdistiller_peft.hub.header import read_json
from tests.hub.models import WEIGHTS, Saved, copy_of

GetSaved = Callable[..., Saved]


@pytest.fixture
def folder(saved: GetSaved, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return copy_of(saved("llama").folder, tmp_path / "model")


def edit(path: Path, **changes: object) -> None:
    """Change entries of the quantization config; None removes one."""
    content = json.loads(path.read_text())
    section = content["quantization_config"]
    section.update(changes)
    content["quantization_config"] = {key: value for key, value in section.items() if value is not None}
    path.write_text(json.dumps(content))


def test_a_whole_checkpoint_is_verified_and_its_files_named(folder: Path) -> None:
    assert verify_checkpoint(folder) == verify_checkpoint(str(folder)) == [folder / WEIGHTS]


def test_a_byte_that_a_crc_would_miss_is_found_by_the_digest(folder: Path) -> None:
    """Only the full mode compares SHA-256: a manifest with another digest and the right CRC is refused."""
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    sums = next(iter(manifest["files"][WEIGHTS]["tensors"].values()))
    sums["sha256"] = "0" * 64
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(ChecksumError, match=f"{WEIGHTS} must equal what was saved"):
        verify_checkpoint(folder)


def test_without_a_manifest_nothing_can_be_said(folder: Path) -> None:
    (folder / MANIFEST_NAME).unlink()
    with pytest.raises(CheckpointError, match=f"must hold {MANIFEST_NAME}: there is none"):
        verify_checkpoint(folder)


def test_a_file_that_only_the_manifest_knows_is_missed(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    files = manifest["files"]
    files |= {"model-9.safetensors": files[WEIGHTS], "model-10.safetensors": files[WEIGHTS]}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"must list files that are there: 'model-10\.safetensors' is not"):
        verify_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"quant_method": "gptq"}, CheckpointError, "quant_method='bitdistiller': got 'gptq'"),
        ({"quant_method": None}, CheckpointError, "got 'None'. This is no checkpoint of bitdistiller_peft"),
        ({"bits": "two"}, ConfigError, "config.json"),
        ({"grid": "none"}, UnknownNameError, "config.json"),
    ],
    ids=["another method", "no method", "wrong type", "unknown grid"],
)
def test_a_config_of_another_kind_is_refused(
    changes: dict[str, object], error: type[Exception], message: str, folder: Path
) -> None:
    edit(folder / "config.json", **changes)
    with pytest.raises(error, match=message):
        verify_checkpoint(folder)


@pytest.mark.parametrize("section", [None, [], "bitdistiller"], ids=["none", "list", "text"])
def test_a_config_without_a_section_is_refused(section: object, folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"] = section
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="must have a `quantization_config`"):
        verify_checkpoint(folder)


def test_an_empty_folder_or_none_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=folder.name):
            verify_checkpoint(folder)


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_constants_that_json_does_not_know_are_refused(constant: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(f'{{"value": {constant}}}')
    with pytest.raises(CheckpointError, match=f"config.json .*{constant} is not JSON"):
        read_json(file)
