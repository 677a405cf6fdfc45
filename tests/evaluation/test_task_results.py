"""Task scores in the forms that they are passed on in; lm-evaluation-harness is not needed to read them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries

from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.evaluation import TaskResults, TaskScore, evaluate_tasks
from bitdistiller_peft.evaluation.task_results import mean_samples

STRICT = TaskScore(
    task="gsm8k",
    metric="exact_match",
    filter="strict-match",
    value=0.25,
    stderr=0.25,
    higher_is_better=True,
    num_samples=4,
    num_fewshot=5,
    protocol="lm-eval/1/gsm8k/version=3/shots=5/n=4/samples=ab",
    is_whole=True,
    dataset="openai/gsm8k",
    dataset_config="main",
    samples=(1.0, 0.0, 0.0, 0.0),
)
FLEXIBLE = replace(STRICT, filter="flexible-extract", value=0.5, samples=(1.0, 1.0, 0.0, 0.0))
LOCAL = replace(STRICT, task="mine", metric="acc", filter="none", dataset=None, dataset_config=None)
CUT = replace(STRICT, task="arc_easy", is_whole=False, dataset="allenai/ai2_arc", dataset_config="ARC-Easy")
RESULTS = TaskResults((STRICT, FLEXIBLE, LOCAL, CUT), "packed", 1.0, date="2026-01-02T03:04:05+00:00")


def test_the_hub_reads_one_entry_per_whole_task_on_data_that_it_knows(tmp_path: Path) -> None:
    (file,) = RESULTS.save_eval_results(tmp_path)
    assert file == tmp_path / ".eval_results" / "openai--gsm8k.yaml"
    (entry,) = parse_eval_result_entries(yaml.safe_load(file.read_text(encoding="utf-8")))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("openai/gsm8k", "main", 0.25)
    assert entry.date == RESULTS.date
    assert "evaluated as packed" in str(entry.notes)
    assert STRICT.protocol in str(entry.notes)


def test_a_benchmark_can_be_named_for_a_task() -> None:
    entries = RESULTS.eval_results({"mine": ("user/mine", "default")})
    assert [entry["dataset"]["id"] for entry in entries] == ["openai/gsm8k", "user/mine"]
    with pytest.raises(ConfigError, match="must name tasks that were evaluated"):
        RESULTS.eval_results({"yours": ("user/yours", "default")})


def test_a_table_names_metric_filter_and_protocol() -> None:
    table = RESULTS.to_markdown().splitlines()
    assert table[2].startswith("| gsm8k/exact_match/strict-match | 0.2500 | 0.2500 | 4 | 5 |")
    assert table[4].startswith("| mine/acc |")
    assert replace(RESULTS, scores=(replace(STRICT, stderr=None),)).to_markdown().splitlines()[2].count("|  |") == 1


@pytest.mark.parametrize(
    ("values", "value", "expected"),
    [
        ([True, False], 0.5, (1.0, 0.0)),
        ([0.25, 0.75], 0.5, (0.25, 0.75)),
        ([1.0, 0.0], 0.4, ()),
        ([(1.0, 2)], 1.0, ()),
        ([], 0.0, ()),
    ],
    ids=["hits", "numbers", "not-the-mean", "no-numbers", "none"],
)
def test_samples_are_kept_where_the_score_is_their_mean(
    values: list[object], value: float, expected: tuple[float, ...]
) -> None:
    assert mean_samples(values, value) == expected


def test_without_the_harness_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitdistiller_peft.evaluation.tasks.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"bitdistiller_peft\[eval\]"):
        evaluate_tasks(None, None, "gsm8k")  # type: ignore[arg-type]
