"""BitDistiller (arXiv 2402.10631) end to end: clip, let the teacher write, distil with CAKLD, pack, measure.

    python examples/bitdistiller.py                        # SmolLM2-135M, INT2, groups of 64
    python examples/bitdistiller.py --bits 3               # NF3 with a scale for each sign
    python examples/bitdistiller.py --arithmetic released  # gamma, mask, reduction, rounding of the released code

SmolLM2 is fetched once (MODEL=... or --model takes another); the text is Python's own help topics (--text takes a file
or "hub" for WikiText-2, which the paper uses). The defaults are a small budget that shows the way, not the end. As
published, it would be 8,000 prompts, 1,024 new tokens, four epochs and a learning rate of 8e-6, which moves almost no
code in the few steps made here. With the defaults, in three minutes on two cores: perplexity 15.2 in full precision,
658 after the clip search, 84 distilled and packed; gamma 0.453.

docs/methods/bitdistiller.md has the equations and what differs. Everything lands in runs/bitdistiller.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from demo_text import load_text
from smollm2 import demo_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from bitdistiller_peft import (
    BitDistillerConfig,
    DistillConfig,
    DistillTrainer,
    calibrate,
    evaluate_perplexity,
    generate_teacher_data,
    get_bitdistiller_model,
    get_recipe,
)

PROMPT_CHARACTERS, PASSAGE_CHARACTERS = 128, 512  # as published: the beginnings of longer passages
SEQ_LEN = 256
COUNTS = {"bits": 2, "group-size": 64, "clip-samples": 16, "prompts": 48, "new-tokens": 96, "steps": 24, "chunks": 20}


def prompts_of(documents: list[str], count: int) -> list[str]:
    """The beginnings of long passages, evenly spread over the documents."""
    passages = [part.strip() for text in documents for part in text.split("\n\n")]
    joined = [part[:PROMPT_CHARACTERS] for part in passages if len(part) > PASSAGE_CHARACTERS]
    return joined[:: max(1, len(joined) // count)][:count]


def encode(tokenizer: Any, row: dict[str, Any], *, with_prompt: bool) -> dict[str, list[int]]:
    """Tokens of prompt and answer, with labels; an answer that was cut off gets no end-of-sequence token."""
    ids = tokenizer(row["prompt"] + row["completion"])["input_ids"]
    ids += [tokenizer.eos_token_id] if row["finish_reason"] == "eos" else []
    start = 0 if with_prompt else len(tokenizer(row["prompt"])["input_ids"])
    return {"input_ids": ids, "labels": [-100] * start + ids[start:]}


def main() -> None:
    """Go from full precision to a packed model on disk, and print what became of the perplexity."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub name or folder; $MODEL, or SmolLM2-135M-Instruct")
    parser.add_argument("--text", help="a text file, or 'hub' for WikiText-2")
    parser.add_argument("--output", type=Path, default=Path("runs/bitdistiller"), help="folder to write to")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="published: 8e-6")
    parser.add_argument("--arithmetic", default="default", help="'default' or 'released'")
    for name, count in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, default=count)
    options = parser.parse_args()
    set_seed(0)
    path, text = demo_model(options.model), load_text(options.text)
    tokenizer = AutoTokenizer.from_pretrained(path)
    base = AutoModelForCausalLM.from_pretrained(path)

    overrides: dict[str, Any] = {"bits": options.bits, "group_size": options.group_size}
    overrides |= {"learning_rate": options.learning_rate, "arithmetic": options.arithmetic}
    if base.config.tie_word_embeddings:  # one matrix cannot be trained as two copies
        overrides["train_other"] = "norms"
    recipe = get_recipe("bitdistiller", **overrides)
    scores = {}

    def score(name: str, model: Any) -> None:
        result = evaluate_perplexity(model, tokenizer, text.evaluation, seq_len=SEQ_LEN, max_chunks=options.chunks)
        scores[name] = result.perplexity
        print(f"{name}: {result}", flush=True)

    score("full_precision", base)
    student = get_bitdistiller_model(base, BitDistillerConfig(**recipe.model))
    clip = {**recipe.calibration[0], "num_samples": options.clip_samples, "seq_len": SEQ_LEN}
    print(calibrate(student, tokenizer, text.calibration, **clip))
    score("clip", student)

    sampling = {**recipe.data, "max_new_tokens": options.new_tokens, "output_dir": options.output / "teacher"}
    rows = generate_teacher_data(student, tokenizer, prompts_of(text.calibration, options.prompts), **sampling)
    data = Dataset.from_list([encode(tokenizer, row, with_prompt=options.arithmetic == "released") for row in rows])
    budget = {"max_steps": options.steps, "per_device_train_batch_size": 4, "max_length": SEQ_LEN, "logging_steps": 1}
    budget |= {"save_strategy": "no", "report_to": "none", "gradient_checkpointing": False}
    args = DistillConfig(**{**recipe.training_for("distill"), **budget}, output_dir=str(options.output / "run"))
    trainer = DistillTrainer(student, args, train_dataset=data, processing_class=tokenizer)
    trainer.train()

    packed = student.pack_and_unload()
    packed.save_pretrained(options.output / "packed")
    tokenizer.save_pretrained(options.output / "packed")
    score("bitdistiller", AutoModelForCausalLM.from_pretrained(options.output / "packed"))
    summary = {"gamma": trainer.gamma, "perplexity": scores, "bits": recipe.model["bits"], "grid": recipe.model["grid"]}
    (options.output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
