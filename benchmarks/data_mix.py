"""What the mix of training data does: how far the student is from its teacher on each kind of text.

    python -m benchmarks.data_mix --model PATH --train-text FILE [FILE ...] --eval NAME=FILE [NAME=FILE ...]
        --conversations FILE --eval-conversations FILE

One student at 2 bits is calibrated block by block on the plain texts, as `best-2bit` does. From there, every row trains
it end to end, as `best-2bit` does, on as many tokens of another mix: of plain text, of conversations with people's
answers, and of the same prompts with the answers that the model itself writes (`own`). Conversations go through the
tokenizer's chat template, for training and for measuring. They are JSON lines (also gzipped) with "messages", or with
"instruction", "output" and perhaps "input"; those with prompts of more than 64 tokens are left out. Training and
evaluation texts must not overlap.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from benchmarks import _arms
from benchmarks._arms import SEQ_LEN, clock
from benchmarks._results import figure, table
from bitdistiller_peft import (
    BitDistillerConfig,
    DistillConfig,
    DistillTrainer,
    calibrate,
    evaluate_sources,
    generate_teacher_data,
    get_bitdistiller_model,
    get_recipe,
    mix_data,
)
from bitdistiller_peft.evaluation import SourceDivergences

RECIPE = "best-2bit"
MIXES = {
    "start": {},
    "plain": {"plain": 1.0},
    "chat": {"chat": 1.0},
    "own": {"own": 1.0},
    "plain-chat": {"plain": 0.5, "chat": 0.5},
    "plain-own": {"plain": 0.5, "own": 0.5},
    "plain-chat-own": {"plain": 0.5, "chat": 0.25, "own": 0.25},
}
MAX_PROMPT, OWN_PROMPTS, OWN_TOKENS = 64, 96, 128
CHAT = "conversations"


class Bench(_arms.Bench):
    """Rows of this benchmark."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options, step_tokens=SEQ_LEN)
        held_out = conversations(options.eval_conversations)
        rendered = [self.tokenizer.apply_chat_template(messages, tokenize=False) for messages in held_out]
        self.held_out = {
            **{name: "\n\n".join(texts) for name, texts in self.eval_texts.items()},
            CHAT: "".join(rendered),
        }

    @cached_property
    def chats(self) -> list[list[dict[str, str]]]:
        """Conversations with short prompts."""
        return [messages for messages in conversations(self.options.conversations) if self._is_short(messages)]

    def _is_short(self, messages: list[dict[str, str]]) -> bool:
        return len(self.tokenizer(messages[0]["content"])["input_ids"]) <= MAX_PROMPT

    @cached_property
    def own(self) -> list[dict[str, Any]]:
        """The model's own answers, written where a mix asks for them."""
        options = {"max_new_tokens": OWN_TOKENS, "batch_size": 16, "seed": self.options.seed}
        prompts = [messages[:-1] for messages in self.chats[:OWN_PROMPTS]]
        return list(
            generate_teacher_data(self.load(), self.tokenizer, prompts, output_dir=self.options.cache, **options)
        )

    def source(self, name: str) -> list[Any]:
        """Rows to train on, of one source."""
        match name:
            case "plain":
                return [text for texts in self.train_texts for text in texts]
            case "chat":
                return [{"messages": messages} for messages in self.chats]
            case _:
                return self.own

    @cached_property
    def student(self) -> Any:
        """Calibrated on plain text."""
        student = get_bitdistiller_model(self.load(), BitDistillerConfig.from_recipe(RECIPE))
        for options in get_recipe(RECIPE).calibration:
            windows = self.windows(options["num_samples"] * options["seq_len"])
            rows = windows.reshape(-1, options["seq_len"])[: options["num_samples"]]
            calibrate(student, None, rows, seed=self.options.seed, **options)
        return student

    @cached_property
    def start(self) -> dict[str, torch.Tensor]:
        """Its state then."""
        return copy.deepcopy(self.student.state_dict())

    @cached_property
    def before(self) -> SourceDivergences:
        """Its distances then."""
        self.student.load_state_dict(self.start)
        return self.measured()

    def measured(self) -> SourceDivergences:
        """Its distances now."""
        options = {"seq_len": SEQ_LEN, "max_chunks": self.options.chunks}
        return evaluate_sources(self.student, "self", self.tokenizer, self.held_out, **options)

    def row(self, shares: dict[str, float]) -> dict[str, Any]:
        """Train on one mix and measure."""
        now, seconds, report = self.before, 0.0, None
        if shares:
            self.student.load_state_dict(self.start)
            set_seed(self.options.seed)
            chosen = {name: self.source(name) for name in shares}
            data, report = mix_data(
                chosen, shares, self.tokenizer, num_tokens=self.options.tokens, seed=self.options.seed
            )
            seconds = clock()
            self.distill(data)
            seconds = clock() - seconds
            now = self.measured()
            print(report, now.since(self.before), sep="\n", flush=True)
        return {
            "tokens": sum(source.tokens for source in report.sources) if report else 0,
            "targets": sum(source.targets for source in report.sources) if report else 0,
            **{f"kl_{name}": result.mean_kl_nats for name, result in now.results.items()},
            **{f"agreement_{name}": result.top1_agreement for name, result in now.results.items()},
            "seconds": seconds,
        }

    def distill(self, data: Any) -> None:
        """The recipe's end-to-end stage, once through."""
        recipe = get_recipe(RECIPE).training
        steps = self.options.tokens // recipe["max_length"]
        with tempfile.TemporaryDirectory() as folder:
            args = DistillConfig.from_recipe(
                RECIPE, output_dir=folder, max_steps=steps, warmup_steps=steps // 5, seed=self.options.seed,
                packing_strategy="wrapped", gradient_checkpointing=False, save_strategy="no", report_to="none",
                use_cpu=not torch.cuda.is_available(),
            )  # fmt: skip
            DistillTrainer(self.student, args, train_dataset=data, processing_class=self.tokenizer).train()


def conversations(path: Path) -> list[list[dict[str, str]]]:
    """Messages of every line of a file of JSON lines."""
    return [_messages(row) for row in _arms.read_rows(path)]


def _messages(row: dict[str, Any]) -> list[dict[str, str]]:
    if "messages" in row:
        return list(row["messages"])
    asked = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the mixes do beside plain text alone, on plain text and on conversations."""
    of = {row["row"]: row for row in rows}
    found: dict[str, Any] = {}
    for name in of.keys() - {"start", "plain"} if "plain" in of else ():
        for key in (key for key in of[name] if key.startswith("kl_")):
            ratio = of[name][key] / of["plain"][key]
            found[f"{name}_{key}"] = figure(ratio, "of the divergence that plain text alone leaves")
    return dict(sorted(found.items()))


def main() -> None:
    """Run the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _arms.add_arguments(parser, tokens=7_680, chunks=10, name="data_mix")
    parser.add_argument("--conversations", type=Path, required=True, help="conversations to train on")
    parser.add_argument("--eval-conversations", type=Path, required=True, help="conversations to measure")
    parser.add_argument("--rows", nargs="+", default=list(MIXES), choices=list(MIXES))
    parser.add_argument("--cache", type=Path, default=Path("runs/data_mix"), help="keeps the answers the model writes")
    options = parser.parse_args()
    bench = Bench(options)
    fixed = {"seed": options.seed, "chunks": options.chunks, "budget": options.tokens}
    wanted = [{"row": name, **fixed} for name in options.rows]
    print(table(_arms.measure(options.name, wanted, lambda setting: bench.row(MIXES[setting["row"]]), figures)))


if __name__ == "__main__":
    main()
