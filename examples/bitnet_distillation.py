"""BitNet Distillation (arXiv 2510.13998) on SST-2: a task-tuned teacher, and 1.58-bit students with and without it.

Run: python examples/bitnet_distillation.py --model MODEL --data FOLDER --text FILE [--seeds 3] [--rows N] [--steps N]

FOLDER holds train.jsonl.gz and validation.jsonl.gz with `sentence` and `label` (0 negative, 1 positive); FILE is plain
text for stage 2. Each seed trains a teacher (cross-entropy), BitNet-SFT (the student, cross-entropy alone) and
BitDistill (stages 1 to 3). Differences from the paper stand in docs/methods/bitnet-distillation.md.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from bitdistiller_peft import BitDistillerConfig, DistillConfig, DistillTrainer, get_bitdistiller_model

COUNTS = {"seeds": 3, "rows": 4096, "eval-rows": 872, "steps": 300, "batch-size": 8, "split-heads": 32}
RATES = {"learning-rate": 1e-4, "teacher-learning-rate": 2e-5, "logits-weight": 10.0, "attention-weight": 1e5}
LABELS = (" negative", " positive")
BITNET = {"grid": "ternary", "group_size": "tensor", "gradient": "ste", "learn_scale": False}
BITNET |= {"activation_bits": 8, "packing": "base3"}
DISTILL = {"loss_type": "forward_kl", "ce_weight": 1.0, "temperature": 5.0, "rescale_temperature": False}
SETTINGS = {"lr_scheduler_type": "cosine", "warmup_steps": 0.05, "logging_steps": 10, "save_strategy": "no"}
SETTINGS |= {"gradient_checkpointing": False, "report_to": "none"}
CHUNK = 256  # tokens of plain text in a row of stage 2


def encode(tokenizer: Any, row: dict[str, Any], label: int) -> dict[str, list[int]]:
    prompt = tokenizer(f"Review: {row['sentence'].strip()}\nSentiment:")["input_ids"]
    answer = tokenizer(LABELS[label], add_special_tokens=False)["input_ids"]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> float:
    def cost(example: dict[str, list[int]]) -> float:
        tensors = {key: torch.tensor([ids], device=model.device) for key, ids in example.items()}
        return float(model(**tensors).loss) * sum(label != -100 for label in example["labels"])

    model.eval()  # the label is the likelier continuation
    costs = [[cost(encode(tokenizer, row, label)) for label in range(len(LABELS))] for row in rows]
    return mean(pair.index(min(pair)) == row["label"] for pair, row in zip(costs, rows, strict=True))


def train(model: Any, tokenizer: Any, data: Dataset, options: argparse.Namespace, seed: int, **loss: Any) -> Any:
    """One stage; without `loss` an ordinary fine-tuning with cross-entropy."""
    settings = {**SETTINGS, "max_steps": options.steps, "per_device_train_batch_size": options.batch_size, "seed": seed}
    settings["output_dir"] = str(options.output / "run")
    common = {"train_dataset": data, "processing_class": tokenizer}
    if loss:
        common["teacher"] = loss.pop("teacher", None)
        args = DistillConfig(learning_rate=options.learning_rate, **settings, **loss)
        trainer: Any = DistillTrainer(model, args, **common)
    else:
        settings["use_cpu"] = not torch.accelerator.is_available()
        trainer = SFTTrainer(model, SFTConfig(learning_rate=options.teacher_learning_rate, **settings), **common)
    trainer.train()
    return trainer.model


def student(options: argparse.Namespace) -> Any:
    """Stage 1: SubLN, ternary weights, int8 activations."""
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    return get_bitdistiller_model(base, BitDistillerConfig(**BITNET, subln=options.subln))


def run(seed: int, tokenizer: Any, data: dict[str, Any], options: argparse.Namespace) -> dict[str, float]:
    torch.manual_seed(seed)
    rows = random.Random(seed).sample(data["train"], min(options.rows, len(data["train"])))
    task = Dataset.from_list([encode(tokenizer, row, row["label"]) for row in rows])

    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    teacher = train(base, tokenizer, task, options, seed)
    result = {"teacher": accuracy(teacher, tokenizer, data["validation"])}
    sft = train(student(options), tokenizer, task, options, seed, loss_type="ce")
    result["bitnet_sft"] = accuracy(sft.pack_and_unload(), tokenizer, data["validation"])
    model = train(student(options), tokenizer, data["text"], options, seed, loss_type="ce")  # stage 2
    weights = {"logits_weight": options.logits_weight, "attention_weight": options.attention_weight}
    weights |= {"attention_split_heads": options.split_heads, "teacher": teacher}
    packed = train(model, tokenizer, task, options, seed, **DISTILL, **weights).pack_and_unload()  # stage 3
    packed.save_pretrained(options.output / f"packed-{seed}")
    return result | {"bitdistill": accuracy(packed, tokenizer, data["validation"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hub name or folder")
    parser.add_argument("--data", type=Path, required=True, help="folder with SST-2")
    parser.add_argument("--text", type=Path, required=True, help="plain text for stage 2")
    parser.add_argument("--output", type=Path, default=Path("runs/bitnet_distillation"))
    for name, value in {**COUNTS, **RATES, "subln": "output"}.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    data: dict[str, Any] = {}
    for split in ("train", "validation"):
        lines = gzip.decompress((options.data / f"{split}.jsonl.gz").read_bytes()).splitlines()
        data[split] = [json.loads(line) for line in lines]
    data["validation"] = data["validation"][: options.eval_rows]
    ids = tokenizer(options.text.read_text("utf-8")[: 20 * CHUNK * options.steps * options.batch_size])["input_ids"]
    data["text"] = Dataset.from_dict({"input_ids": [ids[i : i + CHUNK] for i in range(0, len(ids), CHUNK)]})
    runs = [run(seed, tokenizer, data, options) for seed in range(options.seeds)]
    means = {name: mean(entry[name] for entry in runs) for name in runs[0]}
    report = {"options": {key: str(value) for key, value in vars(options).items()}, "runs": runs, "mean": means}
    (options.output / "result.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(means, indent=1))


if __name__ == "__main__":
    main()
