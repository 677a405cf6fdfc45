"""How far a teacher that is not in memory, or in few bits, is from the live one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks._arms import named_texts
from benchmarks._results import figure
from bitdistiller_peft import BitDistillerConfig, get_bitdistiller_model
from bitdistiller_peft.training import DistillConfig, DistillTrainer, cache_teacher

LENGTH, ROWS = 128, 2
GAMMA = 0.375
# of the student's gradient, at 3 and 4 bits: what a few kept tokens cost in an earlier measurement on this model
ASKED = {"hidden": {2: 0.01, 3: 0.01, 4: 0.01}, "top 64": {3: 0.30, 4: 0.12}, "top 256": {3: 0.22, 4: 0.067}}
PASSAGE = "a passage"
TEXT = (
    "The lighthouse had stood on the cliff for two hundred years, and in all that time its lamp had gone out "
    "only once. Nobody in the village could say why. Some blamed the wind, which comes up the channel in "
    "winter and finds its way through every crack; others said that the keeper had fallen asleep, and one or "
    "two still believed in the story of the ship without a crew. The engineer who repaired it wrote in his "
    "report that a valve had stuck, and that the pressure in the line fell below what the burner needs. He "
    "added a drawing, a list of parts and the price of each. His daughter, who kept the report after his "
    "death, gave it to the museum, where it hangs beside a photograph of the tower. Visitors read the first "
    "line and walk on. Those who stay learn that the list is wrong: the sum at the bottom is seven shillings "
    "too high, and there is a part in it that no such lamp has ever had. What it was for, and who was paid for "
    "it, is a question that the town has not stopped asking."
)


def gradients(student: Any, rows: Dataset, tokenizer: Any, folder: Path, **teacher: Any) -> dict[str, Tensor]:
    """The gradients of one batch."""
    args = DistillConfig(
        str(folder), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", gamma=GAMMA,
        per_device_train_batch_size=ROWS, max_length=LENGTH, max_steps=1, save_strategy="no", **teacher,
    )  # fmt: skip
    trainer = DistillTrainer(student, args, train_dataset=rows, processing_class=tokenizer)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(ROWS)])
    student.zero_grad()
    trainer.compute_loss(student.train(), batch).backward()
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


def distance(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Relative, over all tensors together."""
    off = sum(float((got[name] - grad).square().sum()) for name, grad in wanted.items())
    return float((off / sum(float(grad.square().sum()) for grad in wanted.values())) ** 0.5)


def texts_of(named: Sequence[str]) -> dict[str, str]:
    """The passage above, and of each `NAME=FILE` enough for the rows: documents from the first one on."""
    documents = dict(named_texts(item) for item in named)
    return {PASSAGE: TEXT} | {name: "\n\n".join(texts)[: 16 * LENGTH * ROWS] for name, texts in documents.items()}


def run(folder: Path, texts: dict[str, str], rows_before: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Gradients on each text under every cache, at 2 to 4 bits, and under bitsandbytes' teachers."""
    done = {(row["text"], row["student_bits"]) for row in rows_before}
    for name, text in texts.items():
        missing = [bits for bits in (2, 3, 4) if (name, bits) not in done]
        if missing:
            yield from _on_text(folder, name, text, missing)


def _on_text(folder: Path, name: str, text: str, widths: list[int]) -> Iterator[list[dict[str, Any]]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text)["input_ids"][: LENGTH * ROWS]
    rows = Dataset.from_dict({"input_ids": [ids[i * LENGTH : (i + 1) * LENGTH] for i in range(ROWS)]})
    rows = rows.add_column("labels", rows["input_ids"])
    with tempfile.TemporaryDirectory() as scratch:
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        caches = {"hidden": {"dtype": "bfloat16"}, "top 64": {"kind": "topk", "k": 64}}
        caches["top 256"] = {"kind": "topk", "k": 256}
        for kind, options in caches.items():
            cache_teacher(base, tokenizer, rows, Path(scratch) / kind, show_progress=False, **options)
        del base
        for bits in widths:
            found: list[dict[str, Any]] = []
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            student = get_bitdistiller_model(model, BitDistillerConfig(bits=bits, group_size=64))
            live = gradients(student, rows, tokenizer, Path(scratch) / "run")
            teachers: dict[str, dict[str, Any]] = {
                kind: {"teacher": "cached", "teacher_cache": str(Path(scratch) / kind)} for kind in caches
            }
            teachers["in 8 bits"] = {"teacher": f"quantized:{folder}"}
            teachers["in 4 bits"] = {
                "teacher": f"quantized:{folder}", "teacher_init_kwargs": {"load_in_4bit": True}
            }  # fmt: skip
            for kind, options in teachers.items():
                got = gradients(student, rows, tokenizer, Path(scratch) / "run", **options)
                error = distance(got, live)
                found.append({"text": name, "teacher": kind, "student_bits": bits, "gradient_error": error})
                print(found[-1], flush=True)
            yield found


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The error of every gradient."""
    return {
        f"gradient under {row['teacher']}, {row['student_bits']}-bit student, {row['text']}": figure(
            row["gradient_error"], "", at_most=ASKED.get(row["teacher"], {}).get(row["student_bits"])
        )
        for row in rows
    }
