"""The strict reader of JSON files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bitdistiller_peft.errors import CheckpointError, ConfigError
from bitdistiller_peft.jsonfile import MAX_JSON, check_entries, is_of_kind, read_object, strict_json


def test_what_the_strict_reader_takes_and_what_not(tmp_path: Path) -> None:
    assert strict_json(b'{"a": [1, 2.5, "\\ud83d\\ude00"]}') == {"a": [1, 2.5, "\U0001f600"]}
    assert str(strict_json(b"[NaN, -Infinity]", allow_nan=True)) == "[nan, -inf]"
    for content in (b"[NaN]", b"[1e999]", b'{"a": 1, "a": 1}', b'"\\ud800"', b"[" * 100_000):
        with pytest.raises(ValueError, match=r"JSON|number|twice|surrogates|deeply"):
            strict_json(content)
    with pytest.raises(ConfigError, match=r"must be a file: there is none\. Look again\."):
        read_object(tmp_path / "a.json", "Look again.", error=ConfigError)
    with pytest.raises(CheckpointError, match=r"must be a file"):
        read_object(tmp_path, "Look again.")


def test_entries_are_told_apart_by_their_kinds() -> None:
    content = {"a": {"b": 1}, "c": True, "d": None, "e": 2.0}
    check_entries(content, {"a.b": int, "a": dict, "c": bool, "d": (str, type(None)), "e": float, "f?": int}, "x", "")
    check_entries(content, {"a.b": float}, "x", "")
    for kinds, words in (
        ({"a.c": int}, "must hold `a.c`: it does not"),
        ({"c.d": int}, "must hold `c.d`: it does not"),
        ({"c": int}, "must hold `c` as int: got True"),
        ({"c": float}, "must hold `c` as float: got True"),
        ({"e": int}, "must hold `e` as int: got 2.0"),
        ({"a": (str, type(None))}, "must hold `a` as str or null: got dict"),
    ):
        with pytest.raises(CheckpointError, match=f"^x {re.escape(words)}. Do it again.$"):
            check_entries(content, kinds, "x", "Do it again.")  # type: ignore[arg-type]


def test_numbers_that_overflow_are_no_numbers() -> None:
    assert is_of_kind(2**63 - 1, int)
    assert is_of_kind(-(2**63) + 1, int)
    assert is_of_kind(7, float)
    assert not is_of_kind(2**63, int)
    assert not is_of_kind(-(2**63), float)
    assert is_of_kind(1e300, float)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(MAX_JSON + 1)  # a hole, which takes no room
    with pytest.raises(CheckpointError, match=r"at most 100,000,000 bytes long: got 100,000,001\. Look again\."):
        read_object(tmp_path / "a.json", "Look again.")
