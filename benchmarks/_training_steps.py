"""One optimizer step of the same model: plainly fine-tuned in full, and as a student with each kind of teacher."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from benchmarks._results import figure
from bitdistiller_peft import BitDistillerConfig, get_bitdistiller_model
from bitdistiller_peft.training import DistillConfig, DistillTrainer, cache_teacher

LENGTH, ROWS = 512, 4  # 2,048 tokens
WARM_UP = 64
ASKED = {"student only": 1.25, "self-teacher": 1.55, "cached teacher": 1.25}
SETTINGS: dict[str, Any] = {
    "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no",
    "per_device_train_batch_size": ROWS, "max_length": LENGTH, "max_steps": 1, "learning_rate": 1e-5,
}  # fmt: skip


def data(vocab: int) -> Dataset:
    """Random tokens: what a step costs does not depend on them."""
    rows = torch.randint(3, vocab, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def stepper(trainer: Any) -> Callable[..., None]:
    """A function that makes one step as the trainer would: loss, gradients, clipping, AdamW."""
    trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(ROWS)])
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-7, fused=True)

    def step(length: int = LENGTH) -> None:
        inputs = {name: tensor[:, :length] for name, tensor in batch.items()}
        targets = torch.tensor(ROWS * (length - 1))
        trainer.compute_loss(trainer.model, inputs, num_items_in_batch=targets).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def steppers(folder: Path, rows: Dataset, scratch: Path) -> dict[str, Callable[..., None]]:
    """Every kind of step, by name."""
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def student(**config: Any) -> Any:
        return get_bitdistiller_model(load(), BitDistillerConfig(bits=2, group_size=64, **config))

    def distilled(model: Any, **changes: Any) -> Callable[..., None]:
        args = DistillConfig(str(scratch), **SETTINGS, **changes)
        return stepper(DistillTrainer(model, args, train_dataset=rows, processing_class=tokenizer))

    plain = SFTTrainer(load(), SFTConfig(str(scratch), **SETTINGS), train_dataset=rows, processing_class=tokenizer)
    short = Dataset.from_dict({name: [row[:WARM_UP] for row in rows[name]] for name in rows.column_names})
    cache_teacher(load(), tokenizer, [rows, short], scratch / "cache", show_progress=False)
    cached = {"teacher": "cached", "teacher_cache": str(scratch / "cache")}
    return {
        "plain": stepper(plain),
        "student only": distilled(student(), loss_type="ce"),
        "self-teacher": distilled(student(), gamma=0.4),
        "cached teacher": distilled(student(), gamma=0.4, **cached),
    }


def run(folder: Path, rounds: int, rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Rounds of one step of each kind, as many as are missing."""
    torch.set_num_threads(1)
    first = len({row["round"] for row in rows})
    if first >= rounds:
        return
    with tempfile.TemporaryDirectory() as scratch:
        vocab = AutoModelForCausalLM.from_pretrained(folder).config.vocab_size
        kinds = steppers(folder, data(vocab), Path(scratch))
        for step in kinds.values():  # the optimizer's state, and whatever else comes with the first step
            step(WARM_UP)
        for turn in range(first, rounds):
            yield [timed(kind, turn, step) for kind, step in kinds.items()]


def timed(kind: str, turn: int, step: Callable[..., None]) -> dict[str, Any]:
    """One step, on the clock."""
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    row = {"kind": kind, "round": turn, "cpu_seconds": time.process_time() - cpu}
    row["seconds"] = time.perf_counter() - wall
    print(row, flush=True)
    return row


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Median ratios within a round."""
    seconds = {(row["kind"], row["round"]): row["cpu_seconds"] for row in rows}
    turns = sorted({row["round"] for row in rows})
    ratios = {kind: statistics.median(seconds[kind, t] / seconds["plain", t] for t in turns) for kind in ASKED}
    return {
        f"step with {kind} over plain full fine-tuning": figure(ratio, "", at_most=ASKED[kind])
        for kind, ratio in ratios.items()
    }
