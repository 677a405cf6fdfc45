"""Whatever is wrong with a file that the package reads, the error is ours, and names the file and what to do."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bitdistiller_peft.calibration.result import FORMAT
from bitdistiller_peft.errors import BitDistillerError
from bitdistiller_peft.training import load_teacher_data
from tests.trust import reader_files as files
from tests.trust.reader_files import Reader

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:huggingface_hub")

REMEDY = re.compile(
    r"[Dd]elete|[Dd]ownload|[Ss]ave|[Uu]se |[Ww]rite|[Cc]orrect|[Cc]onvert|[Nn]ame |[Cc]all |[Ee]xport again|Check the|"
    r"[Gg]o on from|[Ss]tart anew|set ema_decay|[Qq]uote|Pass |evaluate|[Cc]hoose|Settings stand|init|Or use|Evaluate"
)

# ------------------------------------------------------------------------------------------------------ what goes wrong

TEXTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda b: b"",
    "cut-in-half": lambda b: b[: len(b) // 2],
    "cut-by-a-brace": lambda b: b.rstrip()[:-1],
    "more-behind": lambda b: b.rstrip() + b" x",
    "not-utf-8": lambda b: b[:1] + b"\xff" + b[1:],
    "utf-16": lambda b: b.decode().encode("utf-16"),
    "zeros": lambda b: bytes(len(b)),
    "null": lambda b: b"null",
    "a-list": lambda b: b"[]",
    "a-number": lambda b: b"1",
    "a-text": lambda b: b'"text"',
    "nested-100000-deep": lambda b: b"[" * 100_000 + b"]" * 100_000,
    "deep-inside": lambda b: b'{"x": ' + b'{"y": ' * 100_000 + b"1" + b"}" * 100_000 + b"}",
    "a-number-of-5000-digits": lambda b: b'{"x": ' + b"9" * 5000 + b"}",
    "half-a-character": lambda b: b'{"x": "\\ud800"}',
    "the-same-key-twice": lambda b: b'{"x": 1, "x": 2}',
}
VALUES: tuple[Any, ...] = (None, True, -1, 10**30, 1.5, "x", "../x", [], [None], {}, {"a": {}})
DELETED = object()


def variants(content: Any) -> Iterator[tuple[str, Any]]:
    """The content with one entry gone or of another kind, at whatever depth; of a list, its first."""
    for path in paths(content):
        for value in (DELETED, *VALUES):
            changed = copy.deepcopy(content)
            place = changed
            for key in path[:-1]:
                place = place[key]
            if value is DELETED:
                del place[path[-1]]
            else:
                place[path[-1]] = value
            yield f"{'.'.join(map(str, path))}={'gone' if value is DELETED else json.dumps(value)}", changed


def paths(content: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    keys = content if isinstance(content, dict) else range(min(1, len(content))) if isinstance(content, list) else ()
    for key in keys:
        yield (*before, key)
        yield from paths(content[key], (*before, key))


def outcome(reader: Reader, folder: Path) -> str | None:
    """None where the file was read, else the message; an error that is not ours, or says too little, fails the test."""
    try:
        reader.read(folder)
    except BitDistillerError as error:
        message = str(error)
        assert folder.name in message or reader.file.rpartition("/")[2] in message, message
        assert REMEDY.search(message), message
        assert len(message) < 1500, message[:2000]
        return message
    return None


# ------------------------------------------------------------------------------------------------------------- JSON

ANY = frozenset(TEXTS)
HALVES = frozenset({"half-a-character"})  # a report shows them as what they are

JSONS = [
    Reader("teacher-cache", "manifest.json", files.cache, files.read_cache),
    Reader("teacher-data", "manifest.json", files.answers, load_teacher_data),
    Reader(
        "unfinished-teacher-data",
        "manifest.json",
        lambda folder: files.answers(folder, is_finished=False),
        files.resume_answers,
    ),
    Reader("checkpoint", "checkpoint-3/bitdistiller-checkpoint.json", files.checkpoint, files.resume),
    Reader(
        "state-of-the-trainer",
        "checkpoint-3/trainer_state.json",
        files.old_checkpoint,
        files.resume,
    ),
    Reader("evaluation-to-push", "result.json", files.evaluation, files.read_measured),
    Reader("evaluation-to-report", "eval/result.json", files.chain, files.report, HALVES),
    Reader("costs-to-report", "costs.json", files.chain, files.report, HALVES),
    Reader("doctor-to-report", "distill/trainer/doctor.json", files.chain, files.report, HALVES),
    Reader(
        "log-to-report",
        "trainer/checkpoint-3/trainer_state.json",
        files.unfinished_chain,
        files.report,
        HALVES,
    ),
    Reader("costs", "costs.json", files.costs, files.add_costs, passes=ANY),  # figures of cost stop no run
    Reader("result-of-a-command", "out/result.json", files.claimed, files.claim),
    Reader("config-to-inspect", "config.json", files.model, files.inspected),
    Reader("adapter-to-inspect", "adapter_config.json", files.adapter, files.inspected),
    Reader("adapter", "adapter_config.json", files.adapter, files.base_of),
    Reader("tokenizer-to-gguf", "tokenizer.json", files.tokenizer, files.to_gguf),
]


@pytest.mark.parametrize("reader", JSONS, ids=lambda reader: reader.id)
def test_json_that_is_none_of_ours_is_refused(reader: Reader, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    reader.make(folder)
    assert outcome(reader, folder) is None
    path = folder / reader.file
    whole = path.read_bytes()
    read = [name for name, edit in TEXTS.items() if path.write_bytes(edit(whole)) and outcome(reader, folder) is None]
    path.write_bytes(b"")
    read += ["empty"] if outcome(reader, folder) is None else []
    assert not set(read) - reader.passes


@pytest.mark.parametrize("reader", JSONS, ids=lambda reader: reader.id)
def test_json_with_a_wrong_entry_is_read_or_refused_in_our_words(reader: Reader, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    reader.make(folder)
    path = folder / reader.file
    whole = json.loads(path.read_text())
    tried = refused = 0
    step = 5 if "report" in reader.id or "push" in reader.id else 1  # those take long; 5 and 12 have no common divisor
    for name, content in islice(variants(whole), 0, None, step):
        path.write_text(json.dumps(content))
        try:
            refused += outcome(reader, folder) is not None
        except Exception as error:
            error.add_note(name)
            raise
        tried += 1
    assert tried >= 5
    assert refused or reader.passes or "report" in reader.id or reader.id == "result-of-a-command"


# ---------------------------------------------------------------------------------------------------------- safetensors

HEADER = {
    "empty": lambda b: b"",
    "cut-in-half": lambda b: b[: len(b) // 2],
    "cut-by-a-byte": lambda b: b[:-1],
    "zeros": lambda b: bytes(len(b)),
    "a-header-longer-than-the-file": lambda b: b"\xff" * 7 + b"\x7f" + b[8:],
    "a-header-that-is-no-json": lambda b: b[:8] + b"x" + b[9:],
    "json": lambda b: b"{}",
}

TENSORS = [
    Reader("teacher-cache", "shard-00000.safetensors", files.cache, files.read_cache),
    Reader("head", "head.safetensors", files.cache, files.read_cache),
    Reader("averages", files.AVERAGES_NAME, files.averages, files.read_averages),
    Reader("calibration", "clip.safetensors", files.calibrated, files.read_calibrated),
    Reader("adapter", "adapter_model.safetensors", files.adapter, files.inspected),
]


def tensor_variants(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """The file with a tensor gone, of another shape or dtype, or with other values."""
    edits: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "shorter": lambda t: t[:-1],
        "flat": lambda t: t.reshape(-1),
        "a-number": lambda t: t.reshape(-1)[0],
        "with-an-axis": lambda t: t.unsqueeze(0),
        "of-no-entries": lambda t: t[:0],
        "int16": lambda t: t.to(torch.int16),
        "float64": lambda t: t.double(),
        "negative": lambda t: -t.float().abs().to(t.dtype) if t.is_floating_point() or t.dtype.is_signed else t,
        "huge": lambda t: torch.full_like(t, 10**9) if t.dtype == torch.int64 else t,
    }
    for name, tensor in tensors.items():
        yield f"{name} gone", {key: value for key, value in tensors.items() if key != name}
        for what, edit in edits.items():
            yield f"{name} {what}", {**tensors, name: edit(tensor).contiguous()}


@pytest.mark.parametrize("reader", TENSORS, ids=lambda reader: reader.id)
def test_tensors_that_are_none_of_ours_are_read_or_refused_in_our_words(reader: Reader, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    reader.make(folder)
    assert outcome(reader, folder) is None
    path = folder / reader.file
    whole = path.read_bytes()
    for name, edit in HEADER.items():
        path.write_bytes(edit(whole))
        assert outcome(reader, folder), name
    path.write_bytes(whole)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    refused = set()
    for name, tensors in tensor_variants(load_file(path)):
        path.unlink()
        save_file(tensors, path, metadata=metadata)
        try:
            refused |= {name} if outcome(reader, folder) else set()
        except Exception as error:
            error.add_note(name)
            raise
    assert refused or reader.id == "adapter"


def test_the_report_in_a_calibration_is_checked_entry_by_entry(tmp_path: Path) -> None:
    files.calibrated(tmp_path)
    path = tmp_path / "clip.safetensors"
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()[FORMAT])
    tensors = load_file(path)
    reader = Reader("calibration", path.name, files.calibrated, files.read_calibrated)
    contents = [*variants(about), ("deep", None)]
    refused = 0
    for name, content in contents:
        text = "[" * 100_000 if name == "deep" else json.dumps(content)
        save_file(tensors, path, metadata={FORMAT: text})
        try:
            refused += outcome(reader, tmp_path) is not None
        except Exception as error:
            error.add_note(name)
            raise
    assert refused > len(contents) / 4


# ------------------------------------------------------------------------------------------------------ lines and texts

TABLES = ["rows.jsonl", "rows.json", "messages.json", "rows.csv", "text.txt", "rows.parquet"]
BROKEN = {"not-utf-8": b"\xff\xfe\x00a", "deep": b"[" * 100_000, "numbers": b"[1, 2]", "zeros": bytes(100)}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets leaves a broken CSV open
@pytest.mark.parametrize("name", TABLES)
def test_texts_and_tables_are_read_or_refused_in_our_words(name: str, tmp_path: Path) -> None:
    (files.parquet if name.endswith("parquet") else files.table(name))(tmp_path)
    reader = Reader(name, name, files.parquet, files.read_table(name))
    assert outcome(reader, tmp_path) is None
    whole = (tmp_path / name).read_bytes()
    for content in (*BROKEN.values(), whole[: len(whole) // 2], whole.replace(b'"text"', b'"txt"')):
        (tmp_path / name).write_bytes(content)
        outcome(reader, tmp_path)
    (tmp_path / name).write_bytes(BROKEN["not-utf-8"])
    assert outcome(reader, tmp_path)


def test_rows_of_teacher_data_are_checked_entry_by_entry(tmp_path: Path) -> None:
    files.answers(tmp_path)
    path = tmp_path / "teacher_data.jsonl"
    first, second = path.read_text().splitlines()
    reader = Reader("rows", path.name, files.answers, load_teacher_data)
    rows = variants(json.loads(first))
    refused = [name for name, row in rows if _with(path, json.dumps(row), second, reader)]
    assert {"prompt_id=gone", "prompt_id=true", "completion=null", "num_tokens=1.5"} <= set(refused)
    assert _with(path, "[" * 100_000, second, reader)
    assert _with(path, first.replace('"Why?"', '[{"role": "user"}]'), second, reader), "texts and messages mixed"


def _with(path: Path, first: str, second: str, reader: Reader) -> str | None:
    path.write_text(f"{first}\n{second}\n")
    return outcome(reader, path.parent)


@pytest.mark.parametrize("name", ["README.md", "tokenizer_config.json", "chat_template.jinja", "metrics.jsonl"])
def test_other_texts_are_read_or_refused_in_our_words(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    make, read, path = {
        "README.md": (files.model, files.card, name),
        "tokenizer_config.json": (files.tokenizer, files.to_gguf, name),
        "chat_template.jinja": (files.tokenizer, files.to_gguf, name),
        "metrics.jsonl": (files.chain, files.report, f"distill/{name}"),
    }[name]
    make(folder)
    reader = Reader(name, path, make, read)
    assert outcome(reader, folder) is None
    for content in BROKEN.values():
        (folder / path).write_bytes(content)
        outcome(reader, folder)
