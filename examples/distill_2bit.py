"""Take a model to 2 bits: calibrate, let the teacher write, distil, pack, measure.

Run: python examples/distill_2bit.py --model MODEL [--text FILE] [--output FOLDER] [--steps N]

MODEL is a Hub name or a folder. With --text, the student learns on that file's paragraphs; without it, on what the
teacher says to the prompts below, which is how BitDistiller does it. Paragraphs that are measured are not trained on.
A model of 135 million parameters takes about half an hour on two CPU cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from bitdistiller_peft import BitDistillerConfig, get_bitdistiller_model, print_quant_summary
from bitdistiller_peft.calibration import calibrate
from bitdistiller_peft.evaluation import evaluate_perplexity
from bitdistiller_peft.training import DistillConfig, DistillTrainer
from bitdistiller_peft.training.data import generate_teacher_data

BITS = 2
GROUP_SIZE = 64
STEPS = 60
LEARNING_RATE = 1e-4
SCALE_LEARNING_RATE = 1e-3
MAX_LENGTH = 512
BATCH_SIZE = 2  # texts at once
ACCUMULATION = 2  # times as many per step
NEW_TOKENS = 256
EVALUATION_SHARE = 10  # every tenth paragraph is measured, not learned
EVALUATION_CHUNKS = 8

PROMPTS = [
    "Explain how a lighthouse works.",
    "Write a short story about a student and a teacher.",
    "What is the difference between weather and climate?",
    "Describe the water cycle to a child.",
    "List three reasons to learn a language.",
    "How does a bicycle stay upright?",
    "Summarize the plot of a fairy tale that you know.",
    "Why is the sky blue?",
]


def read_paragraphs(path: Path) -> list[str]:
    """Paragraphs of a text file, those that say something."""
    blocks = path.read_text(encoding="utf-8").split("\n\n")
    return [block.strip() for block in blocks if len(block.split()) > 20]


def teacher_texts(model: Any, tokenizer: PreTrainedTokenizerBase, output: Path) -> Dataset:
    """What the full-precision model answers to the prompts."""
    return generate_teacher_data(
        model, tokenizer, PROMPTS, output_dir=output / "data", max_new_tokens=NEW_TOKENS, batch_size=4
    )


def distil(model: Any, tokenizer: PreTrainedTokenizerBase, data: Dataset, output: Path, steps: int) -> Any:
    """Train the student in place and return it."""
    args = DistillConfig(
        output_dir=str(output / "run"),
        max_steps=steps,
        learning_rate=LEARNING_RATE,
        scale_learning_rate=SCALE_LEARNING_RATE,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=BATCH_SIZE,
        gradient_accumulation_steps=ACCUMULATION,
        max_length=MAX_LENGTH,
        logging_steps=max(1, steps // 12),
        save_strategy="no",
        gradient_checkpointing=False,
        report_to="none",
    )
    trainer = DistillTrainer(model, args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    return trainer.model


def main() -> None:
    """Go from full precision to a packed model on disk."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hub name or folder")
    parser.add_argument("--text", type=Path, help="text file to learn on, instead of the teacher's own words")
    parser.add_argument("--output", type=Path, default=Path("runs/distill_2bit"), help="folder to write to")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    teacher = AutoModelForCausalLM.from_pretrained(options.model)
    if options.text is None:
        data = teacher_texts(teacher, tokenizer, options.output)
        paragraphs = [str(row["completion"]) for row in data]
        learned, measured = paragraphs, paragraphs
    else:
        paragraphs = read_paragraphs(options.text)
        measured = paragraphs[::EVALUATION_SHARE]
        learned = [text for i, text in enumerate(paragraphs) if i % EVALUATION_SHARE]
        data = Dataset.from_dict({"text": learned})
    protocol = {"seq_len": MAX_LENGTH // 2, "max_chunks": EVALUATION_CHUNKS}
    print("full precision:", evaluate_perplexity(teacher, tokenizer, measured, **protocol))

    model = get_bitdistiller_model(teacher, BitDistillerConfig(bits=BITS, group_size=GROUP_SIZE))
    print_quant_summary(model)
    calibrate(model, tokenizer, learned, method="clip")
    packed = distil(model, tokenizer, data, options.output, options.steps).pack_and_unload()
    packed.save_pretrained(options.output / "packed")
    tokenizer.save_pretrained(options.output / "packed")
    print(f"{BITS} bits:", evaluate_perplexity(packed, tokenizer, measured, **protocol))


if __name__ == "__main__":
    main()
