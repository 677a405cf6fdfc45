"""`bitdistiller.json` holds what was written, and a load compares: one changed byte is found, and named."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bitdistiller_peft import BitDistillerQuantConfig
from bitdistiller_peft.errors import CheckpointError, ChecksumError
from bitdistiller_peft.hub import MANIFEST_NAME, verify_files, write_manifest
from bitdistiller_peft.hub.manifest import read_header, write_marker
from tests.hub.models import WEIGHTS, Saved, copy_of, logits
from tests.tiny import load

GetSaved = Callable[..., Saved]


@pytest.fixture
def folder(saved: GetSaved, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return copy_of(saved("llama").folder, tmp_path / "model")


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def tensor_range(file: Path, name: str) -> tuple[int, int]:
    entries, start = read_header(file)
    first, last = entries[name]["data_offsets"]
    return start + first, start + last


def read_manifest(folder: Path) -> dict[str, object]:
    return json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))


def test_the_manifest_holds_both_checksums_of_every_file_and_tensor(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert manifest["format_version"] == 1
    assert str(manifest["written_by"]).startswith("bitdistiller_peft ")
    assert list(manifest["files"]) == [WEIGHTS]
    content, entry = (folder / WEIGHTS).read_bytes(), manifest["files"][WEIGHTS]
    assert (entry["bytes"], entry["crc32"]) == (len(content), zlib.crc32(content))
    assert entry["sha256"] == hashlib.sha256(content).hexdigest()
    assert entry["tensors"].keys() == load_file(folder / WEIGHTS).keys()
    for name, sums in entry["tensors"].items():
        first, last = tensor_range(folder / WEIGHTS, name)
        assert sums == {
            "crc32": zlib.crc32(content[first:last]),
            "sha256": hashlib.sha256(content[first:last]).hexdigest(),
        }


def test_after_each_save_the_manifest_lists_the_files_that_a_load_reads_and_no_others(folder: Path) -> None:
    """transformers leaves the single file of an earlier save beside new shards, and then loads the old weights."""
    model = load(folder)
    for number, size in enumerate(("20KB", "40KB", "1GB", "20KB")):
        with torch.no_grad():
            model.model.norm.weight.fill_(number + 1)
        model.save_pretrained(folder, max_shard_size=size)
        files = sorted(folder.glob("*.safetensors"))
        assert (len(files) > 1) == (size != "1GB")
        assert [file.name for file in files] == list(read_manifest(folder)["files"])
        assert verify_files(files, mode="full")
        assert load(folder).model.norm.weight.unique().item() == number + 1


@pytest.mark.parametrize("verify", ["fast", "full"])
@pytest.mark.parametrize("part", ["first byte", "last byte"])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.0.self_attn.q_proj.weight_scale",
        "model.layers.1.self_attn.o_proj.weight_zero_point",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
@pytest.mark.filterwarnings("ignore:.*already has a `quantization_config`")
def test_one_flipped_bit_in_any_tensor_is_found_and_named(folder: Path, name: str, part: str, verify: str) -> None:
    first, last = tensor_range(folder / WEIGHTS, name)
    flip(folder / WEIGHTS, first if part == "first byte" else last - 1)
    with pytest.raises(ChecksumError, match=rf"^{WEIGHTS} must equal what was saved: tensor '{name}' differs"):
        load(folder, quantization_config=BitDistillerQuantConfig(verify=verify))


def test_a_flipped_bit_in_the_second_shard_is_found(folder: Path) -> None:
    load(folder).save_pretrained(folder.parent / "shards", max_shard_size="20KB")
    shard = folder.parent / "shards" / "model-00002-of-00004.safetensors"
    flip(shard, -1)
    with pytest.raises(ChecksumError, match=rf"^{shard.name} must equal what was saved: tensor"):
        load(folder.parent / "shards")


def test_a_changed_header_is_found_where_all_tensors_are_sound(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    assert content.count(b'"format":"pt"') == 1
    (folder / WEIGHTS).write_bytes(content.replace(b'"format":"pt"', b'"format":"tp"'))
    with pytest.raises(ChecksumError, match="the header differs"):
        load(folder)


@pytest.mark.parametrize("kept", [slice(-1), slice(-1000), slice(100), slice(7), slice(0)], ids=str)
def test_a_truncated_file_is_refused_and_named(folder: Path, kept: slice) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[kept])
    with pytest.raises(CheckpointError, match=rf"^{WEIGHTS} must be .*damaged; download"):
        load(folder)


def test_bytes_after_the_end_are_refused(folder: Path) -> None:
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(CheckpointError, match=rf"^{WEIGHTS} must be \d+ bytes long: got"):
        load(folder)


def test_without_a_manifest_a_model_loads_with_one_warning_and_cannot_be_verified(
    saved: GetSaved, folder: Path
) -> None:
    (folder / MANIFEST_NAME).unlink()
    with pytest.warns(UserWarning, match=f"{MANIFEST_NAME} is missing beside {WEIGHTS}") as caught:
        model = load(folder)
    assert len(caught) == 1
    assert logits(model).equal(saved("llama").logits)
    assert verify_files([folder / WEIGHTS]) is False


@pytest.mark.filterwarnings("ignore:.*already has a `quantization_config`")
def test_verification_can_be_turned_off_and_that_is_said(saved: GetSaved, folder: Path) -> None:
    start, _ = tensor_range(folder / WEIGHTS, "lm_head.weight")
    flip(folder / WEIGHTS, start + 3)  # in the exponent: one in the last place may vanish in a sum
    with pytest.warns(UserWarning, match="damage would go unnoticed"):
        model = load(folder, quantization_config=BitDistillerQuantConfig(verify="none"))
    assert not logits(model).equal(saved("llama").logits)
    model.save_pretrained(folder)
    assert "verify" not in json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]


def test_only_the_full_verification_looks_at_more_than_the_crc(folder: Path) -> None:
    manifest = read_manifest(folder)
    manifest["files"][WEIGHTS]["tensors"]["lm_head.weight"]["sha256"] = "0" * 64
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest), encoding="utf-8")
    assert verify_files([folder / WEIGHTS], mode="fast")
    with pytest.raises(ChecksumError, match=r"tensor 'lm_head\.weight' differs"):
        verify_files([folder / WEIGHTS], mode="full")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "not json",
        "{}",
        '{"format_version": 1}',
        '{"format_version": 2, "files": {}}',
        '{"format_version": 1, "files": []}',
        '{"format_version": 1, "files": {"model.safetensors": {}}}',
        '{"format_version": 1, "files": {"model.safetensors": {"crc32": "1", "tensors": {}}}}',
        '{"format_version": 1, "files": {"model.safetensors": {"crc32": 1, "tensors": []}}}',
        '{"format_version": 1, "files": {"model.safetensors": 3}}',
    ],
)
def test_a_manifest_that_cannot_be_read_is_refused_as_such(folder: Path, content: str) -> None:
    (folder / MANIFEST_NAME).write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"^{MANIFEST_NAME} must be a manifest of version 1"):
        load(folder)


def test_a_manifest_of_other_files_is_refused(folder: Path) -> None:
    manifest = read_manifest(folder)
    manifest["files"]["other.safetensors"] = manifest["files"].pop(WEIGHTS)
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"{MANIFEST_NAME} must list {WEIGHTS}"):
        load(folder)


def test_a_manifest_that_is_written_again_is_the_same_and_leaves_nothing_behind(folder: Path) -> None:
    before, names = read_manifest(folder), sorted(file.name for file in folder.iterdir())
    write_manifest(folder, str(before["written_by"]))
    assert read_manifest(folder) == before
    assert sorted(file.name for file in folder.iterdir()) == names


def test_a_folder_whose_files_are_being_replaced_is_refused_as_such(folder: Path) -> None:
    write_marker(folder)
    assert json.loads((folder / MANIFEST_NAME).read_text()) == {"format_version": 1, "interrupted": True, "files": {}}
    with pytest.raises(CheckpointError, match="was interrupted while it replaced files"):
        verify_files([folder / WEIGHTS])
