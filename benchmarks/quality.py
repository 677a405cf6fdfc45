"""Quality at equal bits and equal training tokens: ours beside the published recipes, on one model and several texts.

Every row is a way from the full-precision model to a packed one. Rows that train see the same windows of the same text
and the same number of tokens, `--tokens`; `fast` sees an eighth of them. A row is measured as packed, and is in the
results file as soon as it ends; a row that is there already, under the same settings, is not run again.

    python -m benchmarks.quality --model PATH --train-text FILE [FILE ...] --eval NAME=FILE [NAME=FILE ...]
    python -m benchmarks.quality ... --rows rtn clip balanced --bits 3 --seeds 0 1 2
    python -m benchmarks.quality ... --tasks hellaswag arc_easy piqa --task-data FOLDER

Files are text, or JSON lines (also gzipped) with a field "text", "output" or the only string in the line. Training and
evaluation texts must not overlap. Of each evaluation text, the first 40 chunks of 512 tokens are measured; the
divergence from the teacher on the first 10 of the first text. Tasks are lm-evaluation-harness's, their first 200 items,
normalized accuracy, from FOLDER/TASK/SPLIT.jsonl with the Hub's columns; they cost a row minutes. `cpu_seconds` is the
processor's time up to the packed model, which other work on the machine changes less; where there is a GPU, compare
`seconds`. Times of two machines say nothing about each other: rows have their `machine`.
"""

from __future__ import annotations

import argparse
import math
import resource
import time
from collections import Counter, defaultdict
from pathlib import Path
from statistics import median
from typing import Any

from torch import nn
from transformers import set_seed

from benchmarks import _arms, _quality_peers
from benchmarks._arms import CHUNKS, MIN_MAX, SEQ_LEN, Arm
from benchmarks._results import figure, table
from bitdistiller_peft import calibrate, evaluate_tasks
from bitdistiller_peft.calibration.clip import FACTORS
from bitdistiller_peft.recipes.best import BLOCK_RATES, END_RATES, FEW_FACTORS, OBJECTIVE, WIDE_FACTORS

BLOCK_SEQ_LEN, BLOCK_BATCH = 128, 2
KL_CHUNKS = 10
STEP_TOKENS = 1024

LEARNED = {"learn_zero_point": True}
FINE = {**LEARNED, "grid": "int_fine"}
OURS, FINER_BLOCKS = BLOCK_RATES[2], BLOCK_RATES[3]
# many small steps: half of the tokens then bring a block as far as long windows in pairs do
STEPS = {"seq_len": 64, "batch_size": 1}
SHORT = {**OURS, **STEPS, "factors": FEW_FACTORS}
NARROW_BLOCKS = {**OURS, **STEPS, "look_ahead": 1}
BLOCKS = {**NARROW_BLOCKS, "factors": WIDE_FACTORS}
FINER = {**FINER_BLOCKS, **STEPS, "look_ahead": 1}
STAGES = (("q_proj", "k_proj"), ("v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj"))
PUBLISHED_BLOCK = {"clip_search": False, "loss": "mse"}
GENTLE = {"loss_type": "cakld", "learning_rate": 1e-5, "warmup_ratio": 0.1}
# most of the tokens end to end, in many small steps, with rates that move codes
END_TO_END = {**OBJECTIVE, **END_RATES[2], "warmup_ratio": 0.2, "seq_len": 128, "step_tokens": 128}
FINER_END = {**END_TO_END, **END_RATES[3]}
LOGITS_ALONE, FINER_LOGITS_ALONE = {**END_TO_END, "hidden_weight": 0.0}, {**FINER_END, "hidden_weight": 0.0}
CAKLD = {"loss_type": "cakld"}
LARGER_STEPS = {
    **LOGITS_ALONE,
    **CAKLD,
    "learning_rate": 5e-4,
    "scale_learning_rate": 5e-4,
    "seq_len": 512,
    "step_tokens": 512,
}

ARMS = {
    "rtn": Arm(MIN_MAX, share=0.0),
    "clip": Arm(MIN_MAX, clip=True, share=0.0),
    "gptq": Arm(method="gptq", share=0.0),
    "awq": Arm(MIN_MAX, method="awq", share=0.0),
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
    "fast": Arm(FINE, blockwise=(1.0, SHORT), share=0.125),
    "fast-half-more": Arm(LEARNED, blockwise=(1.0, SHORT), share=0.1875),
    "fast-more": Arm(LEARNED, blockwise=(1.0, SHORT), share=0.25),
    "fast-all-factors": Arm(LEARNED, blockwise=(1.0, {**SHORT, "factors": FACTORS}), share=0.25),
    "fast-half": Arm(LEARNED, blockwise=(1.0, {**SHORT, "factors": FACTORS}), share=0.125),
    "fast-weight-clip": Arm(LEARNED, blockwise=(1.0, {**SHORT, "factors": FACTORS, "objective": "weight"}), share=0.25),
    "fast-larger-steps": Arm(LEARNED, blockwise=(1.0, {**OURS, "factors": FEW_FACTORS}), share=0.25),
    "balanced": Arm(FINE, blockwise=(0.25, BLOCKS), training=END_TO_END),
    # five times the tokens; a row this long is what a processor does in half an hour
    "max": Arm(FINE, blockwise=(0.25, BLOCKS), training=END_TO_END, share=5.0),
    # a smaller file than that of 2 bits with embeddings in 16: no training, embeddings in 8 bits, all else in 4
    "same-size": Arm({**MIN_MAX, "bits": 4, "grid": "int_sym", "embedding_bits": 8}, clip=True, share=0.0),
    # a clip search on the grid of ours
    "clip-fine": Arm({**MIN_MAX, "grid": "int_fine"}, clip=True, share=0.0),
    # ours on the grid of the others
    "fast-int": Arm(LEARNED, blockwise=(1.0, SHORT), share=0.125),
    "balanced-int": Arm(LEARNED, blockwise=(0.25, NARROW_BLOCKS), training=LOGITS_ALONE),
    "balanced-int-cakld": Arm(LEARNED, blockwise=(0.25, NARROW_BLOCKS), training={**LOGITS_ALONE, **CAKLD}),
    # what `balanced` was before, and before that
    "balanced-before": Arm(FINE, blockwise=(0.25, NARROW_BLOCKS), training=LOGITS_ALONE),
    "balanced-half": Arm(LEARNED, blockwise=(0.5, OURS), training={**LOGITS_ALONE, **CAKLD}),
    "balanced-few-factors": Arm(
        LEARNED, blockwise=(0.5, {**OURS, "factors": FEW_FACTORS}), training={**LOGITS_ALONE, **CAKLD}
    ),
    "balanced-larger-steps": Arm(LEARNED, blockwise=(0.5, OURS), training=LARGER_STEPS),
    "balanced-gentle": Arm(LEARNED, blockwise=(0.8, OURS), training=GENTLE),
    "balanced-rates-of-2-bits": Arm(LEARNED, blockwise=(0.5, OURS), training={**LOGITS_ALONE, **CAKLD}),
    # parts of ours taken away
    "balanced-no-look-ahead": Arm(FINE, blockwise=(0.25, {**OURS, **STEPS}), training=END_TO_END),
    "balanced-mse": Arm(FINE, blockwise=(0.25, {**BLOCKS, "loss": "mse"}), training=END_TO_END),
    "balanced-no-clip": Arm(FINE, blockwise=(0.25, {**BLOCKS, "clip_search": False}), training=END_TO_END),
    "balanced-fixed-zero-point": Arm({"grid": "int_fine"}, blockwise=(0.25, BLOCKS), training=END_TO_END),
    "balanced-end-to-end-only": Arm(FINE, clip=True, training=END_TO_END),
    "balanced-blockwise-only": Arm(FINE, blockwise=(1.0, BLOCKS)),
    "balanced-cakld": Arm(FINE, blockwise=(0.25, BLOCKS), training={**END_TO_END, **CAKLD}),
    "balanced-no-hidden": Arm(FINE, blockwise=(0.25, BLOCKS), training=LOGITS_ALONE),
    "balanced-narrow-factors": Arm(FINE, blockwise=(0.25, NARROW_BLOCKS), training=END_TO_END),
    "balanced-no-awq": Arm(FINE, blockwise=(0.25, FINER), training=FINER_END),
    # parts added: stages and finer widths see the same windows again, each time anew
    "balanced-three-ahead": Arm(FINE, blockwise=(0.25, {**BLOCKS, "look_ahead": 3}), training=END_TO_END),
    "balanced-staged": Arm(FINE, blockwise=(0.25, {**BLOCKS, "stages": STAGES}), training=END_TO_END),
    "balanced-soft": Arm(FINE, blockwise=(0.25, {**BLOCKS, "rounding": "soft"}), training=END_TO_END),
    "balanced-progressive": Arm(FINE, blockwise=(0.25, {**BLOCKS, "progressive_bits": (4,)}), training=END_TO_END),
    "balanced-rotated": Arm(
        FINE,
        method="awq",
        method_options={"rotate_heads": True, "alphas": (0.0,), "clip_search": False},
        blockwise=(0.25, BLOCKS),
        training=END_TO_END,
    ),
    "balanced-sinkhorn": Arm(
        {**FINE, "train_other": "norms"},
        method="awq",
        method_options={"scales": "sinkhorn", "clip_search": False},
        blockwise=(0.25, BLOCKS),
        training=END_TO_END,
    ),
    "balanced-norms": Arm({**FINE, "train_other": "norms"}, blockwise=(0.25, BLOCKS), training=END_TO_END),
    "balanced-embedding8": Arm({**FINE, "embedding_bits": 8}, blockwise=(0.25, BLOCKS), training=END_TO_END),
    "balanced-embedding4": Arm({**FINE, "embedding_bits": 4}, blockwise=(0.25, BLOCKS), training=END_TO_END),
    "balanced-awq": Arm(FINE, method="awq", blockwise=(0.25, BLOCKS), training=END_TO_END),
    # other people's packages, which have to be installed
    "autoround": Arm(peer="autoround"),
    "torchao-qat": Arm(peer="torchao", training={"learning_rate": 5e-5}),
}
OF_WIDTH = {  # in place of those above
    3: {
        "balanced": Arm(FINE, method="awq", blockwise=(0.25, FINER), training=FINER_END),
        "balanced-before": Arm(FINE, method="awq", blockwise=(0.25, FINER), training=FINER_LOGITS_ALONE),
        "balanced-int": Arm(LEARNED, method="awq", blockwise=(0.25, FINER), training=FINER_LOGITS_ALONE),
        "balanced-half": Arm(
            LEARNED, method="awq", blockwise=(0.5, FINER_BLOCKS), training={**FINER_LOGITS_ALONE, **CAKLD}
        ),
        "balanced-cakld": Arm(FINE, method="awq", blockwise=(0.25, FINER), training={**FINER_END, **CAKLD}),
        "balanced-int-cakld": Arm(
            LEARNED, method="awq", blockwise=(0.25, FINER), training={**FINER_LOGITS_ALONE, **CAKLD}
        ),
    },
}
NOT_BY_DEFAULT = tuple(
    name for name, arm in ARMS.items() if arm.peer or name == "max" or name.startswith(("balanced-", "fast-"))
)


class Bench(_arms.Bench):
    """Rows of this benchmark."""

    def row(self, name: str) -> dict[str, Any]:
        """Make one model and measure it."""
        set_seed(self.options.seed)
        started, started_cpu = time.perf_counter(), time.process_time()
        model = self.load()
        arm = OF_WIDTH.get(self.options.bits, {}).get(name, ARMS.get(name))
        tokens, peer = 0, arm is not None and arm.peer
        if arm is not None:
            model, tokens = self.of_peer(model, arm) if arm.peer else self.student(model, arm)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
        scores = {f"ppl_{key}": self.perplexity(model, text) for key, text in self.eval_texts.items()}
        first = next(iter(self.eval_texts.values()))
        divergence = None if name == "full_precision" else self.divergence(model, first, KL_CHUNKS)
        return {
            "row": name,
            "bits_per_weight": self._peer_bits(model) if peer else _arms.stored_bits(model),
            **scores,
            "kl": divergence.mean_kl_nats if divergence else 0.0,
            "kl_p95": divergence.p95_kl_nats if divergence else 0.0,
            "agreement": divergence.top1_agreement if divergence else 1.0,
            **self.accuracies(model),
            "tokens": tokens,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        }

    def accuracies(self, model: nn.Module) -> dict[str, float]:
        """Normalized accuracy on the first items of the tasks asked for."""
        options = self.options
        if not options.tasks:
            return {}
        local = {"data_folder": options.task_data, "limit": options.task_items, "batch_size": 8}
        scores = evaluate_tasks(model, self.tokenizer, options.tasks, **local).scores
        return {f"acc_{score.task}": score.value for score in scores if score.metric == "acc_norm"}

    def student(self, model: nn.Module, arm: Arm) -> tuple[nn.Module, int]:
        """Quantize, calibrate, train and pack as an arm says; also returns how many tokens were trained on."""
        options = self.options
        student = self.prepare(model, arm, options.bits, options.group_size)
        budget = round(options.tokens * arm.share)
        if arm.clip:
            self.clip(student)
        if arm.method:
            windows = self.calibration_windows()
            options_of = {"num_samples": len(windows), "seq_len": SEQ_LEN, **arm.method_options}
            calibrate(student, None, windows, method=arm.method, **options_of)
        share, values = arm.blockwise or (0.0, {})
        shape = {"seq_len": BLOCK_SEQ_LEN, "batch_size": BLOCK_BATCH, **values}
        length = shape["seq_len"]
        step_tokens = (arm.training or {}).get("step_tokens", STEP_TOKENS)
        steps = round(budget * (1 - share) / step_tokens) if arm.training is not None else 0
        samples = (budget - steps * step_tokens) // length if arm.blockwise else 0
        used = samples * length
        if samples:
            windows = self.windows(used)[:, :used].reshape(samples, length)
            calibrate(
                student, None, windows, method="blockwise", num_samples=samples, epochs=1, seed=options.seed, **shape
            )
        if arm.training is not None:
            self.train(student, self.windows(budget)[:, used:], steps, arm.training)
            used += steps * step_tokens
        return student.pack_and_unload(), used

    def of_peer(self, model: nn.Module, arm: Arm) -> tuple[nn.Module, int]:
        """Let another package do it, on the same windows; also returns their tokens."""
        options, windows = self.options, self.windows(self.options.tokens)[:, : self.options.tokens]
        how = {"bits": options.bits, "group_size": options.group_size}
        if arm.peer == "autoround":
            return _quality_peers.autoround(model, self.tokenizer, windows, **how), windows.shape[1]
        rows = windows.reshape(-1, SEQ_LEN)
        how |= {"batch_size": STEP_TOKENS // SEQ_LEN, "seed": options.seed, **(arm.training or {})}
        return _quality_peers.torchao_qat(model, rows, **how), windows.shape[1]

    def _peer_bits(self, model: nn.Module) -> float:
        return _quality_peers.bits_of(model, bits=self.options.bits, group_size=self.options.group_size)


ORIGINAL = ("bitdistiller", "bitdistiller-lr5e-5", "bitdistiller-lr2e-4")
EFFICIENT = ("efficientqat", "efficientqat-lr5e-3")


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures asked for, as far as their rows are there: at each width, of the means over the seeds.

    Of rows of several budgets, those of the commonest; of a row that was run twice, with tasks and without, the later.
    """
    found: dict[str, Any] = {}
    budget = Counter(row.get("budget") for row in rows).most_common(1)[0][0]
    rows = list({(r["bits"], r["row"], r["seed"]): r for r in rows if r.get("budget") == budget}.values())
    for bits in sorted({row["bits"] for row in rows}):
        mine = [row for row in rows if row["bits"] == bits]
        corpora = [key for key in mine[0] if key.startswith("ppl_")]
        for number, corpus in enumerate(corpora):
            for name, value in _compared(_mean_logs(mine, corpus)).items():
                suffix = f"_{corpus.removeprefix('ppl_')}" if number else ""
                found[f"{bits}bit_{name}{suffix}"] = value
        ratio = _time_ratio(mine)
        if ratio is not None:
            found[f"{bits}bit_fast_time"] = figure(ratio, "of bitdistiller's processor time", at_most=0.25)
    return found


def _time_ratio(rows: list[dict[str, Any]]) -> float | None:
    """Processor time of `fast` over the original's, which does not depend on its rate, where one machine made both."""
    times: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        kind = "original" if row["row"] in ORIGINAL else row["row"]
        times[row["machine"]][kind].append(row["cpu_seconds"])
    ratios = [median(of["fast"]) / median(of["original"]) for of in times.values() if {"fast", "original"} <= set(of)]
    return ratios[-1] if ratios else None


def _mean_logs(rows: list[dict[str, Any]], corpus: str) -> dict[str, float]:
    """Log-perplexity by row, the mean over its seeds."""
    logs: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        logs[row["row"]].append(math.log(row[corpus]))
    return {name: sum(values) / len(values) for name, values in logs.items()}


def _compared(log: dict[str, float]) -> dict[str, Any]:
    """What one text says, from the log-perplexities on it."""
    found: dict[str, Any] = {}
    balanced, full = log.get("balanced"), log.get("full_precision")
    originals, efficient = ([log[name] for name in names if name in log] for names in (ORIGINAL, EFFICIENT))
    if balanced is not None and full is not None:
        found["left_of_full_precision"] = figure(math.exp(balanced - full), "times its perplexity")
        if "bitdistiller" in log:
            found["share_of_gap_closed"] = _closed(log["bitdistiller"], balanced, full)
        if "bitdistiller" in log and len(originals) > 1:
            found["share_of_gap_closed_at_its_best_rate"] = _closed(min(originals), balanced, full)
    if balanced is not None and efficient:
        ratio = math.exp(balanced - min(efficient))
        found["against_efficientqat"] = figure(ratio, "ratio of perplexities", at_most=1.0)
    if {"bitdistiller", "fast"} <= set(log):
        ratio = math.exp(log["fast"] - log["bitdistiller"])
        found["fast_against_bitdistiller"] = figure(ratio, "ratio of perplexities", at_most=1.0)
    return found


def _closed(original: float, ours: float, full: float) -> dict[str, Any]:
    return figure((original - ours) / (original - full), "of the log-perplexity gap", at_least=0.5)


def main() -> None:
    """Run the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _arms.add_arguments(parser, tokens=30_720, chunks=CHUNKS, name="quality")
    default = [name for name in ARMS if name not in NOT_BY_DEFAULT]
    parser.add_argument("--rows", nargs="+", default=default, choices=list(ARMS), help="default: all but ablations")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", help="one row each, instead of --seed")
    parser.add_argument("--tasks", nargs="+", default=[], help="of lm-evaluation-harness; such rows stand apart")
    parser.add_argument("--task-data", type=Path, help="folder with their data (default: the Hub)")
    parser.add_argument("--task-items", type=int, default=200)
    options = parser.parse_args()
    fixed = {"bits": options.bits, "group_size": options.group_size, "chunks": options.chunks, "budget": options.tokens}
    measured_on = {"tasks": options.tasks, "task_items": options.task_items} if options.tasks else {}
    bench = Bench(options, step_tokens=STEP_TOKENS)
    seeds = options.seeds or [options.seed]
    wanted = [{"row": "full_precision", "seed": 0, **fixed, **measured_on}]
    wanted += [{"row": name, "seed": seed, **fixed, **measured_on} for seed in seeds for name in options.rows]

    def run(setting: dict[str, Any]) -> dict[str, Any]:
        options.seed = setting["seed"]
        return bench.row(setting["row"])

    rows = _arms.measure(options.name, wanted, run, figures)
    print(table(rows))


if __name__ == "__main__":
    main()
