"""What the header of a safetensors file must say, to the letter; the names of what is wrong stand in the message."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from bitdistiller_peft.errors import CheckpointError
from bitdistiller_peft.hub.header import read_header


def header(path: Path, data: int = 8, **entry: Any) -> Path:
    """A file with one tensor, ``a``, and `data` bytes."""
    whole = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    text = json.dumps({"a": whole | entry}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    return path


def test_a_sound_header_is_read_with_the_place_of_its_data(tmp_path: Path) -> None:
    path = header(tmp_path / "a.safetensors")
    entries, start = read_header(path)
    assert entries == {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    assert start == path.stat().st_size - 8


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"shape": [-2]}, "must have whole numbers from 0 as its shape: got \\[-2\\]"),
        ({"shape": "2"}, "must have whole numbers from 0 as its shape: got 2"),
        ({"data_offsets": [0, "8"]}, "must have whole numbers from 0 as its data_offsets: got"),
        ({"data_offsets": [0]}, "must have two data_offsets: got 1"),
        ({"dtype": "F9"}, "must have a dtype of .*'BF16'.*: got 'F9'"),
        ({"dtype": 32}, "must have a dtype of .*: got '32'"),
        ({"shape": [3]}, "must take 96 bits, by its dtype F32 and shape \\[3\\]: got data_offsets \\[0, 8\\]"),
        ({"data_offsets": [4, 12]}, "must begin at byte 0: got 4"),
    ],
)
def test_what_is_wrong_with_an_entry_is_named_with_its_value(
    entry: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=rf"a\.safetensors must have a readable header: tensor 'a' {message}"):
        read_header(header(tmp_path / "a.safetensors", **entry))


@pytest.mark.parametrize("more", [1, 8, 16, 2**62, 2**63])
def test_a_header_longer_than_the_file_is_refused_with_the_length_that_it_claims(tmp_path: Path, more: int) -> None:
    path = header(tmp_path / "a.safetensors")
    length = path.stat().st_size - 8 + more
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    with pytest.raises(
        CheckpointError, match=rf"a\.safetensors must be a safetensors file: got a header of {length} bytes"
    ):
        read_header(path)


def test_a_file_of_another_length_is_refused_with_both_lengths(tmp_path: Path) -> None:
    path = header(tmp_path / "a.safetensors", data=12)
    size = path.stat().st_size
    with pytest.raises(CheckpointError, match=rf"a\.safetensors must be {size - 4} bytes long: got {size}\."):
        read_header(path)
    (tmp_path / "short").write_bytes(bytes(7))
    with pytest.raises(CheckpointError, match="short must be a safetensors file: got a header of -1 bytes"):
        read_header(tmp_path / "short")


def test_an_empty_tensor_and_a_scalar_are_read(tmp_path: Path) -> None:
    assert read_header(header(tmp_path / "a", data=0, shape=[0, 4], data_offsets=[0, 0]))[0]["a"]["shape"] == [0, 4]
    assert read_header(header(tmp_path / "b", data=4, shape=[], data_offsets=[0, 4]))[0]["a"]["shape"] == []
