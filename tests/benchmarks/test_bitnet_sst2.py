"""The SST-2 benchmark trains every row once, goes on where it stopped, and compares what it says it compares."""

from __future__ import annotations

import gzip
import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import _results, bitnet_sst2
from examples.bitnet_distillation import accuracy, encode
from tests.standin import english, save_standin

REVIEWS = [("a charming and affecting journey", 1), ("contains no wit", 0), ("a joy to watch", 1), ("dull", 0)]
ROWS = [{"sentence": text, "label": label} for text, label in REVIEWS]


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> dict[str, Any]:
    monkeypatch.setattr(_results, "RESULTS", folder / "results")
    sizes = {"teacher-steps": 1, "pretrain-steps": 1, "steps": 1, "batch-size": 2, "split-heads": 8}
    paths = {"model": folder / "model", "data": folder, "text": folder / "text.txt", "work": folder / "work"}
    options = [f"--{name}={value}" for name, value in {**paths, **sizes}.items()]
    monkeypatch.setattr(sys, "argv", ["bitnet_sst2", *options, *more])
    bitnet_sst2.main()
    return json.loads((folder / "results" / "bitnet_sst2.cpu.json").read_text())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_standin(tmp_path / "model")
    lines = "\n".join(map(json.dumps, ROWS))
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "text.txt").write_text(english()[0][:5_000], encoding="utf-8")
    return tmp_path


def test_rows_are_trained_once_and_a_stopped_run_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = run(folder, monkeypatch, "--seeds=1")
    assert [row["name"] for row in written["rows"]] == ["teacher", "bitdistill", "sft", "sft_pretrained"]
    assert all(row["rows"] == 4 for row in written["rows"])
    assert written["figures"]["plain text in stage 2"]["value"] == 512
    packed = AutoModelForCausalLM.from_pretrained(folder / "work" / "packed-0")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert accuracy(packed, tokenizer, ROWS) == written["rows"][1]["accuracy"]

    kept = [row for row in written["rows"] if row["name"] != "sft"]
    (folder / "work" / "rows.json").write_text(json.dumps(kept))
    shared = [path.stat().st_mtime_ns for path in sorted((folder / "work" / "stage-2").iterdir())]
    again = run(folder, monkeypatch, "--seeds=1")["rows"]
    assert again[:-1] == kept
    assert again[-1]["name"] == "sft"
    assert run(folder, monkeypatch, "--seeds=1", "--students", "sft")["rows"] == again
    assert shared == [path.stat().st_mtime_ns for path in sorted((folder / "work" / "stage-2").iterdir())]


@torch.no_grad()
def test_accuracy_takes_the_likelier_label_row_by_row(folder: Path) -> None:
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder / "model").eval(),
        AutoTokenizer.from_pretrained(folder / "model"),
    )
    model.lm_head.weight.mul_(20)  # a random head has next to no opinion
    right = []
    for row in ROWS * 3:
        both = [encode(tokenizer, row, label)["input_ids"] for label in (0, 1)]
        start = next(i for i in range(len(both[0])) if both[0][i] != both[1][i])
        costs = [-model(torch.tensor([ids])).logits[0, start - 1].log_softmax(-1)[ids[start]] for ids in both]
        right.append(costs.index(min(costs)) == row["label"])
    assert accuracy(model, tokenizer, ROWS * 3, batch_size=5) == sum(right) / 12


def test_the_gain_is_held_against_the_wider_spread() -> None:
    options = Namespace(pretrain_steps=1, pretrain_batch_size=1, pretrain_length=10)
    scores = {"teacher": [0.9], "sft": [0.6, 0.7], "bitdistill": [0.8, 0.82]}
    rows = [{"name": name, "accuracy": value} for name, values in scores.items() for value in values]
    found = bitnet_sst2.figures(rows, options)
    assert found["bitdistill above sft"]["value"] == pytest.approx(0.16)
    assert found["bitdistill above sft"]["asked"]["min"] == pytest.approx(0.0707, abs=1e-4)
    assert found["teacher above bitdistill"]["value"] == pytest.approx(0.09)
