"""Take a model to 2 bits: let the teacher write, calibrate, distil, pack, measure.

Run: python examples/distill_2bit.py --model MODEL [--text FILE] [--output FOLDER] [--steps N]

MODEL is a Hub name or a folder. With --text, the student learns on that file's paragraphs; without it, on what the
teacher makes of the openings below, which is how BitDistiller does it. Texts that are measured are not learned on.
SmolLM2-135M-Instruct takes 9 minutes of one core (AMD EPYC with AVX-512 BF16; an older one several times that) and goes
from perplexity 2.81 to 7.10 on the teacher's texts; these few steps and texts show the way, not how far it goes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitdistiller_peft import BitDistillerConfig, get_bitdistiller_model, print_quant_summary
from bitdistiller_peft.calibration import calibrate
from bitdistiller_peft.evaluation import evaluate_perplexity
from bitdistiller_peft.hub import loading_dtype, restore_dtype, stored_dtype
from bitdistiller_peft.training import DistillConfig, DistillTrainer
from bitdistiller_peft.training.data import generate_teacher_data

BITS = 2
GROUP_SIZE = 64
STEPS = 60
LEARNING_RATE = 1e-4
SCALE_LEARNING_RATE = 1e-3
MAX_LENGTH = 512  # tokens of a text that are learned on
BATCH_SIZE = 2  # texts at once
ACCUMULATION = 2  # times as many per step
NEW_TOKENS = 256  # that the teacher adds to an opening
EVALUATION_SHARE = 8  # every eighth text is measured
PROTOCOL = {"seq_len": 128, "max_chunks": 32}

OPENINGS = [
    "A lighthouse works by",
    "Once upon a time, a student asked her teacher",
    "The difference between weather and climate is",
    "The water of the sea rises into the air, and then",
    "There are three good reasons to learn a language. First,",
    "A bicycle stays upright because",
    "The old fisherman had not caught anything for weeks, until",
    "The sky is blue because",
    "To bake a simple bread, you need",
    "The capital of France is a city that",
    "Computers store numbers as",
    "When the train arrived, nobody was on the platform except",
    "A prime number is a number that",
]


def read_paragraphs(path: Path) -> list[str]:
    """The paragraphs of a text file that say something."""
    blocks = path.read_text(encoding="utf-8").split("\n\n")
    return [block.strip() for block in blocks if len(block.split()) > 20]


def teacher_texts(model: Any, tokenizer: Any, output: Path) -> list[str]:
    """What the full-precision model makes of the openings."""
    rows = generate_teacher_data(
        model, tokenizer, OPENINGS, output_dir=output / "teacher", max_new_tokens=NEW_TOKENS, batch_size=4
    )
    return [row["prompt"] + row["completion"] for row in rows]


def distil(model: Any, tokenizer: Any, texts: list[str], output: Path, steps: int) -> Any:
    """Train the student and return it."""
    args = DistillConfig(
        output_dir=str(output / "run"),
        max_steps=steps,
        learning_rate=LEARNING_RATE,
        scale_learning_rate=SCALE_LEARNING_RATE,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=BATCH_SIZE,
        gradient_accumulation_steps=ACCUMULATION,
        logging_steps=max(1, steps // 12),
        save_strategy="no",
        gradient_checkpointing=False,
        report_to="none",
    )
    # token ids, not texts: SFT would end every text with an end-of-sequence token, also one that was cut off
    data = Dataset.from_dict(dict(tokenizer(texts, truncation=True, max_length=MAX_LENGTH)))
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
    stored = stored_dtype(options.model)
    teacher = AutoModelForCausalLM.from_pretrained(options.model, dtype=loading_dtype(stored, "cpu"))
    texts = read_paragraphs(options.text) if options.text else teacher_texts(teacher, tokenizer, options.output)
    measured = "\n\n".join(texts[::EVALUATION_SHARE])
    learned = [text for i, text in enumerate(texts) if i % EVALUATION_SHARE]
    before = evaluate_perplexity(teacher, tokenizer, measured, **PROTOCOL)

    model = get_bitdistiller_model(teacher, BitDistillerConfig(bits=BITS, group_size=GROUP_SIZE))
    print_quant_summary(model)
    calibrate(model, tokenizer, learned, method="clip", seq_len=PROTOCOL["seq_len"])
    packed = distil(model, tokenizer, learned, options.output, options.steps).pack_and_unload()
    print(f"full precision: {before}\n{BITS} bits: {evaluate_perplexity(packed, tokenizer, measured, **PROTOCOL)}")
    restore_dtype(packed, stored)
    packed.save_pretrained(options.output / "packed")
    tokenizer.save_pretrained(options.output / "packed")


if __name__ == "__main__":
    main()
