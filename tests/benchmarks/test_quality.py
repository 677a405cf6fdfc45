"""The quality benchmark spends equal tokens on every row, measures packed models, and goes on where it stopped."""

from __future__ import annotations

import gzip
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import _results, quality
from bitdistiller_peft.evaluation.task_results import TaskResults, TaskScore
from tests.standin import english, save_standin


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, *rows: str) -> dict[str, Any]:
    monkeypatch.setattr(_results, "RESULTS", folder / "results")
    arguments = ["--model", str(folder / "model"), "--train-text", str(folder / "train.jsonl.gz")]
    arguments += ["--eval", f"topics={folder / 'topics.txt'}", "--tokens", "4096", "--chunks", "2", "--rows", *rows]
    monkeypatch.setattr(sys, "argv", ["quality", *arguments])
    quality.main()
    return json.loads((folder / "results" / "quality.cpu.json").read_text())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_standin(tmp_path / "model")
    (tmp_path / "topics.txt").write_text("\n\n".join(english()[10:14]))
    with gzip.open(tmp_path / "train.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in english()[:6])
    return tmp_path


def test_rows_are_measured_at_equal_tokens_and_only_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = run(folder, monkeypatch, "rtn", "bitdistiller", "balanced", "fast")
    rows = {row["row"]: row for row in written["rows"]}
    assert list(rows) == ["full_precision", "rtn", "bitdistiller", "balanced", "fast"]
    assert rows["rtn"]["tokens"] == 0
    assert rows["bitdistiller"]["tokens"] == rows["balanced"]["tokens"] == 4096
    assert rows["fast"]["tokens"] == 512
    assert rows["full_precision"]["bits_per_weight"] == 16
    assert rows["rtn"]["bits_per_weight"] == rows["balanced"]["bits_per_weight"] < 16
    assert rows["full_precision"]["kl"] == 0 < rows["balanced"]["kl"]
    assert written["figures"]["2bit_share_of_gap_closed"]["asked"] == {"min": 0.5}
    assert written["figures"]["2bit_fast_time"]["asked"] == {"max": 0.25}

    def again(self: quality.Bench, name: str) -> dict[str, Any]:
        raise AssertionError(f"{name} was there already")

    monkeypatch.setattr(quality.Bench, "row", again)
    assert run(folder, monkeypatch, "rtn", "balanced")["rows"] == written["rows"]


def test_figures_compare_the_rows_they_name() -> None:
    names = {"full_precision": 10.0, "bitdistiller": 1000.0, "balanced": 100.0, "efficientqat": 90.0, "fast": 500.0}
    rows = [
        {
            "row": name,
            "bits": 2,
            "seed": 0,
            "cpu_seconds": 2.0,
            "ppl_wiki": value,
            "ppl_other": value * 3,
            "machine": "A",
        }
        for name, value in names.items()
    ]
    rows += [{**rows[2], "seed": 1, "ppl_wiki": 400.0}, {**rows[2], "seed": 2, "ppl_wiki": 25.0}]
    rows += [{**rows[1], "row": "bitdistiller-lr2e-4", "ppl_wiki": 200.0}, {**rows[0], "bits": 3}]
    # one run of a row counts once, and one of more tokens not at all
    rows += [{**rows[2], "ppl_wiki": 1e6}, rows[2], {**rows[2], "budget": 9, "ppl_wiki": 1e6, "seed": 3}]
    found = quality.figures(rows)
    assert found["2bit_share_of_gap_closed"]["value"] == pytest.approx(0.5)
    assert found["2bit_against_efficientqat"]["value"] == pytest.approx(100 / 90)
    assert found["2bit_fast_against_bitdistiller"]["value"] == pytest.approx(0.5)
    at_best = found["2bit_share_of_gap_closed_at_its_best_rate"]["value"]
    assert at_best == pytest.approx(math.log(200 / 100) / math.log(200 / 10))
    assert found["2bit_share_of_gap_closed_other"]["value"] == pytest.approx(0.5)
    assert found["2bit_left_of_full_precision"]["value"] == pytest.approx(10)
    assert found["2bit_fast_time"]["value"] == 1.0


def test_times_are_compared_on_one_machine() -> None:
    common = {"bits": 2, "seed": 0, "ppl_wiki": 10.0}
    rows = [
        {"row": "bitdistiller", "cpu_seconds": 400.0, "machine": "A", **common},
        {"row": "fast", "cpu_seconds": 50.0, "machine": "B", **common},
    ]
    assert "2bit_fast_time" not in quality.figures(rows)
    rows.append({"row": "bitdistiller-lr5e-5", "cpu_seconds": 100.0, "machine": "B", **common})
    assert quality.figures(rows)["2bit_fast_time"]["value"] == 0.5


def test_gptq_and_awq_are_rows_without_training(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {row["row"]: row for row in run(folder, monkeypatch, "rtn", "gptq", "awq")["rows"]}
    assert rows["gptq"]["tokens"] == rows["awq"]["tokens"] == 0
    assert len({row["kl"] for row in rows.values()}) == 4


def test_every_seed_is_a_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = run(folder, monkeypatch, "rtn", "fast", "--seeds", "0", "1")
    assert [(row["row"], row["seed"]) for row in written["rows"]] == [
        ("full_precision", 0), ("rtn", 0), ("fast", 0), ("rtn", 1), ("fast", 1),
    ]  # fmt: skip
    by_row = {(row["row"], row["seed"]): row["ppl_topics"] for row in written["rows"]}
    assert by_row["rtn", 0] == by_row["rtn", 1]
    assert by_row["fast", 0] != by_row["fast", 1]


def test_tasks_make_another_row_with_normalized_accuracies(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def scored(model: Any, tokenizer: Any, tasks: list[str], **options: Any) -> TaskResults:
        asked.update(options, tasks=tasks)
        common = {"filter": "none", "stderr": None, "higher_is_better": True, "num_samples": 7, "num_fewshot": 0}
        common |= {"protocol": "p", "is_whole": False}
        return TaskResults(
            tuple(
                TaskScore("piqa", metric, value=value, **common) for metric, value in (("acc", 0.5), ("acc_norm", 0.75))
            ),
            "packed",
            1.0,
        )

    monkeypatch.setattr(quality, "evaluate_tasks", scored)
    run(folder, monkeypatch, "rtn")
    local = ["--tasks", "piqa", "--task-data", str(folder), "--task-items", "7"]
    rows = run(folder, monkeypatch, "rtn", *local)["rows"]
    assert asked == {"tasks": ["piqa"], "data_folder": folder, "limit": 7, "batch_size": 8}
    assert [row.get("acc_piqa") for row in rows] == [None, None, 0.75, 0.75]
