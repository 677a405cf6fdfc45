"""Packed layers on a GPU: Triton kernels beside torch's bf16 product and the copy bandwidth, in one run.

Weights are read from copies that together exceed the caches. The kinds take turns; medians of times between GPU events
count. "Copying" is the time to read and write half as many bytes as the packed weight has, so that as many bytes move.

    python -m benchmarks.inference_gpu                  # 1, 16, 64 and 512 tokens, 4096 x 4096 to 28672 x 8192
    python -m benchmarks.inference_gpu --model PACKED --base FULL-PRECISION   # and greedy tokens per second
    TRITON_INTERPRET=1 python -m benchmarks.inference_gpu --shapes 64x64 --rounds 2 --device cpu --name dry
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from benchmarks._results import figure, table, write_results
from bitdistiller_peft import use_backend
from bitdistiller_peft.kernels import packed_linear
from bitdistiller_peft.layers import PackedLinear
from bitdistiller_peft.layers.companions import packed_params
from bitdistiller_peft.quantizers import QuantSpec

SHAPES = ("4096x4096", "14336x4096", "8192x8192", "28672x8192")
KINDS = (("int", 2), ("int", 3), ("int", 4), ("nf", 3), ("ternary", 2))
GROUP_SIZE, MOST_COPIES = 64, 32
COLD_BYTES = 512 << 20  # more than the last-level cache holds
ASKED_SPEEDUP, ASKED_BANDWIDTH, ASKED_MANY = 3.0, 0.6, 0.8  # at 2 bits


class Timer:
    """Milliseconds of calls on a device."""

    def __init__(self, device: str) -> None:
        self.is_gpu = device == "cuda"

    def __call__(self, call: Callable[[], object]) -> float:
        """One call."""
        if not self.is_gpu:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end))


def random_layers(grid: str, bits: int, rows: int, cols: int, options: argparse.Namespace) -> list[PackedLinear]:
    """Copies of a weight of random codes: how fast it multiplies does not depend on them."""
    spec = QuantSpec.create(grid, bits, group_size=GROUP_SIZE)
    first = PackedLinear(cols, rows, spec=spec)
    size = sum(tensor.nbytes for tensor in first.parameters())
    layers = [first, *(PackedLinear(cols, rows, spec=spec) for _ in range(min(MOST_COPIES, COLD_BYTES // size) - 1))]
    generator = torch.Generator().manual_seed(0)
    for layer in layers if options.device == "cuda" else layers[:2]:
        for tensor in layer.parameters():
            if tensor.dtype == torch.int32:  # ternary codes are 0, 1 and 2: no two bits set together
                tensor.data.random_(-(2**31), 2**31 - 1, generator=generator)
                tensor.data &= 0x55555555 if grid == "ternary" else -1
            else:
                tensor.data.uniform_(0.01, 0.02, generator=generator)
        layer.to(options.device)
    return layers if options.device == "cuda" else layers[:2]


def products(rows: int, cols: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All kinds of weights of one shape, for every number of tokens."""
    timer = Timer(options.device)
    copies = min(MOST_COPIES, 2 + COLD_BYTES // (rows * cols * 2)) if options.device == "cuda" else 2
    dense = [torch.randn(rows, cols, device=options.device).bfloat16() for _ in range(copies)]
    packed = {kind: random_layers(*kind, rows, cols, options) for kind in KINDS}
    lines = []
    for tokens in options.tokens:
        inputs = torch.randn(tokens, cols, device=options.device).bfloat16()
        times: dict[Any, list[float]] = defaultdict(list)
        for turn in range(options.rounds + 3):
            times["torch"].append(timer(lambda w=dense[turn % copies], x=inputs: F.linear(x, w)))  # type: ignore[misc]
            for kind, layers in packed.items():
                layer = layers[turn % len(layers)]
                call = _product(inputs, layer)
                times[kind].append(timer(call))
                half, other = torch.empty(2, _bytes(layer) // 2, dtype=torch.uint8, device=options.device)
                times[kind, "copy"].append(timer(lambda x=half, y=other: y.copy_(x)))  # type: ignore[misc]
        middle = {key: statistics.median(values[3:]) for key, values in times.items()}
        for kind, layers in packed.items():
            lines.append(
                {
                    "shape": f"{rows}x{cols}",
                    "weight": f"{kind[0]}{kind[1]}",
                    "tokens": tokens,
                    "MB read": _bytes(layers[0]) / 1e6,
                    "ms": middle[kind],
                    "share of copy bandwidth": middle[kind, "copy"] / middle[kind],
                    "x faster than bf16": middle["torch"] / middle[kind],
                }
            )
    return lines


def _product(inputs: Tensor, layer: PackedLinear) -> Callable[[], Tensor]:
    params, spec = packed_params(layer, "weight"), layer.spec
    return lambda: packed_linear(inputs, layer.weight, params, spec)


def _bytes(layer: PackedLinear) -> int:
    return sum(tensor.nbytes for tensor in layer.parameters())


def tokens_per_second(name: str, options: argparse.Namespace) -> float:
    """Greedy tokens per second with a static cache, the second of two runs."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).to(options.device).eval()
    prompt = torch.arange(16, device=options.device)[None]
    count, seconds = options.new_tokens, 0.0
    for _ in range(2):
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False, cache_implementation="static"
            ).cpu()
        seconds = time.perf_counter() - start
    return count / seconds


def summarise(rows: list[dict[str, Any]], models: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The figures, with what was asked at 2 bits."""
    figures = {}
    for row in rows:
        key, asked = f"{row['weight']}_{row['shape']}_{row['tokens']}", row["weight"] == "int2"
        if row["tokens"] == 1:
            speedup, share = row["x faster than bf16"], row["share of copy bandwidth"]
            figures[f"{key}_speedup"] = figure(speedup, "x bf16", at_least=ASKED_SPEEDUP if asked else None)
            figures[f"{key}_bandwidth"] = figure(share, "of copying", at_least=ASKED_BANDWIDTH if asked else None)
        elif row["tokens"] == 512:
            figures[f"{key}_speedup"] = figure(
                row["x faster than bf16"], "x bf16", at_least=ASKED_MANY if asked else None
            )
    if models:
        figures["tokens_per_second_ratio"] = figure(models[1]["tokens/s"] / models[0]["tokens/s"], "x bf16")
    return figures


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), help="ROWSxCOLUMNS")
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 16, 64, 512])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--model", help="a packed model's folder, for tokens per second")
    parser.add_argument("--base", help="the same model in full precision")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: in Triton's interpreter, dry")
    parser.add_argument("--name", default="inference_gpu", help="of the results file")
    options = parser.parse_args()
    if (options.model is None) != (options.base is None):
        parser.error("--model and --base go together")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU: --device cpu runs all of it dry, under TRITON_INTERPRET=1")
    with use_backend("triton"), torch.inference_mode():
        shapes = [tuple(int(n) for n in shape.split("x")) for shape in options.shapes]
        rows = [row for shape in shapes for row in products(*shape, options)]
        print(table(rows))
        names = (("bf16", options.base), ("packed", options.model)) if options.model else ()
        models = [{"model": kind, "tokens/s": tokens_per_second(name, options)} for kind, name in names]
        print(table(models))
    figures = summarise(rows, models)
    path = write_results(options.name, [*rows, *models], figures, device=options.device)
    print(f"results: {path.name}")


if __name__ == "__main__":
    main()
