"""BitNet Distillation (arXiv 2510.13998) on SST-2: a task-tuned teacher, and 1.58-bit students with and without it.

Run: python examples/bitnet_distillation.py --model MODEL --data FOLDER [--text FILE] [--rows N] [--steps N]
FOLDER holds train.jsonl.gz and validation.jsonl.gz with `sentence` and `label` (1 for positive); FILE is plain text for
stage 2, else the sentences. Makes a teacher, BitNet-SFT (cross-entropy alone) and BitDistill in three stages. Defaults,
on a model of 260,000 weights, 5 minutes of one core: accuracy .59, .58, .47, too short for the paper's order.
docs/methods/bitnet-distillation.md has settings that show it (.78, .69, .74: `python -m benchmarks.bitnet_sst2`).
"""

from __future__ import annotations

import argparse
import gzip
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from bitdistiller_peft import BitDistillerConfig, DistillConfig, DistillTrainer, fit_subln, get_bitdistiller_model

COUNTS = {"seed": 0, "rows": 4096, "eval-rows": 872, "steps": 300, "batch-size": 16, "split-heads": 32}
RATES = {"learning-rate": 1e-3, "teacher-learning-rate": 5e-5, "logits-weight": 10.0, "attention-weight": 1e5}
LABELS = (" negative", " positive")
BITNET = {"grid": "ternary", "group_size": "tensor", "gradient": "ste", "learn_scale": False, "activation_bits": 8}
DISTILL = {"loss_type": "forward_kl", "ce_weight": 1.0, "temperature": 5.0, "rescale_temperature": False}
SETTINGS = {"lr_scheduler_type": "cosine", "warmup_steps": 0.05, "logging_steps": 10, "save_strategy": "no"}
SETTINGS |= {"gradient_checkpointing": False, "report_to": "none", "use_cpu": not torch.accelerator.is_available()}
SETTINGS |= {"train_sampling_strategy": "group_by_length"}
CHUNK = 256  # tokens of plain text in a row of stage 2
load = partial(AutoModelForCausalLM.from_pretrained, dtype=torch.float32)


def encode(tokenizer: Any, row: dict[str, Any], label: int) -> dict[str, list[int]]:
    prompt = tokenizer(f"Review: {row['sentence'].strip()}\nSentiment:")["input_ids"]
    answer = tokenizer(LABELS[label], add_special_tokens=False)["input_ids"]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, rows: list[dict[str, Any]], batch_size: int = 64) -> float:
    """How often the right label is the likelier continuation, judged where both labels first differ."""
    model.eval()
    tasks, right = [], 0
    for row in rows:
        both = [encode(tokenizer, row, label)["input_ids"] for label in range(len(LABELS))]
        at = next(i for i, pair in enumerate(zip(*both, strict=False)) if len(set(pair)) > 1)
        tasks.append((both[0][:at], row["label"]))
    tasks.sort(key=lambda task: len(task[0]))
    for start in range(0, len(tasks), batch_size):
        ids, labels = zip(*tasks[start : start + batch_size], strict=True)
        padded = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt").to(model.device)
        logits = model(**padded, use_cache=False, logits_to_keep=1).logits[:, -1, [ids[at] for ids in both]]
        right += int((logits.argmax(-1).cpu() == torch.tensor(labels)).sum())
    return right / len(tasks)


def student(path: Any, tokenizer: Any = None, text: str = "", subln: str = "output") -> Any:
    model = get_bitdistiller_model(load(path), BitDistillerConfig(**BITNET, subln=subln, packing="base3"))
    if text:  # else the gains of the norms start at one, as published
        fit_subln(model, tokenizer, [text], seq_len=CHUNK)
    return model


def train(model: Any, tokenizer: Any, data: Dataset, settings: dict[str, Any], **loss: Any) -> Any:
    """One stage, continued if it was interrupted; without `loss` an ordinary fine-tuning with cross-entropy."""
    common, teacher = {"train_dataset": data, "processing_class": tokenizer}, loss.pop("teacher", None)
    if loss:
        trainer: Any = DistillTrainer(model, DistillConfig(**settings, **loss), teacher=teacher, **common)
    else:
        trainer = SFTTrainer(model, SFTConfig(**settings), **common)
    trainer.train(resume_from_checkpoint=any(Path(settings["output_dir"]).glob("checkpoint-*")))
    return trainer.model


def read(folder: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress((folder / f"{split}.jsonl.gz").read_bytes()).splitlines()]


def chunks(tokenizer: Any, text: str, size: int) -> Dataset:
    ids = tokenizer(text)["input_ids"]
    return Dataset.from_dict({"input_ids": [ids[i : i + size] for i in range(0, len(ids), size)]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    for name, folder in {"data": None, "text": None, "output": Path("runs/bitnet_distillation")}.items():
        parser.add_argument(f"--{name}", type=Path, default=folder, required=name == "data")
    for name, value in {**COUNTS, **RATES}.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    options = parser.parse_args()
    tokenizer, rows = AutoTokenizer.from_pretrained(options.model), read(options.data, "train")[: options.rows]
    validation = read(options.data, "validation")[: options.eval_rows]
    task = Dataset.from_list([encode(tokenizer, row, row["label"]) for row in rows])
    text = options.text.read_text("utf-8") if options.text else "\n".join(row["sentence"] for row in rows)
    settings = {"seed": options.seed, "max_steps": options.steps, "per_device_train_batch_size": options.batch_size}

    def stage(name: str, model: Any, data: Dataset, *, rate: float = options.learning_rate, **loss: Any) -> Any:
        own = {**SETTINGS, **settings, "output_dir": str(options.output / name), "learning_rate": rate}
        return train(model, tokenizer, data, own, **loss)

    teacher = stage("teacher", load(options.model), task, rate=options.teacher_learning_rate)
    sft = stage("sft", student(options.model, subln="none"), task, loss_type="ce")
    model = stage("stage-2", student(options.model, tokenizer, text), chunks(tokenizer, text, CHUNK), loss_type="ce")
    loss = {**DISTILL, "logits_weight": options.logits_weight, "attention_weight": options.attention_weight}
    model = stage("stage-3", model, task, teacher=teacher, attention_split_heads=options.split_heads, **loss)
    models = {"teacher": teacher, "bitnet_sft": sft.pack_and_unload(), "bitdistill": model.pack_and_unload()}
    models["bitdistill"].save_pretrained(options.output / "packed")
    result = {name: accuracy(each, tokenizer, validation) for name, each in models.items()}
    (options.output / "result.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
