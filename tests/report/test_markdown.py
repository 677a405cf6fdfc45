"""The Markdown twin has the same tables, and no text in it becomes markup."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from bitdistiller_peft.report import write_report
from bitdistiller_peft.report.escape import fence, markdown_text
from tests.report.conftest import evaluation, write
from tests.report.page import parse
from tests.report.test_html import HOSTILE


def tables(markdown: str) -> list[list[list[str]]]:
    """The cells of every table, unescaped."""
    found: list[list[list[str]]] = []
    before = ""
    for line in markdown.splitlines():
        if line.startswith("|"):
            if not before.startswith("|"):
                found.append([])
            cells = re.split(r"(?<!\\)(?:\\\\)*\|", line)[1:-1]
            found[-1].append([re.sub(r"\\(.)", r"\1", cell.strip()) for cell in cells])
        before = line
    return [[table[0], *table[2:]] for table in found]


def words(cell: str) -> str:
    return " ".join(cell.split())


def test_both_have_the_same_tables(chain: Path, tmp_path: Path) -> None:
    files = write_report(chain, tmp_path, show_progress=False)
    page = parse(files.html.read_text(encoding="utf-8"))
    expected = [[[words(cell) for cell in row] for row in table.table()] for table in page.all("table")]
    assert tables(files.markdown.read_text(encoding="utf-8"))[1:] == expected, "the first one holds the tiles"


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_text_stays_in_its_cell_and_its_fence(
    text: str, make_chain: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_chain(tmp_path / "run")
    write(folder / "eval" / "result.json", evaluation(text, text=text, prompt=text))
    markdown = write_report(folder, show_progress=False).markdown.read_text(encoding="utf-8")
    plain = re.sub(r"^(`{3,})text\n.*?\n\1$", "", markdown, flags=re.MULTILINE | re.DOTALL)
    plain = re.sub(r"(?<!\\)`[^`\n]*(?<!\\)`", "", plain)
    assert not re.search(r"(?<!\\)[<>]|(?<!\\)\[|&\w+;(?<!\\&\w)", re.sub(r"\\.", "", plain))
    assert len({len(row) for table in tables(markdown)[1:2] for row in table}) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("self_attn.q_proj", r"self\_attn.q\_proj"),
        ("a|b", r"a\|b"),
        ("<b>&amp;", r"\<b\>\&amp;"),
        ("# no heading", r"\# no heading"),
        ("2026-11-22", "2026-11-22"),
        ("https://evil.example", r"https:\//evil.example"),
        ("two\nlines", "two lines"),
    ],
)
def test_signs_are_escaped_where_they_mean_something(text: str, expected: str) -> None:
    assert markdown_text(text) == expected


def test_a_fence_is_longer_than_any_inside() -> None:
    assert fence("a\n````\nb") == "`````text\na\n````\nb\n`````"
