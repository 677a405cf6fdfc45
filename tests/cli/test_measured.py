"""What was measured of a model, and of no other, goes to the Hub with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from bitdistiller_peft.cli.measured import measured
from bitdistiller_peft.cli.verbs import push
from bitdistiller_peft.errors import DataError
from tests.cli.conftest import Command


def evaluated(folder: Path, model: Path) -> Path:
    """A folder as `eval` leaves it, with the base model's row first."""
    scored = {"perplexity": 20.5, "protocol": "ppl/v1", "state": "packed"}
    distance = {"mean_kl_nats": 0.25, "p95_kl_nats": 1.5, "top1_agreement": 0.75, "protocol": "kl/v1"}
    task = {"task": "arc_easy", "metric": "acc", "value": 0.5, "protocol": "lm-eval/v1"}
    rows = [
        {"model": "team/base", "perplexity": scored | {"perplexity": 1.0}},
        {"model": str(model), "perplexity": scored, "divergence": distance, "tasks": {"scores": [task]}},
    ]
    (folder / ".eval_results").mkdir(parents=True)
    (folder / ".eval_results" / "allenai--ai2_arc.yaml").write_text("- value: 0.5\n")
    (folder / "result.json").write_text(json.dumps({"rows": rows}))
    (folder / "resolved.yaml").write_text("eval:\n  text: [/home/me/held-out.txt, wikitext2]\n")
    return folder


def test_the_rows_of_this_model_are_found_with_text_and_protocol(tmp_path: Path) -> None:
    found = measured(str(evaluated(tmp_path / "eval", tmp_path / "model")), tmp_path / "model")
    assert [(row["metric"], row["value"], row["data"], row["protocol"]) for row in found.rows] == [
        ("perplexity", 20.5, "held-out.txt, wikitext2", "ppl/v1"),
        ("mean_kl_nats", 0.25, "held-out.txt, wikitext2", "kl/v1"),
        ("p95_kl_nats", 1.5, "held-out.txt, wikitext2", "kl/v1"),
        ("top1_agreement", 0.75, "held-out.txt, wikitext2", "kl/v1"),
        ("acc", 0.5, "arc_easy", "lm-eval/v1"),
    ]
    assert list(found.files) == [".eval_results/allenai--ai2_arc.yaml"]


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "must be a folder of `bitdistiller eval`"), ("{}", "must be a folder of"), ("rows", "must be a folder of")],
)
def test_a_folder_that_is_no_evaluation_is_refused(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    with pytest.raises(DataError, match=words):
        measured(str(tmp_path), tmp_path / "model")


def test_the_evaluation_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = evaluated(tmp_path / "eval", tmp_path / "model")
    with pytest.raises(DataError, match="must hold a measurement of"):
        measured(str(folder), tmp_path / "other")


def test_push_finds_the_evaluation_of_its_chain(
    command: Command, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "run" / "distill" / "packed"
    shutil.copytree(packed, model)
    evaluated(tmp_path / "run" / "eval", model)
    seen: dict[str, Any] = {}

    def upload(settings: Any, folder: Any, repo: str, files: dict[str, Path], rows: list[dict[str, Any]]) -> str:
        seen.update(files=files, card=push._card(folder, repo, rows).decode())
        return "https://example.com"

    monkeypatch.setattr(push, "_upload", upload)
    before = (model / "README.md").read_bytes()
    done = command("push", model, "--repo", "user/tiny")
    assert done.code == 0, done.err
    assert "perplexity 20.5" in done.out
    assert ".eval_results/allenai--ai2_arc.yaml" in done.out
    assert seen["files"][".eval_results/allenai--ai2_arc.yaml"].is_file()
    results = ModelCard(seen["card"]).data.eval_results
    assert [(entry.metric_type, entry.metric_value) for entry in results][::4] == [("perplexity", 20.5), ("acc", 0.5)]
    assert "| perplexity | 20.5 | held-out.txt, wikitext2 | `ppl/v1` |" in seen["card"]
    assert (model / "README.md").read_bytes() == before
    moved = tmp_path / "elsewhere"
    shutil.copytree(packed, moved)
    assert "measured" not in command("push", moved, "--repo", "user/tiny", "--dry-run").out
    wrong = command("push", moved, "--repo", "user/tiny", "--results", tmp_path / "run" / "eval")
    assert (wrong.code, "must hold a measurement of" in wrong.err) == (2, True)
