"""Broken texts are told from sound ones, and the place of a loop is the true one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitdistiller_peft.errors import DataError
from bitdistiller_peft.evaluation import detect_collapse
from bitdistiller_peft.evaluation.collapse import MIN_LOOP_TOKENS, MIN_REPEATS, find_loop

SENTENCE = "The keeper lit the lamp, and the ships came home one by one before the storm."


def is_loop_by_definition(ids: list[int]) -> bool:
    """Slow and literal: some stretch, long enough, equals itself shifted by a period."""
    for period in range(1, len(ids) + 1):
        length = max(MIN_LOOP_TOKENS, MIN_REPEATS * period)
        for start in range(len(ids) - length + 1):
            stretch = ids[start : start + length]
            if all(stretch[at] == stretch[at - period] for at in range(period, length)):
                return True
    return False


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (SENTENCE, "healthy"),
        ("Paris.", "healthy"),
        ("4", "healthy"),
        ("1111", "healthy"),
        ("Wait... what?", "healthy"),
        ("Yes!!!", "healthy"),
        ("", "empty"),
        (" \n\t\n", "empty"),
        ("!!!!", "repeated character"),
        ("!" * 64, "repeated character"),
        ("! ! ! ! !\n!", "repeated character"),
        ("Paris " + "." * 40, "repeated character"),
        ("aaaaaaaaaaaa", "repeated character"),
        ("\u00e9" * 9, "repeated character"),
        (SENTENCE + "!!!!", "healthy"),
    ],
)
def test_a_text_without_a_loop_of_tokens_is_judged_by_its_characters(text: str, kind: str) -> None:
    found = detect_collapse(list(range(len(text))), text)
    assert found.kind == kind
    assert found.is_collapsed == (kind != "healthy")


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([7] * 12, (1, 0, 12)),
        ([1, 2, 3, *[9, 8, 7] * 4], (3, 3, 4)),
        ([*[9, 8, 7] * 5, 1, 2, 3, 4], (3, 0, 5)),
        ([5, *[1, 2, 3, 4, 5, 6] * 4, 1, 2, 3], (6, 1, 4.5)),
        ([7] * 11, None),
        ([1, 2, 3, 4, 5, 6] * 3, None),
        (list(range(200)), None),
        ([], None),
    ],
    ids=["one-token", "at-the-end", "at-the-beginning", "broken-off", "too-short", "too-seldom", "none", "nothing"],
)
def test_a_loop_is_found_with_its_period_start_and_count(
    ids: list[int], expected: tuple[int, int, float] | None
) -> None:
    found = find_loop(ids)
    assert (found and (found.period, found.start, found.repeats)) == expected


@given(st.lists(st.integers(0, 2), max_size=30))
def test_loops_are_those_of_the_definition(ids: list[int]) -> None:
    found = find_loop(ids)
    assert (found is not None) == is_loop_by_definition(ids)
    if found is not None:
        end = found.start + round(found.repeats * found.period)
        assert all(ids[at] == ids[at - found.period] for at in range(found.start + found.period, end))


def test_a_loop_that_goes_on_until_the_text_is_cut_off_needs_three_rounds() -> None:
    ids = [1, 2, *[9, 8, 7, 6, 5] * 3, 9]
    assert find_loop(ids) is None
    found = find_loop(ids, is_cut_off=True)
    assert found is not None
    assert (found.period, found.start, found.repeats) == (5, 2, 3.2)
    assert find_loop([*ids, 3, 4], is_cut_off=True) is None, "it has come out of it"
    assert detect_collapse(ids, SENTENCE).kind == "healthy"
    assert detect_collapse(ids, SENTENCE, is_finished=False).kind == "loop"


def test_a_loop_in_words_says_where_it_begins() -> None:
    found = detect_collapse([1, 2, *[3, 4] * 8], "a b " + "c d " * 8, is_finished=False)
    assert (found.kind, found.is_collapsed) == ("loop", True)
    assert str(found) == "loop: 2 tokens 8 times, from token 2 on"


def test_a_text_without_an_end_is_named_but_no_collapse() -> None:
    found = detect_collapse(list(range(40)), SENTENCE, is_finished=False)
    assert (found.kind, found.is_collapsed) == ("unfinished", False)
    assert found.detail == "no end within 40 tokens"
    assert detect_collapse([7] * 40, "x " * 5, is_finished=False).kind == "loop", "what is worse comes first"


@pytest.mark.parametrize(("ids", "text"), [("abc", "abc"), ([1, 2], None), (["a"], "a"), ([1.5], "a")])
def test_what_is_no_text_is_refused(ids: object, text: object) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.decode"):
        detect_collapse(ids, text)  # type: ignore[arg-type]
