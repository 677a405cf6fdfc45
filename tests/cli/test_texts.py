"""Texts, prompts and training data are read from every kind of file, and a fault is named with file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset

from bitdistiller_peft.cli.texts import load_prompts, load_texts, load_training_data
from bitdistiller_peft.errors import DataError

ROWS = [{"text": "one"}, {"text": "two, with a comma"}]


@pytest.fixture(params=[".jsonl", ".json", ".csv", ".parquet"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    path = tmp_path / f"table{request.param}"
    match request.param:
        case ".jsonl":
            path.write_text("\n".join(map(json.dumps, ROWS)))
        case ".json":
            path.write_text(json.dumps(ROWS))
        case ".csv":
            Dataset.from_list(ROWS).to_csv(path)
        case _:
            Dataset.from_list(ROWS).to_parquet(path)
    return str(path)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # pandas 3.0 leaves a .csv file open
def test_every_kind_of_table_gives_the_same_rows(table: str) -> None:
    assert load_texts([table], "calibration") == [row["text"] for row in ROWS]
    assert load_training_data(table).to_list() == ROWS


def test_the_paragraphs_of_a_text_are_examples(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\n\n  two\nlines\n\n")
    assert load_training_data(str(path)).to_list() == [{"text": "one"}, {"text": "two\nlines"}]
    assert load_texts([str(path)], "evaluation") == ["one\n\n\n  two\nlines\n\n"]


def test_the_parts_of_a_named_text_do_not_overlap() -> None:
    calibration, evaluation = (load_texts(["python-topics"], part) for part in ("calibration", "evaluation"))
    assert len(calibration) > len(evaluation) > 10
    assert not set(calibration) & set(evaluation)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Why?"}, [{"role": "user", "content": "Why?"}]),
        ({"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]},
         [{"role": "user", "content": "Why?"}]),
        ({"prompt": [{"role": "user", "content": "Why?"}]}, [{"role": "user", "content": "Why?"}]),
    ],
    ids=["text", "answered", "messages"],
)  # fmt: skip
def test_prompts_come_as_messages(tmp_path: Path, row: dict[str, object], expected: object) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(row))
    assert load_prompts(str(path), "auto", has_template=True, max_prompts=None) == [expected]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text"\n', "a.jsonl, line 2: must be a JSON object"),
        ("a.jsonl", "[1]\n", "a.jsonl, line 1: must be a JSON object: got list"),
        ("a.json", '{"text": "x"}', "must hold a list of objects"),
        ("a.jsonl", '{"body": "x"}\n', "must have a column 'text' in every row"),
    ],
    ids=["torn", "list", "object", "column"],
)
def test_a_fault_in_a_table_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        load_texts([str(path)], "calibration")


def test_prompts_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "other.jsonl").write_text('{"text": "x"}\n')
    for name, message in (
        ("empty.txt", "got none"),
        ("other.jsonl", "must have a column"),
        ("none.txt", "that exists"),
    ):
        with pytest.raises(DataError, match=message):
            load_prompts(str(tmp_path / name), "auto", has_template=False, max_prompts=None)
