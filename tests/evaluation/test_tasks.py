"""Tasks through lm-evaluation-harness: equal to scores by hand, for every state of a model, and wholly offline."""

from __future__ import annotations

import json
import os
import random
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bitdistiller_peft import use_backend
from bitdistiller_peft.cli.dispatch import main
from bitdistiller_peft.errors import ConfigError, DataError
from bitdistiller_peft.evaluation import evaluate_tasks
from bitdistiller_peft.evaluation.tasks import check_tasks

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an extra of its own, [eval]")
pytestmark = pytest.mark.filterwarnings("default")  # of its dependencies

QUESTIONS = [
    {"question": f"What is {thing}?", "choices": ["a class", "an object of many sorts", "nothing"], "gold": at % 3}
    for at, thing in enumerate(["a list", "a dict", "tuple", "a loop", "None", "a name", "the scope"])
]
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 3}}
"""
WRITTEN = """\
task: written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
unsafe_code: true
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{gold}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a multiple-choice task, one that says it runs code, and a group of both."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in QUESTIONS), encoding="utf-8")
    (folder / "choice.yaml").write_text(TASK.format(name="choice", data=data), encoding="utf-8")
    (folder / "written.yaml").write_text(WRITTEN.format(data=data), encoding="utf-8")
    (folder / "both.yaml").write_text("group: both\ntask: [choice, written]\n", encoding="utf-8")
    (folder / "missing.yaml").write_text(TASK.format(name="missing", data=folder / "no.jsonl"), encoding="utf-8")
    return folder


def by_hand(model: torch.nn.Module, tokenizer: Any, *, is_normalized: bool) -> tuple[float, ...]:
    """Log-likelihood of every choice after its question, one at a time; whether the likeliest is the right one."""
    hits = []
    for row in QUESTIONS:
        scores = []
        for choice in row["choices"]:  # type: ignore[attr-defined]
            front = tokenizer(row["question"], add_special_tokens=False)["input_ids"]
            whole = tokenizer(f"{row['question']} {choice}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([whole])).logits[0].float()
            logprobs = logits.log_softmax(-1)
            total = sum(logprobs[at - 1, whole[at]].item() for at in range(len(front), len(whole)))
            scores.append(total / len(choice) if is_normalized else total)
        hits.append(float(int(np.argmax(scores)) == row["gold"]))
    return tuple(hits)


def test_a_score_is_that_of_log_likelihoods_by_hand(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tasks: Path
) -> None:
    accuracy, normalized = evaluate_tasks(model, tokenizer, "choice", task_folder=tasks, batch_size=4).scores
    assert (accuracy.metric, normalized.metric) == ("acc", "acc_norm")
    for score, is_normalized in ((accuracy, False), (normalized, True)):
        assert score.samples == by_hand(model, tokenizer, is_normalized=is_normalized)
        assert score.value == pytest.approx(np.mean(score.samples))
        assert score.stderr == pytest.approx(np.std(score.samples, ddof=1) / len(score.samples) ** 0.5)
    assert (accuracy.num_samples, accuracy.is_whole, accuracy.higher_is_better) == (len(QUESTIONS), True, True)
    assert 0 < accuracy.value < 1  # the model has an opinion


def test_a_student_scores_as_what_it_packs_and_both_are_left_as_they_were(
    student: PeftModel, tokenizer: PreTrainedTokenizerFast, tasks: Path
) -> None:
    fast = deepcopy(tokenizer)
    fast.pad_token = None
    student.train()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    drawn = (random.random(), np.random.rand(), torch.rand(1).item())
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    latent = evaluate_tasks(student, fast, ["choice"], task_folder=tasks)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == drawn
    assert student.training
    assert fast.pad_token is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    packed = student.eval().pack_and_unload()
    with use_backend("reference"):
        real = evaluate_tasks(packed, fast, ["choice"], task_folder=tasks)
    assert (latent.state, real.state) == ("student", "packed")
    assert latent.scores == real.scores


def test_the_protocol_holds_the_very_questions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tasks: Path
) -> None:
    def protocol(**options: Any) -> str:
        return evaluate_tasks(model, tokenizer, "choice", task_folder=tasks, **options).scores[0].protocol

    whole, part = protocol(), protocol(limit=3)
    assert "choice/version=3/shots=0/n=7/" in whole
    assert "/n=3/" in part
    assert protocol(batch_size=3) == whole != protocol(apply_chat_template=True)


def test_data_comes_from_a_folder_per_task_and_from_nowhere_else(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tasks: Path, tmp_path: Path
) -> None:
    (tmp_path / "missing").mkdir()
    rows = "\n".join(json.dumps(row) for row in QUESTIONS[:4])
    (tmp_path / "missing" / "test.jsonl").write_text(rows, encoding="utf-8")
    found = evaluate_tasks(model, tokenizer, "missing", task_folder=tasks, data_folder=tmp_path)
    own = evaluate_tasks(model, tokenizer, "choice", task_folder=tasks, limit=4)
    assert [score.samples for score in found.scores] == [score.samples for score in own.scores]
    with pytest.raises(DataError, match="splits of 'choice'"):
        evaluate_tasks(model, tokenizer, "choice", task_folder=tasks, data_folder=tmp_path)


def test_code_runs_only_with_leave(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")  # set by somebody else: no leave
    for name in ("written", "both"):
        with pytest.raises(ConfigError, match="allow_code_execution=True"):
            evaluate_tasks(model, tokenizer, name, task_folder=tasks)
    allowed = evaluate_tasks(model, tokenizer, "both", task_folder=tasks, allow_code_execution=True)
    assert {score.task for score in allowed.scores} >= {"choice", "written"}
    assert os.environ["HF_ALLOW_CODE_EVAL"] == "1"


@pytest.mark.slow  # a thousand tokens for each answer, as HumanEval has it
def test_humaneval_runs_from_files(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    problem = {"task_id": "x/0", "entry_point": "f", "canonical_solution": ""}
    body = 'def f():\n    """One."""\n    return 1\n'
    checks = [
        "def check(candidate):\n    assert candidate() == 1",
        "def check(candidate):\n    assert candidate() == 2",
    ]
    rows = [problem | {"prompt": f"{body}# ", "test": check} for check in checks]  # whatever follows is a comment
    (tmp_path / "humaneval").mkdir()
    (tmp_path / "humaneval" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = evaluate_tasks(model, tokenizer, "humaneval", data_folder=tmp_path, allow_code_execution=True)
    (score,) = found.scores
    assert (score.name, score.samples) == ("humaneval/pass@1/create_test", (1.0, 0.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": []}, "`tasks` must be names"),
        ({"tasks": "choice", "limit": 0}, "`limit` must be"),
        ({"tasks": "choice", "num_fewshot": -1}, "`num_fewshot` must be"),
        ({"tasks": "choice", "batch_size": True}, "`batch_size` must be"),
        ({"tasks": "choice", "task_folder": "nowhere"}, "`task_folder` must be a folder"),
        ({"tasks": "missing"}, "data of `tasks` must be readable"),
    ],
    ids=["none", "limit", "fewshot", "batch", "folder", "data"],
)
def test_what_cannot_be_scored_is_refused(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tasks: Path, options: dict[str, Any], message: str
) -> None:
    given = {"task_folder": tasks, **options}
    with pytest.raises((ConfigError, DataError), match=message):
        evaluate_tasks(model, tokenizer, **given)
    if given["tasks"] != "missing":  # what data there is, only reading it tells
        with pytest.raises(ConfigError, match=message):
            check_tasks(**given)


def test_tasks_are_judged_before_a_model_is_loaded(
    tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No model is at the named place; what is said first is about the tasks."""
    nowhere = str(tmp_path / "nowhere")
    for name, message in (("choise", "Did you mean 'choice'"), ("written", "allow_code_execution")):
        assert main(["eval", nowhere, "--tasks", name, "--task-folder", str(tasks)]) == 2
        assert message in capsys.readouterr().err
    assert main(["eval", nowhere, "--tasks", "choice", "--task-folder", str(tasks)]) == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.slow
def test_lm_evals_own_tasks_read_local_files_and_an_unknown_name_has_a_near_one(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "sst2").mkdir()
    rows = [{"sentence": "a charming journey .", "label": 1}, {"sentence": "bleak and desperate", "label": 0}]
    text = "\n".join(json.dumps(row) for row in rows)
    for split in ("train", "validation"):  # the task names both
        (tmp_path / "sst2" / f"{split}.jsonl").write_text(text, encoding="utf-8")
    (score,) = evaluate_tasks(model, tokenizer, "sst2", data_folder=tmp_path).scores
    assert (score.task, score.metric, score.num_samples, score.dataset) == ("sst2", "acc", 2, None)
    with pytest.raises(ConfigError, match="Did you mean 'gsm8k'"):
        evaluate_tasks(model, tokenizer, "gsm8kk")
    with pytest.raises(ConfigError, match="allow_code_execution=True"):
        evaluate_tasks(model, tokenizer, "humaneval")


def test_results_are_json_and_a_table(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tasks: Path) -> None:
    results = evaluate_tasks(model, tokenizer, "choice", task_folder=tasks)
    assert json.loads(results.to_json())["scores"][0]["protocol"] == results.scores[0].protocol
    assert results.to_markdown().count("\n") == 1 + len(results.scores)
    assert "full_precision" in str(results)
    assert yaml.safe_dump(results.eval_results()) == "[]\n"  # local data: the Hub would not know what it is
