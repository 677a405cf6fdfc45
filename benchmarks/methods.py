"""Perplexity of calibration methods and grids, without any training: AFPQ's comparison on one machine.

Every row is a fresh student of the same model: round-to-nearest, clip search, GPTQ or AWQ, on one grid at one width,
calibrated on the first windows of the calibration text and scored on another text. Each row is written to the results
file as it ends. A run that is started again goes on with the rows that are missing, if it is asked the same question;
rows of another model, text or size are not mixed in: `--restart` throws them away.

AFPQ (arXiv 2311.01792) orders the grids at 3 bits: two scales below one, NF3 with two scales below INT3. The figures
say whether that holds here, as differences of log-perplexity; a model whose weights are already of few values
(SmolLM2's are Q4_1 values) may order them otherwise, and then the figure says so.

    python -m benchmarks.methods --model PATH --calibration FILE --text FILE
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import _results
from benchmarks._results import figure, table, write_results
from bitdistiller_peft import BitDistillerConfig, calibrate, evaluate_perplexity, get_bitdistiller_model
from bitdistiller_peft.grids import grid_names

METHODS = ("rtn", "clip", "gptq", "awq")
GRIDS = ("int", "int_sym", "nf", "nf_sym", "fp", "fp_sym")
NAME = "methods"


def group_size(text: str) -> int | str:
    """A group size as the config takes it."""
    return text if text == "tensor" else int(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or name of a causal language model")
    parser.add_argument("--calibration", required=True, help="text file to calibrate on")
    parser.add_argument("--text", required=True, help="text file to score on")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--grids", nargs="+", choices=GRIDS, default=[grid for grid in GRIDS if grid in grid_names()])
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4])
    parser.add_argument("--group-sizes", type=group_size, nargs="+", default=[64], help="32, 64, 128, -1, ...")
    parser.add_argument("--chunks", type=int, default=40, help="chunks of --seq-len tokens to score")
    parser.add_argument("--samples", type=int, default=64, help="windows of --seq-len tokens to calibrate on")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--restart", action="store_true", help="throw away the rows of an earlier run")
    return parser.parse_args()


class Task:
    """The model, its tokenizer, both texts, and how much of them is used."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.calibration, self.text = (Path(path).read_text(encoding="utf-8") for path in (args.calibration, args.text))

    def question(self) -> dict[str, Any]:
        """What all rows of a results file have in common."""
        names = {key: Path(getattr(self.args, key)).name for key in ("model", "calibration", "text")}
        return {**names, **{key: getattr(self.args, key) for key in ("chunks", "samples", "seq_len")}}

    def perplexity(self, model: Any) -> float:
        """The score of a model, in whatever state it is."""
        result = evaluate_perplexity(
            model,
            self.tokenizer,
            self.text,
            seq_len=self.args.seq_len,
            max_chunks=self.args.chunks,
            show_progress=False,
        )
        return result.perplexity

    def full_precision(self) -> Any:
        """A fresh copy of the model in fp32."""
        return AutoModelForCausalLM.from_pretrained(self.args.model, dtype=torch.float32).eval()

    def row(self, setting: Mapping[str, Any]) -> dict[str, Any]:
        """Calibrate a fresh student and score it."""
        config = BitDistillerConfig(
            bits=setting["bits"],
            grid=setting["grid"],
            group_size=setting["group"],
            train_other="norms" if setting["method"] == "awq" else "none",
        )
        model = get_bitdistiller_model(self.full_precision(), config)
        started = time.perf_counter()
        if setting["method"] != "rtn":
            calibrate(
                model,
                self.tokenizer,
                [self.calibration],
                method=setting["method"],
                num_samples=self.args.samples,
                seq_len=self.args.seq_len,
                show_progress=False,
            )
        seconds = time.perf_counter() - started
        return {**setting, "perplexity": self.perplexity(model), "seconds": seconds}


def settings(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What is to be measured, one row each; full precision first."""
    yield {"method": "full", "grid": "-", "bits": 32, "group": 0}
    for bits, group, grid, method in product(args.bits, args.group_sizes, args.grids, args.methods):
        yield {"method": method, "grid": grid, "bits": bits, "group": group}


def earlier(question: Mapping[str, Any], *, restart: bool) -> list[dict[str, Any]]:
    """The rows of a run that asked the same question."""
    path = _results.RESULTS / f"{NAME}.cpu.json"
    if restart or not path.exists():
        return []
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    if any({key: row.get(key) for key in question} != dict(question) for row in rows):
        raise SystemExit(f"{path.name} holds rows of another model, text or size; keep it elsewhere, or pass --restart")
    return rows


def figures(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """AFPQ's orderings, for every method and group size that was measured on both sides."""
    scores = {(r["method"], r["grid"], r["bits"], r["group"]): r["perplexity"] for r in rows}
    found = {}
    for (method, grid, bits, group), score in scores.items():
        for better, worse in (("nf", "nf_sym"), ("fp", "fp_sym"), ("nf", "int")):
            other = scores.get((method, worse, bits, group))
            if grid == better and other is not None:
                difference = float(torch.log(torch.tensor(other / score, dtype=torch.float64)))
                asked = 0.0 if bits == 3 else None
                name = f"{method}_{better}_over_{worse}_{bits}bit_g{group}"
                found[name] = figure(difference, "nats per token", at_least=asked)
    return found


def measure(task: Task) -> list[dict[str, Any]]:
    """Measure what is missing, writing after each row."""
    question = task.question()
    rows = earlier(question, restart=task.args.restart)
    for setting in settings(task.args):
        if any(all(row[key] == value for key, value in setting.items()) for row in rows):
            continue
        if setting["method"] == "full":
            measured = {**setting, "perplexity": task.perplexity(task.full_precision()), "seconds": 0.0}
        else:
            measured = task.row(setting)
        rows.append({**measured, **question})
        write_results(NAME, rows, figures(rows))
        print(table([measured]).splitlines()[-1], flush=True)
    return rows


def main() -> None:
    """Measure, print, write."""
    rows = measure(Task(parse()))
    full = next(row["perplexity"] for row in rows if row["method"] == "full")
    shown = [
        {key: row[key] for key in ("bits", "group", "grid", "method", "perplexity", "seconds")}
        | {"ratio": row["perplexity"] / full}
        for row in rows
    ]
    print(table(shown))


if __name__ == "__main__":
    main()
