"""AFPQ on a real model: a scale for each sign, calibrated, packed, reloaded, scored. Nothing is trained.

    python examples/afpq.py                                   # NF3, clip search: about three minutes of one CPU core
    python examples/afpq.py --recipe afpq-fp4 --method gptq   # FP4, error compensation

SmolLM2-135M-Instruct is fetched once (MODEL=... or --model takes another); the text is Python's own help topics
(--text takes a file such as WikiText-2's test split, or "hub"). Integers, the grid with one scale and the grid with
two, each rounded to nearest, stand beside the calibrated model; in the paper two scales beat one, and integers.
Everything lands in runs/afpq: a folder for each packed model, and summary.json.

With --chunks 4 --samples 4 (85 seconds of CPU time): perplexity 14.22 in full precision; rounded to nearest, 41.06 for
INT3, 40.90 for NF3 with one scale and 32.73 with two; 20.24 after the clip search.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean

from demo_measure import measured, say
from demo_text import load_text
from smollm2 import demo_model
from workbench import SEQ_LEN, Workbench

from bitdistiller_peft import BitDistillerConfig, calibrate, get_bitdistiller_model, get_recipe

RECIPES = ("afpq-nf3", "afpq-nf4", "afpq-fp3", "afpq-fp4")
METHODS = ("clip", "gptq", "awq")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub name or folder; default: $MODEL, or SmolLM2-135M-Instruct")
    parser.add_argument("--text", help='a text file, or "hub" for WikiText-2; default: Python\'s help topics')
    parser.add_argument("--recipe", choices=RECIPES, default="afpq-nf3", help="grid and bits")
    parser.add_argument("--method", choices=METHODS, default="clip", help="how to calibrate")
    parser.add_argument("--group-size", type=int, default=64, help="weights that share two scales; -1 for a row")
    parser.add_argument("--samples", type=int, default=8, help=f"windows of {SEQ_LEN} tokens to calibrate on")
    parser.add_argument("--chunks", type=int, default=8, help=f"chunks of {SEQ_LEN} tokens to score")
    parser.add_argument("--output", type=Path, default=Path("runs/afpq"), help="folder for everything")
    return parser.parse_args()


def calibrated(bench: Workbench, name: str, args: argparse.Namespace) -> None:
    """The recipe: a student, calibrated, packed, saved; what is scored comes from disk."""
    # AWQ folds its scales into norms, which must be the student's own
    own = "norms" if args.method == "awq" else "none"
    config = BitDistillerConfig.from_recipe(args.recipe, group_size=args.group_size, train_other=own)
    with measured(name, bench.rows) as row:
        student = get_bitdistiller_model(bench.load(), config)
        for call in get_recipe(args.recipe).calibration:
            settings = {**call, "method": args.method, "num_samples": args.samples, "seq_len": SEQ_LEN}
            result = calibrate(student, bench.tokenizer, bench.text.calibration, **settings)
        before, after = (
            mean(getattr(report, key) for report in result.layers) for key in ("error_before", "error_after")
        )
        say(f"relative error of the layers' outputs, on average: {before:.4f} before, {after:.4f} after")
        bench.reloaded(row, student.pack_and_unload())


def main() -> None:
    """Score the grids rounded to nearest, then the calibrated one."""
    args = parse()
    bench = Workbench(demo_model(args.model), load_text(args.text), args.output, chunks=args.chunks)
    model = get_recipe(args.recipe, group_size=args.group_size).model
    grid, bits = model["grid"], model["bits"]
    bench.full_precision()
    for name in ("int", f"{grid}_sym", grid):
        bench.rounded(f"{name}{bits}", bits=bits, grid=name, group_size=args.group_size)
    final = f"{grid}{bits}_{args.method}"
    calibrated(bench, final, args)
    bench.finish(final)
    two = bench.perplexity(f"{grid}{bits}")
    for other, what in ((f"{grid}_sym{bits}", "one scale"), (f"int{bits}", "integers")):
        verb = "beat" if two < bench.perplexity(other) else "do NOT beat"
        say(f"rounded to nearest, two scales {verb} {what}: {two:,.2f} and {bench.perplexity(other):,.2f}")


if __name__ == "__main__":
    main()
