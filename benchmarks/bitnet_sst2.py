"""BitNet Distillation on SST-2: what each stage is worth, over several seeds, on all validation rows.

    python -m benchmarks.bitnet_sst2 --model MODEL --data FOLDER [--text FILE] [--work FOLDER] [--seeds 3]

The building blocks are those of `examples/bitnet_distillation.py`. The teacher and stage 2 are trained once and shared
by the seeds; a seed decides a student's rows and their order. Per seed, on the same rows for the same steps:

    sft             ternary weights and int8 activations, no SubLN; cross-entropy alone ("BitNet-SFT" of the paper)
    sft_pretrained  after stages 1 and 2, cross-entropy alone: what SubLN and plain text give
    bitdistill      after stages 1 and 2, cross-entropy, logits and attention relations
    distill_only    after stage 1 alone, the same loss (with --students distill_only)

Every row is written when it ends; teacher, stage 2 (also on its way) and the distilled models are kept in the work
folder, so a run that was stopped goes on when it is started again.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks._results import figure, table, write_results
from examples.bitnet_distillation import DISTILL, SETTINGS, accuracy, chunks, encode, read, student, train

NAME = "bitnet_sst2"
COUNTS = {"seeds": 3, "eval-rows": 872, "batch-size": 16, "steps": 150, "teacher-steps": 60, "teacher-batch-size": 32}
COUNTS |= {"pretrain-steps": 400, "pretrain-batch-size": 2, "pretrain-length": 256, "split-heads": 32}
RATES = {
    "learning-rate": 3e-4,
    "sft-learning-rate": 3e-4,
    "teacher-learning-rate": 5e-5,
    "pretrain-learning-rate": 1e-3,
}
RATES |= {"logits-weight": 10.0, "attention-weight": 1e5}
STUDENTS = ("bitdistill", "sft", "sft_pretrained", "distill_only")


class Experiment:
    """Models, data and results of one run.

    Args:
        options: the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.tokenizer = AutoTokenizer.from_pretrained(options.model)
        self.rows = read(options.data, "train")
        self.text = options.text.read_text("utf-8") if options.text else "\n".join(row["sentence"] for row in self.rows)
        self.validation = read(options.data, "validation")[: options.eval_rows]
        self.results_path = options.work / "rows.json"
        options.work.mkdir(parents=True, exist_ok=True)
        self.results = json.loads(self.results_path.read_text()) if self.results_path.exists() else []

    def settings(self, stage: str, **given: Any) -> dict[str, Any]:
        """A stage's arguments for the trainer."""
        return {**SETTINGS, "output_dir": str(self.options.work / stage), "disable_tqdm": True, **given}

    def task(self, seed: int, count: int) -> Dataset:
        """Training rows of a seed."""
        rows = random.Random(seed).sample(self.rows, min(count, len(self.rows)))
        return Dataset.from_list([encode(self.tokenizer, row, row["label"]) for row in rows])

    def teacher(self) -> Any:
        """The full-precision model, fine-tuned on the task."""
        folder, options = self.options.work / "teacher", self.options
        if not (folder / "config.json").exists():
            began, size = time.perf_counter(), options.teacher_batch_size
            settings = self.settings("teacher-run", max_steps=options.teacher_steps, per_device_train_batch_size=size)
            base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
            data = self.task(-1, options.teacher_steps * size)
            model = train(base, self.tokenizer, data, {**settings, "learning_rate": options.teacher_learning_rate})
            self.note("teacher", -1, model, began)
            model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def pretrained(self) -> Any:
        """The student after stages 1 and 2."""
        folder, options = self.options.work / "stage-2", self.options
        if not (folder / "adapter_config.json").exists():
            size = {"per_device_train_batch_size": options.pretrain_batch_size, "max_steps": options.pretrain_steps}
            saving = {"save_strategy": "steps", "save_steps": 100, "save_total_limit": 1}
            settings = self.settings("stage-2-run", learning_rate=options.pretrain_learning_rate, **size, **saving)
            data = chunks(self.tokenizer, self.text, options.pretrain_length)
            model = train(self.converted(), self.tokenizer, data, settings, loss_type="ce", adam_beta2=0.95)
            model.save_pretrained(folder)
        base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        return PeftModel.from_pretrained(base, folder, is_trainable=True)

    def student(self, name: str) -> Any:
        """Where a row starts from."""
        if name in ("sft_pretrained", "bitdistill"):
            return self.pretrained()
        return student(self.options.model, subln="none") if name == "sft" else self.converted()

    def converted(self) -> Any:
        """The student after stage 1, the gains of its norms started from the plain text (or at one)."""
        return student(self.options.model, self.tokenizer, "" if self.options.gains_at_one else self.text)

    def row(self, name: str, seed: int) -> None:
        """Train and measure one student, unless that has been done."""
        if any(row["name"] == name and row["seed"] == seed for row in self.results):
            return
        options = self.options
        model, loss = self.student(name), {"loss_type": "ce"}
        if name in ("bitdistill", "distill_only"):
            weights = {"logits_weight": options.logits_weight, "attention_weight": options.attention_weight}
            shape = {"attention_split_heads": options.split_heads, "attention_reduction": options.reduction}
            loss = {**DISTILL, **weights, **shape, "teacher": self.teacher()}
        size = {"max_steps": options.steps, "per_device_train_batch_size": options.batch_size}
        rate = options.sft_learning_rate if name == "sft" else options.learning_rate
        settings = self.settings(f"{name}-{seed}-run", learning_rate=rate, seed=seed, **size)
        data, began = self.task(seed, options.steps * options.batch_size), time.perf_counter()
        model = train(model, self.tokenizer, data, settings, adam_beta2=0.95, **loss)
        if name == "bitdistill":
            model = model.pack_and_unload(progressbar=False)
            model.save_pretrained(options.work / f"packed-{seed}")
        self.note(name, seed, model, began)

    def note(self, name: str, seed: int, model: Any, began: float) -> None:
        """Measure a model and write what is known so far."""
        trained = time.perf_counter() - began
        value = accuracy(model, self.tokenizer, self.validation)
        row = {"name": name, "seed": seed, "accuracy": value, "rows": len(self.validation), "seconds": trained}
        self.results.append(row)
        self.results_path.write_text(json.dumps(self.results, indent=1))
        write_results(self.options.name, self.results, figures(self.results, self.options))
        print(json.dumps(row), flush=True)


def figures(rows: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Means and spreads over the seeds, and what was asked: BitDistill above BitNet-SFT beyond the spread."""
    tokens = options.pretrain_steps * options.pretrain_batch_size * options.pretrain_length
    found = {"plain text in stage 2": figure(tokens, "tokens")}
    scores = {name: [row["accuracy"] for row in rows if row["name"] == name] for name in ("teacher", *STUDENTS)}
    spread = {name: stdev(values) for name, values in scores.items() if len(values) > 1}
    for name, values in scores.items():
        if values:
            found[f"accuracy of {name}"] = figure(mean(values), "share of rows")
        if name in spread:
            found[f"spread of {name}"] = figure(spread[name], "standard deviation over seeds")
    if "sft" in spread and "bitdistill" in spread:
        gain = mean(scores["bitdistill"]) - mean(scores["sft"])
        widest = max(spread["sft"], spread["bitdistill"])
        found["bitdistill above sft"] = figure(gain, "share of rows", at_least=widest)
        found["teacher above bitdistill"] = figure(
            mean(scores["teacher"]) - mean(scores["bitdistill"]), "share of rows"
        )
    return found


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hub name or folder")
    parser.add_argument("--data", type=Path, required=True, help="folder with SST-2")
    parser.add_argument("--text", type=Path, help="plain text for stage 2; default: the sentences without their labels")
    parser.add_argument("--work", type=Path, default=Path("runs/bitnet_sst2"), help="models and results so far")
    parser.add_argument("--name", default=NAME, help="of the file of results, for a second model")
    parser.add_argument("--reduction", default="code", help="attention_reduction: 'paper' or 'code'")
    parser.add_argument("--gains-at-one", action="store_true", help="of SubLN norms, as published, not from the text")
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=STUDENTS[:3], help="rows to measure")
    for name, value in {**COUNTS, **RATES}.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    return parser.parse_args()


def main() -> None:
    """Measure, print, write."""
    options = parse()
    experiment = Experiment(options)
    experiment.teacher()
    for seed in range(options.seeds):
        for name in options.students:
            experiment.row(name, seed)
    write_results(options.name, experiment.results, figures(experiment.results, options))
    print(table(experiment.results))


if __name__ == "__main__":
    main()
