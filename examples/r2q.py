"""R2Q on a real model: two residual signs, trained on what the teacher writes, packed, reloaded, scored.

    python examples/r2q.py                                    # about three minutes of one CPU core
    python examples/r2q.py --refine alternating --steps 200   # better scales to begin with, and more training

SmolLM2-135M-Instruct is fetched once (MODEL=... or --model takes another); the text to score on is Python's own help
topics (--text takes a file such as WikiText-2's test split, or "hub"). Rounded to nearest, 2-bit integers and R2Q stand
beside the trained model. A dozen steps show the way, not how far it goes. Everything lands in runs/r2q: a folder for
each packed model, the teacher's texts, and summary.json.

With --chunks 4 --prompts 8 --new-tokens 64 --steps 8 (67 seconds of CPU time): perplexity 14.22 in full precision;
rounded to nearest, 305,061 for integers and 3,699,857 for R2Q; 279,384 after the eight steps. At 2 bits a model needs
some hundred steps, or a calibration, before it makes sense.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from demo_measure import measured, say
from demo_prompts import demo_prompts
from demo_text import load_text
from smollm2 import demo_model
from transformers import set_seed
from workbench import Workbench

from bitdistiller_peft import (
    BitDistillerConfig,
    DistillConfig,
    DistillTrainer,
    generate_teacher_data,
    get_bitdistiller_model,
    get_recipe,
)

REFINEMENTS = ("none", "least_squares", "alternating")
# the recipe's rate of 2e-5 is for thousands of steps
RATES = {"learning_rate": 1e-4, "scale_learning_rate": 1e-4}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub name or folder; default: $MODEL, or SmolLM2-135M-Instruct")
    parser.add_argument("--text", help='a text file, or "hub" for WikiText-2; default: Python\'s help topics')
    parser.add_argument("--group-size", type=int, default=64, help="weights that share two scales; -1 for a row")
    parser.add_argument("--refine", choices=REFINEMENTS, default="none", help="how the closed-form scales are refined")
    parser.add_argument("--prompts", type=int, default=16, help="prompts that the teacher answers")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens of an answer, at most")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps, of two answers each")
    parser.add_argument("--chunks", type=int, default=8, help="chunks of 512 tokens to score")
    parser.add_argument("--output", type=Path, default=Path("runs/r2q"), help="folder for everything")
    return parser.parse_args()


def trained(bench: Workbench, name: str, overrides: dict[str, Any], args: argparse.Namespace) -> None:
    """The recipe: the teacher writes, the student learns, what is scored comes from disk."""
    with measured(name, bench.rows) as row:
        student = get_bitdistiller_model(bench.load(), BitDistillerConfig.from_recipe("r2q", **overrides))
        prompts = [[{"role": "user", "content": prompt}] for prompt in demo_prompts()[: args.prompts]]
        sampling = {**get_recipe("r2q").data, "max_new_tokens": args.new_tokens, "batch_size": 16}
        folder = bench.output / f"teacher_data_{args.prompts}x{args.new_tokens}"
        data = generate_teacher_data(student, bench.tokenizer, prompts, output_dir=folder, **sampling)
        settings = DistillConfig.from_recipe(
            "r2q",
            output_dir=str(bench.output / "trainer"),
            max_steps=args.steps,
            per_device_train_batch_size=2,
            gradient_checkpointing=False,
            logging_steps=max(1, args.steps // 6),
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.accelerator.is_available(),
            **RATES,
            **overrides,
        )
        trainer = DistillTrainer(student, settings, train_dataset=data, processing_class=bench.tokenizer)
        trainer.train()
        bench.reloaded(row, trainer.model.pack_and_unload())


def main() -> None:
    """Score both 2-bit grids rounded to nearest, then the trained one."""
    args = parse()
    set_seed(0)
    bench = Workbench(demo_model(args.model), load_text(args.text), args.output, chunks=args.chunks)
    overrides = {"group_size": args.group_size, "refine": None if args.refine == "none" else args.refine}
    bench.full_precision()
    bench.rounded("int2", bits=2, group_size=args.group_size)
    bench.rounded("r2q", bits=2, grid="r2q", **overrides)
    trained(bench, "r2q_trained", overrides, args)
    bench.finish("r2q_trained")
    start, end = bench.perplexity("r2q"), bench.perplexity("r2q_trained")
    say(f"{args.steps} steps took R2Q from a perplexity of {start:,.1f} to {end:,.1f}")


if __name__ == "__main__":
    main()
