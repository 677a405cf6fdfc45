"""Whether a generated text is that of a broken model: a loop, one character over and over, nothing, or no end.

Rules, not opinions: each is a few lines, and the result says where it struck. A text that passes can still be nonsense.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from bitdistiller_peft.errors import DataError

HEALTHY, EMPTY, REPEATED_CHARACTER, LOOP, UNFINISHED = KINDS = (
    "healthy",
    "empty",
    "repeated character",
    "loop",
    "unfinished",
)
MIN_LOOP_TOKENS = 12
"""A loop is at least this long ..."""
MIN_REPEATS = 4
"""... and says the same thing at least this many times."""
MIN_REPEATS_AT_THE_END = 3
"""Fewer will do for a loop that goes on until the text is cut off."""
MAX_PERIOD = 256
"""Longer runs of tokens are not looked at."""
MIN_SIGNS, MIN_LETTERS = 4, 8
"""How often a sign (``!!!!``), and how often a letter or digit, must follow itself."""


@dataclass(frozen=True)
class Collapse:
    """What was found in a text.

    Attributes:
        kind: one of `KINDS`; the first that applies of empty, repeated character, loop, unfinished.
        period: of a loop, the tokens that it repeats; else 0.
        start: of a loop, the token that it begins at; else 0.
        repeats: how often the loop or the character comes, broken periods counted as such; else 0.
        detail: the finding as a sentence; empty for a healthy text.
    """

    kind: str
    period: int = 0
    start: int = 0
    repeats: float = 0.0
    detail: str = ""

    @property
    def is_collapsed(self) -> bool:
        """Whether the text is broken. One that only went on until it was cut off is not: long answers do that."""
        return self.kind in (EMPTY, REPEATED_CHARACTER, LOOP)

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}" if self.detail else self.kind


def detect_collapse(ids: Sequence[int], text: str, *, is_finished: bool = True) -> Collapse:
    """Classify a generated text.

    - ``"empty"``: no tokens, or white space alone.
    - ``"repeated character"``: one sign at least 4 times in a row (``!!!!``), or one letter or digit at least 8 times,
      and that is half of the text, white space left out. (Code 0 is ``!`` in many vocabularies, so this is what NaN
      and zeroed logits look like.)
    - ``"loop"``: tokens that repeat with some period, at least 4 times over and 12 tokens long, anywhere in the text; 3
      times will do where the text was cut off within the loop.
    - ``"unfinished"``: none of that, but cut off before the end-of-text token came. That is no collapse in itself;
      where the teacher ends and the student does not, the student has lost its end.

    Args:
        ids: the generated tokens; the end-of-text token may be among them, or not.
        text: the same, decoded, without special tokens.
        is_finished: whether the text was ended by the model.

    Raises:
        DataError: `ids` or `text` is something else.

    Example:
        >>> detect_collapse([5, 7, 9] * 5, "and on and on and on ...", is_finished=False).kind
        'loop'
    """
    if not isinstance(text, str) or isinstance(ids, (str, bytes)) or not all(isinstance(token, int) for token in ids):
        raise DataError(
            f"`ids` must be whole numbers and `text` what they decode to: got {type(ids).__name__} and "
            f"{type(text).__name__}. Pass ids.tolist() and tokenizer.decode(ids, skip_special_tokens=True)."
        )
    if not text.strip():
        return Collapse(EMPTY, detail=f"{len(ids)} tokens without text")
    return (
        _repeated_character("".join(text.split()))
        or find_loop(ids, is_cut_off=not is_finished)
        or (Collapse(HEALTHY) if is_finished else Collapse(UNFINISHED, detail=f"no end within {len(ids)} tokens"))
    )


def find_loop(ids: Sequence[int], *, is_cut_off: bool = False) -> Collapse | None:
    """The loop with the shortest period, the longest of several, or `None`.

    Args:
        ids: token ids.
        is_cut_off: whether the text went on behind the last token.
    """
    least = MIN_REPEATS_AT_THE_END if is_cut_off else MIN_REPEATS
    for period in range(1, min(len(ids) // least, MAX_PERIOD) + 1):
        runs = _runs([now == before for now, before in zip(ids[period:], ids, strict=False)])
        for start, length in sorted(runs, key=lambda run: -run[1]):
            covered = length + period
            is_last = start + covered == len(ids)
            if covered >= max(MIN_LOOP_TOKENS, (least if is_last else MIN_REPEATS) * period):
                repeats = covered / period
                detail = f"{period} {'token' if period == 1 else 'tokens'} {repeats:.3g} times, from token {start} on"
                return Collapse(LOOP, period, start, repeats, detail)
    return None


def _runs(matches: Sequence[bool]) -> list[tuple[int, int]]:
    """Start and length of every run of true values."""
    found, at = [], 0
    for is_match, run in groupby(matches):
        length = sum(1 for _ in run)
        found += [(at, length)] if is_match else []
        at += length
    return found


def _repeated_character(text: str) -> Collapse | None:
    runs = [(sum(1 for _ in run), character) for character, run in groupby(text)]
    length, character = max(runs, key=lambda run: run[0])
    needed = MIN_LETTERS if character.isalnum() else MIN_SIGNS
    if length < needed or 2 * length < len(text):
        return None
    return Collapse(REPEATED_CHARACTER, repeats=float(length), detail=f"{character!r} {length} times")
