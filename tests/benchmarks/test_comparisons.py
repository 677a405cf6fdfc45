"""The comparisons see the same tokens in every row, keep curves, and do nothing twice."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import _arms, _results, comparisons
from tests.standin import english, save_standin

TOKENS = 2048
NUMBERS = ("tokens", "step_tokens", "chunks", "seed")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(_results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(_arms, "CLIP_TOKENS", 1024)
    monkeypatch.setattr(comparisons, "PROMPTS_AT_ONCE", 4)
    save_standin(tmp_path / "model")
    (tmp_path / "topics.txt").write_text("\n\n".join(english()[10:14]))
    (tmp_path / "train.txt").write_text("\n\n".join(english()[:4]))
    return tmp_path


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, suite: str, *more: str) -> dict[str, Any]:
    arguments = [suite, "--model", str(folder / "model"), "--train-text", str(folder / "train.txt")]
    arguments += ["--eval", f"topics={folder / 'topics.txt'}", "--cache", str(folder / "cache")]
    arguments += ["--tokens", str(TOKENS), "--step-tokens", "512", "--chunks", "2", "--probe-chunks", "1", *more]
    monkeypatch.setattr(sys, "argv", ["comparisons", *arguments])
    comparisons.main()
    found: dict[str, Any] = json.loads((folder / "results" / "comparisons.cpu.json").read_text())
    return found


def test_grids_are_compared_step_by_step_on_the_same_tokens(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--group-sizes", "32", "--learning-rates", "1e-3", "--rows", "int-minmax", "int-learned", "r2q")
    written = run(folder, monkeypatch, "r2q", *options)
    rows = {row["row"]: row for row in written["rows"]}
    assert list(rows) == ["full_precision", "int-minmax", "int-learned", "r2q"]
    del rows["full_precision"]
    for row in rows.values():
        assert len(row["loss"]) == len(row["flip_rate"]) == TOKENS // 512
        assert [tokens for tokens, _, _ in row["probes"]] == [0, 512, 1024, 2048]
        assert [seconds for _, seconds, _ in row["probes"]] == sorted(seconds for _, seconds, _ in row["probes"])
    # at the start, learned scales are those that min-max gives: one student, one loss, one batch
    assert rows["int-learned"]["probes"][0] == rows["int-minmax"]["probes"][0]
    assert rows["int-learned"]["loss"][0] == rows["int-minmax"]["loss"][0]
    assert rows["int-learned"]["loss"][-1] != rows["int-minmax"]["loss"][-1]
    assert 0 < rows["r2q"]["flip_rate"][-1] < 1
    assert len({row["ppl_topics"] for row in rows.values()}) == len(rows)
    assert "r2q_against_int-learned_2bit_g32_lr0.001_perplexity" in written["figures"]
    assert "last quarter" in capsys.readouterr().out

    def again(self: comparisons.Bench, setting: dict[str, Any], arm: _arms.Arm) -> dict[str, Any]:
        raise AssertionError(f"{setting['row']} was there already")

    monkeypatch.setattr(comparisons.Bench, "row", again)
    assert run(folder, monkeypatch, "r2q", *options)["rows"] == written["rows"]


@pytest.mark.slow
def test_clip_ranges_and_own_texts_are_made_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searches = []
    calibrate = _arms.calibrate
    monkeypatch.setattr(_arms, "calibrate", lambda *args, **kw: searches.append(1) or calibrate(*args, **kw))
    options = ("--bits", "3", "--learning-rates", "1e-3", "--group-sizes", "32", "--rows")
    written = run(folder, monkeypatch, "bitdistiller", *options, "cakld", "cakld-no-clip", "cakld-own-text")
    rows = {row["row"]: row for row in written["rows"]}
    assert len(searches) == 1
    plain, no_clip, own = rows["cakld"], rows["cakld-no-clip"], rows["cakld-own-text"]
    assert plain["clip_seconds"] == own["clip_seconds"] > 0.0 == no_clip["clip_seconds"]
    assert plain["probes"][0] == own["probes"][0] != no_clip["probes"][0]
    assert own["loss"] != plain["loss"]
    assert own["teacher_seconds"] > 0.0 == plain["teacher_seconds"]
    written_by_teacher = sorted((folder / "cache").rglob("teacher_data.jsonl"))
    made = [path.stat().st_mtime_ns for path in written_by_teacher]
    tokens = [json.loads(line)["num_tokens"] for path in written_by_teacher for line in path.read_text().splitlines()]
    assert sum(tokens) >= TOKENS
    again = run(folder, monkeypatch, "bitdistiller", *options, "cakld-own-text", "--seed", "0", "--chunks", "1")
    assert len(searches) == 1
    assert [path.stat().st_mtime_ns for path in written_by_teacher] == made
    assert again["rows"][-1]["loss"] == own["loss"]


def test_every_row_of_a_suite_is_asked_for_once(tmp_path: Path) -> None:
    common = {
        "model": "m",
        "train_text": [tmp_path],
        "tokens": 1,
        "step_tokens": 1,
        "chunks": 1,
        "seed": 0,
        "rows": None,
    }
    sizes = {"bits": [2], "group_sizes": [64, -1], "learning_rates": [1e-4, 1e-5]}
    rows = list(comparisons.wanted(argparse.Namespace(suite="r2q", **common, **sizes)))
    assert rows[0]["row"] == "full_precision"
    assert [row["row"] for row in rows[1:10]] == list(comparisons.SUITES["r2q"])
    assert [row["row"] for row in rows[10:16]] == [*comparisons.OWN, *comparisons.LEARNED]
    assert len(rows) == 1 + 2 * (9 + 6)
    sizes = {"bits": [2, 3], "group_sizes": [64], "learning_rates": [1e-4]}
    rows = list(comparisons.wanted(argparse.Namespace(suite="bitdistiller", **common, **sizes)))
    assert len(rows) == 1 + 2 * 7
    assert {comparisons.arm_of(row).model.get("grid") for row in rows if row["bits"] == 2} == {"int"}
    assert {comparisons.arm_of(row).model.get("grid") for row in rows if row["bits"] == 3} == {"nf"}


def test_what_was_reached_is_read_between_the_points() -> None:
    points = [[0, 0.0, 1000.0], [100, 10.0, 100.0], [200, 20.0, 10.0]]
    assert comparisons.reached(points, 1000.0 / 10**0.5, 0) == pytest.approx(50)
    assert comparisons.reached(points, 10.0, 1) == pytest.approx(20)
    assert comparisons.reached(points, 5.0, 0) is None
    assert comparisons.reached(points, 2000.0, 0) == 0.0
