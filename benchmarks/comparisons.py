"""Grids and losses at equal tokens: R2Q's claims and BitDistiller's, each against what it is to be better than.

    python -m benchmarks.comparisons r2q --model PATH --train-text FILE [FILE ...] --eval NAME=FILE [NAME=FILE ...]
    python -m benchmarks.comparisons bitdistiller ... --learning-rates 1e-4 --bits 2 3

Suite `r2q` (arXiv 2511.21736 claims stable training and faster convergence): integers from min-max, from a clip search
and with learned scales beside two residual signs, at one loss, one learning rate and on the same windows in the same
order. Group sizes must divide the model's widths: SmolLM2-135M's are 576 and 1536, which 128 does not divide, hence 64,
192 and -1 (a scale per channel) by default; give `--group-sizes 64 128 -1` where it does.

Suite `bitdistiller` (arXiv 2402.10631, integers at 2 bits and NF3 at 3): CAKLD against the other losses, with the clip
search and without, and on the teacher's own texts against plain ones.

A row keeps the loss and the share of flipped codes of every step, and `[tokens, seconds, perplexity]` at the start,
after a quarter and a half of the tokens and at the end, as the student in training (which is what is packed) on the
first `--probe-chunks` of the first text. Seconds are of training alone, and without a GPU they are seconds of CPU time,
so that other work on the machine does not count; those of clip search and teacher data, which are done once and kept in
`--cache`, stand beside them. A row is written as it ends; rows that are there are not run again.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, set_seed

from benchmarks import _arms
from benchmarks._arms import MIN_MAX, SEQ_LEN, Arm, clock
from benchmarks._results import figure, table
from bitdistiller_peft import generate_teacher_data

RESIDUAL = {"grid": "r2q", "refine": "least_squares"}
OWN = {"int-minmax": Arm(MIN_MAX), "int-clip": Arm(MIN_MAX, clip=True), "r2q": Arm({**RESIDUAL, **MIN_MAX})}
LEARNED = {"int-learned": Arm(), "int-clip-learned": Arm(clip=True), "r2q-learned": Arm(RESIDUAL)}
VARIANTS = {
    "r2q-greedy": Arm({**RESIDUAL, **MIN_MAX, "refine": None}),
    "r2q-alternating": Arm({**RESIDUAL, **MIN_MAX, "refine": "alternating"}),
    "r2q-tied": Arm({**RESIDUAL, **MIN_MAX, "tied": True}),
}
PUBLISHED = Arm(MIN_MAX, clip=True)
LOSSES = ("cakld", "forward_kl", "reverse_kl", "jsd", "ce")
BITDISTILLER = {loss: replace(PUBLISHED, training={"loss_type": loss}) for loss in LOSSES}
BITDISTILLER["cakld-no-clip"] = replace(BITDISTILLER["cakld"], clip=False)
BITDISTILLER["cakld-own-text"] = replace(BITDISTILLER["cakld"], is_own_text=True)
SUITES = {"r2q": {**OWN, **LEARNED, **VARIANTS}, "bitdistiller": BITDISTILLER}
GRIDS = {2: "int", 3: "nf"}  # of BitDistiller
RATES = [8e-6, 1e-4]  # BitDistiller's, and one that moves codes within few steps
PROMPT_TOKENS, PROMPTS_AT_ONCE = 32, 16
FLIP_LAYERS = 16
SETTING = ("row", "bits", "group_size", "learning_rate")


class Probe(TrainerCallback):
    """Looks at the student a few times along a run, outside of the time that is measured."""

    def __init__(self, bench: Bench, student: Any, steps: int) -> None:
        self.bench, self.student, self.at = bench, student, {steps // 4, steps // 2, steps}
        self.points: list[list[float]] = []
        self.seconds, self._since = 0.0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._look(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.at:
            self._look(state.global_step)

    def _look(self, step: int) -> None:
        self.seconds += clock() - self._since if step else 0.0
        text, chunks = next(iter(self.bench.eval_texts.values())), self.bench.options.probe_chunks
        score = self.bench.perplexity(self.student, text, max_chunks=chunks, batch_size=chunks, show_progress=False)
        self.points.append([step * self.bench.step_tokens, round(self.seconds, 1), float(f"{score:.6g}")])
        self._since = clock()


class Bench(_arms.Bench):
    """Rows of this benchmark."""

    def row(self, setting: dict[str, Any], arm: Arm) -> dict[str, Any]:
        """Make one model and measure it."""
        set_seed(self.options.seed)
        gc.collect()
        model = self.load()
        found: dict[str, Any] = {"teacher_seconds": 0.0, "clip_seconds": 0.0, "seconds": 0.0, "probes": []}
        if setting["row"] != "full_precision":
            own, found["teacher_seconds"] = self.own_windows(model) if arm.is_own_text else (None, 0.0)
            student = self.prepare(model, arm, setting["bits"], setting["group_size"])
            found["clip_seconds"] = self.clip(student, self.options.cache) if arm.clip else 0.0
            ids = self.windows(self.options.tokens) if own is None else own
            found |= self.run(student, ids, {"learning_rate": setting["learning_rate"], **(arm.training or {})})
            model = student.pack_and_unload()
        return {**found, **{f"ppl_{key}": self.perplexity(model, text) for key, text in self.eval_texts.items()}}

    def run(self, student: Any, ids: Tensor, values: dict[str, Any]) -> dict[str, Any]:
        """Train, and keep what happened."""
        steps = self.options.tokens // self.step_tokens
        probe = Probe(self, student, steps)
        values = {"loss_type": self.options.loss, "lr_scheduler_type": "constant", **values}
        values |= {"logging_steps": 1, "flip_rate_layers": FLIP_LAYERS}
        log = [entry for entry in self.train(student, ids, steps, values, [probe]) if "loss" in entry]
        curves = {key: [float(f"{entry[key]:.4g}") for entry in log] for key in ("loss", "flip_rate")}
        return {"seconds": probe.seconds, "probes": probe.points, **curves}

    def own_windows(self, model: Any) -> tuple[Tensor, float]:
        """As many windows of what the model writes as of plain text, and the seconds that writing takes, or took.

        Each answer continues the beginning of a window of the plain text.
        """
        options, written, at, seconds = self.options, 0, 0, 0.0
        texts: list[str] = []
        openings = self.windows(8 * options.tokens).reshape(-1, SEQ_LEN)[:, :PROMPT_TOKENS]
        prompts = [self.tokenizer.decode(ids) for ids in openings]
        while written < options.tokens and at < len(prompts):
            folder = options.cache / f"teacher-{SEQ_LEN}-{options.seed}" / str(at // PROMPTS_AT_ONCE)
            kept, started = folder / "seconds", clock()
            rows = generate_teacher_data(
                model, self.tokenizer, prompts[at : at + PROMPTS_AT_ONCE], output_dir=folder, seed=options.seed,
                max_new_tokens=SEQ_LEN - PROMPT_TOKENS, batch_size=PROMPTS_AT_ONCE,
            )  # fmt: skip
            if not kept.exists():
                kept.write_text(str(clock() - started), encoding="utf-8")
            seconds += float(kept.read_text(encoding="utf-8"))
            texts += [row["prompt"] + row["completion"] for row in rows]
            written += sum(row["num_tokens"] for row in rows)
            at += PROMPTS_AT_ONCE
        return _arms.windows_of([texts], self.tokenizer, options.tokens), seconds


def wanted(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The settings of every row, full precision first."""
    common = {
        "suite": options.suite,
        "model": Path(options.model).name,
        "text": "+".join(path.name for path in options.train_text),
        "tokens": options.tokens,
        "step_tokens": options.step_tokens,
        "chunks": options.chunks,
        "seed": options.seed,
    }
    yield {**common, **dict.fromkeys(SETTING, 0), "row": "full_precision"}
    for rate in options.learning_rates:
        for bits in options.bits:
            for group_size in options.group_sizes:
                for name in options.rows or SUITES[options.suite]:
                    if name not in VARIANTS or group_size == options.group_sizes[0] or options.rows:
                        yield {**common, **dict(zip(SETTING, (name, bits, group_size, rate), strict=True))}


def arm_of(setting: dict[str, Any]) -> Arm:
    """The arm of a row; that of a BitDistiller row with the grid of its width."""
    arm = SUITES[setting["suite"]].get(setting["row"], Arm())
    if setting["suite"] == "bitdistiller":
        return replace(arm, model={**arm.model, "grid": GRIDS.get(setting["bits"], "int")})
    return arm


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Each claim as a ratio, wherever its rows are there."""
    by = {(r["suite"], r["bits"], r["group_size"], r["learning_rate"], r["seed"], r["row"]): r for r in rows}
    found: dict[str, Any] = {}
    for (suite, bits, group, rate, seed, name), row in by.items():
        where = f"{bits}bit_g{group}_lr{rate:g}" + (f"_seed{seed}" if seed else "")
        same = {key[-1]: other for key, other in by.items() if key[:-1] == (suite, bits, group, rate, seed)}
        if suite == "r2q" and name == "r2q":
            for other in ("int-minmax", "int-clip", "int-learned"):
                if other in same:
                    found |= _against(row, same[other], f"r2q_against_{other}_{where}")
        if suite == "bitdistiller" and name == "cakld":
            for other in same:
                if other != name:
                    found |= _against(row, same[other], f"cakld_against_{other}_{where}")
    return found


def _against(row: dict[str, Any], other: dict[str, Any], name: str) -> dict[str, Any]:
    """How much better a row is than another: below 1 throughout."""
    key = next(key for key in row if key.startswith("ppl_"))
    target = max(row["probes"][-1][2], other["probes"][-1][2])
    found = {f"{name}_perplexity": figure(row[key] / other[key], "ratio of perplexities", at_most=1.0)}
    for unit, column in (("tokens", 0), ("seconds", 1)):
        mine, theirs = (reached(entry["probes"], target, column) for entry in (row, other))
        if mine is not None and theirs:
            found[f"{name}_{unit}"] = figure(mine / theirs, f"ratio of {unit} to the same perplexity", at_most=1.0)
    return found


def reached(points: list[list[float]], target: float, column: int) -> float | None:
    """Where a run first reached a perplexity, between the points linearly in its logarithm; `None` if it did not."""
    for before, after in itertools.pairwise(points):
        if after[2] <= target < before[2]:
            part = math.log(before[2] / target) / math.log(before[2] / after[2])
            return before[column] + part * (after[column] - before[column])
    return 0.0 if points and points[0][2] <= target else None


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row as a line of the table: curves as a few numbers."""
    loss = row.get("loss") or [math.nan]
    quarter = max(1, len(loss) // 4)
    jumps = [after - before for before, after in itertools.pairwise(loss)]
    return {
        **{key: row[key] for key in SETTING},
        "first loss": loss[0],
        "last quarter": statistics.fmean(loss[-quarter:]),
        "sd of steps": statistics.pstdev(jumps) if jumps else 0.0,
        "mean flips": statistics.fmean(row.get("flip_rate") or [0.0]),
        **{key: value for key, value in row.items() if key.startswith("ppl_")},
        "seconds": row["seconds"],
    }


def main() -> None:
    """Run the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=list(SUITES))
    _arms.add_arguments(parser, tokens=16_384, chunks=16, name="comparisons")
    parser.add_argument("--rows", nargs="+", help="some rows; by default all, variants of R2Q at the first group size")
    parser.add_argument("--bits", type=int, nargs="+", default=[2])
    parser.add_argument("--group-sizes", type=int, nargs="+", help="default: 64 192 -1 for r2q, 64 for bitdistiller")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--loss", default="forward_kl", help="of suite r2q: forward_kl, cakld, ...")
    parser.add_argument("--step-tokens", type=int, default=2 * SEQ_LEN, help=f"of a step: a multiple of {SEQ_LEN}")
    parser.add_argument("--probe-chunks", type=int, default=4, help="chunks measured along the way")
    parser.add_argument("--cache", type=Path, default=Path("runs/comparisons"), help="folder for clip and teacher data")
    options = parser.parse_args()
    options.group_sizes = options.group_sizes or ([64, 192, -1] if options.suite == "r2q" else [64])
    unknown = set(options.rows or ()) - set(SUITES[options.suite])
    if unknown or options.step_tokens % SEQ_LEN or options.tokens % options.step_tokens:
        parser.error(f"rows must be of {list(SUITES[options.suite])}, tokens whole steps of whole {SEQ_LEN} tokens")
    bench = Bench(options, step_tokens=options.step_tokens)
    rows = _arms.measure(options.name, wanted(options), lambda row: bench.row(row, arm_of(row)), figures, shown)
    print(table([shown(row) for row in rows if row["suite"] == options.suite and row["row"] != "full_precision"]))


if __name__ == "__main__":
    main()
