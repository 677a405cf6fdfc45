"""Texts become windows of equal length, in order, without padding and without losing a token between them."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from bitdistiller_peft.calibration.texts import fingerprint, token_windows
from bitdistiller_peft.errors import ConfigError, DataError


class Letters:
    """One token a character; perhaps one before every text."""

    def __init__(self, bos_token_id: int | None = None) -> None:
        self.bos_token_id = bos_token_id

    def __call__(self, text: str, add_special_tokens: bool = True, **kwargs: Any) -> dict[str, list[int]]:
        start = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return {"input_ids": [*start, *map(ord, text)]}


def test_short_texts_are_joined_in_order() -> None:
    windows = token_windows(["abc", " ", "defg"], Letters(), num_samples=9, seq_len=4)
    assert ["".join(map(chr, window)) for window in windows.tolist()] == ["abc\n", "\ndef"]


def test_no_more_text_is_read_than_is_needed() -> None:
    def endless() -> Any:
        while True:
            yield "abcdefgh"

    assert token_windows(endless(), Letters(), num_samples=3, seq_len=16).shape == (3, 16)


def test_windows_begin_as_the_tokenizer_begins() -> None:
    windows = token_windows(["abcdefgh"], Letters(bos_token_id=1), num_samples=2, seq_len=4)
    assert windows.tolist() == [[1, *map(ord, "abc")], [1, *map(ord, "def")]]


def test_fewer_windows_than_asked_for_are_announced(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert len(token_windows(["abcdefgh"], Letters(), num_samples=4, seq_len=4)) == 2
    assert "2 windows of 4 tokens, not 4" in caplog.text


def test_token_ids_are_taken_as_they_are() -> None:
    ids = torch.arange(12, dtype=torch.int32).view(3, 4)
    windows = token_windows(ids, None, num_samples=2, seq_len=512)
    assert windows.dtype == torch.int64
    assert torch.equal(windows, ids[:2].long())


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "must not be empty"),
        (["", " \n"], "must not be empty"),
        (["abc"], r"at least one window of 16 tokens: got 5 tokens"),
        ("one text", r"Pass \[text\]"),
        ([b"bytes"], "text only: got bytes"),
        (torch.zeros(2, 3), "must be integers"),
        (torch.zeros(3, dtype=torch.long), r"shape \(3,\)"),
        (torch.zeros(0, 4, dtype=torch.long), "integers"),
    ],
)
def test_texts_that_cannot_be_used_are_refused(texts: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        token_windows(texts, Letters(), num_samples=4, seq_len=16)


@pytest.mark.parametrize(("num_samples", "seq_len"), [(0, 8), (True, 8), (4, 0), (4, 2.5)])
def test_numbers_that_cannot_be_are_refused(num_samples: Any, seq_len: Any) -> None:
    with pytest.raises(ConfigError, match="positive integer"):
        token_windows(["abc"], Letters(), num_samples, seq_len)


def test_a_window_must_leave_room_for_text() -> None:
    with pytest.raises(ConfigError, match="leave room"):
        token_windows(["abc"], Letters(bos_token_id=1), 4, 1)
    with pytest.raises(ConfigError, match="tokenizer"):
        token_windows(["abc"], None, 4, 8)


def test_the_fingerprint_tells_tokens_and_shapes_apart() -> None:
    ids = torch.arange(12).view(3, 4)
    assert fingerprint(ids) == fingerprint(ids.int())
    assert len({fingerprint(ids), fingerprint(ids + 1), fingerprint(ids.view(4, 3))}) == 3
