"""The parts of a model card that this library writes, between comments that name them, and their renewal.

A page on the Hub belongs to who wrote it. What stands between such comments, and the metadata about the quantized
model, comes from the files; a later push of other files renews it. All else stays as it is, and so does a part whose
comments somebody took away.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MEASURED = "measured"
PARTS = ("about", "size", "made", "limits", MEASURED)
_BITS = re.compile(r"\d+(\.\d+)?-bit")
_OF_THE_BASE = ("base_model", "base_model_relation")
_ONCE = ("library_name", "pipeline_tag")


def mark(part: str, text: str) -> str:
    """A part between its comments, as it stands in a card.

    Args:
        part: one of `PARTS`.
        text: Markdown.
    """
    opening, closing = _comments(part)
    return f"{opening}\n{text}\n{closing}"


def find_part(card: str, part: str) -> str | None:
    """A part of a card with its comments; `None` where it has none."""
    opening, closing = _comments(part)
    start = card.find(opening)
    end = card.find(closing, start)
    return card[start : end + len(closing)] if 0 <= start < end else None


def put_part(card: str, part: str, text: str | None) -> str:
    """A card with another text for a part, in the old one's place or at the end.

    Args:
        card: with or without the part.
        part: one of `PARTS`.
        text: with its comments; `None` takes the part out.
    """
    old = find_part(card, part)
    if text is None:
        return card if old is None else re.sub(r"\n{3,}", "\n\n", card.replace(old, "", 1)).rstrip() + "\n"
    return f"{card.rstrip()}\n\n{text}\n" if old is None else card.replace(old, text, 1)


def renew_card(there: str, ours: str, *, is_same_model: bool) -> str:
    """The card of a repository, brought up to date with new files.

    Args:
        there: the card that the repository has; one without any of our parts is somebody's own, and stays.
        ours: the card that belongs to the files.
        is_same_model: whether the weights are those that are there; else what was measured of them is gone too.

    Returns:
        The card to upload; equal to `there`, byte for byte, where nothing has changed.
    """
    marked = [part for part in PARTS if find_part(there, part) is not None]
    if not marked:
        return there
    card = there
    for part in PARTS:
        new = find_part(ours, part)
        if (part == MEASURED and (new or not is_same_model)) or (new and part in marked):
            card = put_part(card, part, new)
    return _with_metadata(card, ours, is_same_model=is_same_model)


def _comments(part: str) -> tuple[str, str]:
    return f"<!-- bitdistiller:{part} -->", f"<!-- /bitdistiller:{part} -->"


def _with_metadata(card: str, ours: str, *, is_same_model: bool) -> str:
    from huggingface_hub import ModelCard

    cards: list[Any] = [ModelCard(text, ignore_metadata_errors=True) for text in (card, ours)]
    there, new = cards
    before = there.data.to_dict()
    _take_over(there.data, new.data, is_same_model=is_same_model)
    return card if there.data.to_dict() == before else str(there)


def _take_over(data: Any, new: Any, *, is_same_model: bool) -> None:
    """Write into a card's metadata what the files say: of what it is made, in how many bits, what was measured."""
    values: Mapping[str, Any] = new.to_dict()
    for key in (*_OF_THE_BASE, *_ONCE):
        if key in values and (key in _OF_THE_BASE or not getattr(data, key, None)):
            setattr(data, key, values[key])
    tags = list(new.tags or [])
    has_bits = any(_BITS.fullmatch(tag) for tag in tags)
    kept = [tag for tag in data.tags or [] if not (has_bits and _BITS.fullmatch(str(tag)))]
    merged = [*kept, *(tag for tag in tags if tag not in kept)]
    if set(merged) != set(data.tags or []):
        data.tags = merged
    if new.eval_results or not is_same_model:
        data.eval_results = [*(new.eval_results or []), *results_by_hand(data)] or None
        data.model_name = data.model_name or new.model_name


def results_by_hand(data: Any) -> list[Any]:
    """The evaluation results in a card's metadata that this library did not write: its own name their protocol."""
    return [result for result in data.eval_results or [] if "protocol" not in (result.dataset_args or {})]
