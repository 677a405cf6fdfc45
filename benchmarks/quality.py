"""Quality at equal bits and equal training tokens: ours beside the published recipes, on one model and several texts.

Every row is a way from the full-precision model to a packed one. Rows that train see the same windows of the same text
and the same number of tokens, `--tokens`; `fast` sees a quarter. A row is measured as packed, and is in the results
file as soon as it ends; a row that is there already, under the same settings, is not run again.

    python -m benchmarks.quality --model PATH --train-text FILE [FILE ...] --eval NAME=FILE [NAME=FILE ...]
    python -m benchmarks.quality ... --rows rtn clip balanced --bits 3 --seed 1

Files are text, or JSON lines (also gzipped) with a field "text", "output" or the only string in the line. Training and
evaluation texts must not overlap. Of each evaluation text, the first 40 chunks of 512 tokens are measured; the
divergence from the teacher on the first of them.
"""

from __future__ import annotations

import argparse
import math
import resource
import time
from typing import Any

from torch import nn
from transformers import set_seed

from benchmarks import _arms
from benchmarks._arms import CHUNKS, MIN_MAX, Arm
from benchmarks._results import figure, table
from bitdistiller_peft import calibrate, quant_summary

BLOCK_SEQ_LEN, BLOCK_BATCH = 128, 2
STEP_TOKENS = 1024

LEARNED = {"learn_zero_point": True}
OURS = {"learning_rate": 1.5e-2, "scale_learning_rate": 1e-2}
PUBLISHED_BLOCK = {"clip_search": False, "loss": "mse"}
GENTLE = {"loss_type": "cakld", "learning_rate": 1e-5, "warmup_ratio": 0.1}

ARMS = {
    "rtn": Arm(MIN_MAX, share=0.0),
    "clip": Arm(MIN_MAX, clip=True, share=0.0),
    # min-max recomputed at every step, CAKLD, no warm start: at its own learning rate and at better ones
    "bitdistiller": Arm(MIN_MAX, clip=True, training={"loss_type": "cakld", "learning_rate": 8e-6}),
    "bitdistiller-lr5e-5": Arm(MIN_MAX, clip=True, training={"loss_type": "cakld", "learning_rate": 5e-5}),
    "bitdistiller-lr2e-4": Arm(MIN_MAX, clip=True, training={"loss_type": "cakld", "learning_rate": 2e-4}),
    # Block-AP from min-max on mean squared error, then the scales alone on cross-entropy; at two block learning rates
    "efficientqat": Arm(
        LEARNED,
        blockwise=(0.75, {**PUBLISHED_BLOCK, "learning_rate": 1e-3, "scale_learning_rate": 1e-3}),
        training={"loss_type": "ce", "learning_rate": 0.0, "scale_learning_rate": 2e-5},
    ),
    "efficientqat-lr5e-3": Arm(
        LEARNED,
        blockwise=(0.75, {**PUBLISHED_BLOCK, "learning_rate": 5e-3, "scale_learning_rate": 2e-3}),
        training={"loss_type": "ce", "learning_rate": 0.0, "scale_learning_rate": 2e-5},
    ),
    "fast": Arm(LEARNED, blockwise=(1.0, OURS), share=0.25),
    "balanced": Arm(LEARNED, blockwise=(0.8, OURS), training=GENTLE),
    # parts of ours taken away
    "balanced-mse": Arm(LEARNED, blockwise=(0.8, {**OURS, "loss": "mse"}), training=GENTLE),
    "balanced-no-clip": Arm(LEARNED, blockwise=(0.8, {**OURS, "clip_search": False}), training=GENTLE),
    "balanced-fixed-zero-point": Arm({}, blockwise=(0.8, OURS), training=GENTLE),
    "balanced-blockwise-only": Arm(LEARNED, blockwise=(1.0, OURS)),
    "balanced-forward-kl": Arm(LEARNED, blockwise=(0.8, OURS), training={**GENTLE, "loss_type": "forward_kl"}),
}
NOT_BY_DEFAULT = tuple(name for name in ARMS if name.startswith("balanced-"))


class Bench(_arms.Bench):
    """Rows of this benchmark."""

    def row(self, name: str) -> dict[str, Any]:
        """Make one model and measure it."""
        set_seed(self.options.seed)
        started = time.perf_counter()
        model = self.load()
        tokens = 0
        if name != "full_precision":
            model, tokens = self.student(model, ARMS[name])
        seconds = time.perf_counter() - started
        scores = {f"ppl_{key}": self.perplexity(model, text) for key, text in self.eval_texts.items()}
        first = next(iter(self.eval_texts.values()))
        divergence = None if name == "full_precision" else self.divergence(model, first)
        summary = quant_summary(model)
        return {
            "row": name,
            "bits_per_weight": summary.bits_per_weight,
            **scores,
            "kl": divergence.mean_kl_nats if divergence else 0.0,
            "agreement": divergence.top1_agreement if divergence else 1.0,
            "tokens": tokens,
            "seconds": seconds,
            "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        }

    def student(self, model: nn.Module, arm: Arm) -> tuple[nn.Module, int]:
        """Quantize, calibrate, train and pack as an arm says; also returns how many tokens were trained on."""
        options = self.options
        student = self.prepare(model, arm, options.bits, options.group_size)
        budget = round(options.tokens * arm.share)
        if arm.clip:
            self.clip(student)
        share, values = arm.blockwise or (0.0, {})
        steps = round(budget * (1 - share) / STEP_TOKENS) if arm.training is not None else 0
        samples = (budget - steps * STEP_TOKENS) // BLOCK_SEQ_LEN if arm.blockwise else 0
        used = samples * BLOCK_SEQ_LEN
        if samples:
            windows = self.windows(used)[:, :used].reshape(samples, BLOCK_SEQ_LEN)
            calibrate(
                student, None, windows, method="blockwise", num_samples=samples, seq_len=BLOCK_SEQ_LEN,
                batch_size=BLOCK_BATCH, epochs=1, seed=options.seed, **values,
            )  # fmt: skip
        if arm.training is not None:
            self.train(student, self.windows(budget)[:, used:], steps, arm.training)
            used += steps * STEP_TOKENS
        return student.pack_and_unload(), used


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures asked for, as far as their rows are there."""
    found: dict[str, Any] = {}
    for bits in sorted({row["bits"] for row in rows}):
        by_name = {row["row"]: row for row in rows if row["bits"] == bits and row["seed"] == 0}
        key = next((name for name in (rows[0] if rows else {}) if name.startswith("ppl_")), "")
        log = {name: math.log(row[key]) for name, row in by_name.items()}
        if {"full_precision", "bitdistiller", "balanced"} <= set(log):
            left = log["bitdistiller"] - log["full_precision"]
            closed = (log["bitdistiller"] - log["balanced"]) / left
            found[f"{bits}bit_share_of_gap_closed"] = figure(closed, "of the log-perplexity gap", at_least=0.5)
        if {"efficientqat", "balanced"} <= set(log):
            best = min(value for name, value in log.items() if name.startswith("efficientqat"))
            ratio = math.exp(log["balanced"] - best)
            found[f"{bits}bit_against_efficientqat"] = figure(ratio, "ratio of perplexities", at_most=1.0)
        if {"bitdistiller", "fast"} <= set(log):
            ratio = math.exp(log["fast"] - log["bitdistiller"])
            found[f"{bits}bit_fast_against_bitdistiller"] = figure(ratio, "ratio of perplexities", at_most=1.0)
            times = by_name["fast"]["seconds"] / by_name["bitdistiller"]["seconds"]
            found[f"{bits}bit_fast_time"] = figure(times, "of bitdistiller's time", at_most=0.25)
        if {"rtn", "clip"} <= set(log):
            found[f"{bits}bit_clip_below_rtn"] = figure(math.exp(log["rtn"] - log["clip"]), "times", at_least=2.0)
        if {"clip", "balanced"} <= set(log):
            found[f"{bits}bit_balanced_below_clip"] = figure(math.exp(log["clip"] - log["balanced"]), "times")
    return found


def main() -> None:
    """Run the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _arms.add_arguments(parser, tokens=61_440, chunks=CHUNKS, name="quality")
    default = [name for name in ARMS if name not in NOT_BY_DEFAULT]
    parser.add_argument("--rows", nargs="+", default=default, choices=list(ARMS), help="default: all but ablations")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=64)
    options = parser.parse_args()
    settings = {"bits": options.bits, "group_size": options.group_size, "seed": options.seed, "chunks": options.chunks}
    bench = Bench(options, step_tokens=STEP_TOKENS)
    wanted = [{"row": name, **settings, "budget": options.tokens} for name in ["full_precision", *options.rows]]
    rows = _arms.measure(options.name, wanted, lambda setting: bench.row(setting["row"]), figures)
    print(table(rows))


if __name__ == "__main__":
    main()
