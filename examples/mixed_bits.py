"""Widths under an exact budget, then trained: allocate, reconstruct block by block, distil, pack, and compare the size.

Run: python examples/mixed_bits.py MODEL [--bits-per-weight B] [--text FILE] [--output FOLDER] [--samples N] [--steps N]

The budget counts everything in the file: codes, scales, zero points, norms, embeddings, head and header. Layers that
serving engines run as one keep one width. The numbers of the defaults show the way, not how far it goes:
SmolLM2-135M-Instruct at 4.0 bits per weight takes 20 minutes of one core (AMD EPYC, the other one at work too): 57
layers at 3 bits, 153 and the embeddings at 4, 67,252,960 bytes predicted and written, perplexity 28.0 to 34.0.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitdistiller_peft import (
    BitDistillerConfig,
    DistillConfig,
    DistillTrainer,
    allocate_bits,
    calibrate,
    evaluate_perplexity,
    get_bitdistiller_model,
)

HELD_OUT = 8  # every eighth text is measured, and not learned on
PROTOCOL = {"seq_len": 128, "max_chunks": 16}
BLOCKWISE = {"method": "blockwise", "seq_len": 128, "batch_size": 2, "epochs": 1, "learning_rate": 1.5e-2}


def read_texts(path: Path | None) -> list[str]:
    """Paragraphs of a text file, or of the help topics that every Python carries."""
    whole = path.read_text(encoding="utf-8") if path else "\n\n".join(pydoc_data.topics.topics.values())
    return [block.strip() for block in whole.split("\n\n") if len(block.split()) > 20]


def distil(student: Any, tokenizer: Any, texts: list[str], output: Path, steps: int) -> Any:
    """Train the student against the full-precision model inside it."""
    args = DistillConfig(
        output_dir=str(output / "run"),
        max_steps=steps,
        learning_rate=5e-4,
        per_device_train_batch_size=2,
        save_strategy="no",
        gradient_checkpointing=False,
        report_to="none",
    )
    data = Dataset.from_dict(dict(tokenizer(texts, truncation=True, max_length=256)))
    trainer = DistillTrainer(student, args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    return trainer.model


def main() -> None:
    """Go from a full-precision model to a packed one of a given size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub name of the full-precision model")
    parser.add_argument("--bits-per-weight", type=float, default=4.0, help="budget, embeddings and head included")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--text", type=Path, help="text file to learn on")
    parser.add_argument("--output", type=Path, default=Path("runs/mixed_bits"), help="folder to write to")
    parser.add_argument("--samples", type=int, default=120, help="windows of the block-wise stage")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of the end-to-end stage")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    texts = read_texts(options.text)
    learned = [text for number, text in enumerate(texts) if number % HELD_OUT]

    config = BitDistillerConfig(group_size=options.group_size, learn_zero_point=True)
    budget = {"bits_per_weight": options.bits_per_weight, "choices": (2, 3, 4), "table_choices": (4, 8)}
    widths = allocate_bits(model, tokenizer, learned, config, seq_len=128, **budget)
    print(widths)

    student = get_bitdistiller_model(model, widths.apply(config))
    calibrate(student, tokenizer, learned, num_samples=options.samples, **BLOCKWISE)
    packed = distil(student, tokenizer, learned, options.output, options.steps).pack_and_unload()
    packed.save_pretrained(options.output / "packed")
    tokenizer.save_pretrained(options.output / "packed")
    written = (options.output / "packed" / "model.safetensors").stat().st_size
    score = evaluate_perplexity(packed, tokenizer, "\n\n".join(texts[::HELD_OUT]), **PROTOCOL)
    print(f"predicted {widths.num_bytes:,} bytes, written {written:,}\n{score}")


if __name__ == "__main__":
    main()
