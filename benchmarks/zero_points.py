"""Where the zero points of a group had better lie: output errors of sets of zero points, on a real model's weights.

    python -m benchmarks.zero_points --model PATH --text FILE [FILE ...]

For every group of 64 weights of some layers, each zero point of a set is tried with 22 scales, and the pair with the
least error of the layer's output on the text is taken, as a clip search does. A set of `2**bits` zero points costs a
group `bits` bits, as integers do; of larger sets, `bits_more` says what a weight pays beyond that. Nothing is trained.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import _results
from benchmarks._arms import read_texts, windows_of
from benchmarks._results import figure, table

GROUP, SCALES = 64, tuple(1.1 - 0.045 * i for i in range(22))
PROJECTIONS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
NEAR_ZERO = 0.25  # a side with fewer steps than this does not set the scale


def sets_of(bits: int) -> dict[str, list[float]]:
    """Sets of zero points by name; all but the last take as many bits as integers."""
    top = 2**bits - 1
    found = {"integers": [float(code) for code in range(top + 1)], "the middle alone": [top / 2]}
    for name, step in (("quarters", 1 / 4), ("3/8", 3 / 8), ("halves", 1 / 2)):
        found[name] = [top / 2 * (1 - step) + step * code for code in range(top + 1)]
    return {**found, "every quarter": [code / 4 for code in range(4 * top + 1)]}


def errors_of(weight: Tensor, gram: Tensor, bits: int, zeros: list[float]) -> Tensor:
    """The least error of each group ``[groups, out]`` over zero points and scales.

    Args:
        weight: ``[groups, out, group]``.
        gram: ``[groups, group, group]``.
        bits: of a code.
        zeros: the zero points, in steps.
    """
    top = 2**bits - 1
    high, low = weight.amax(-1, keepdim=True).clamp(min=0), weight.amin(-1, keepdim=True).clamp(max=0)
    least = torch.full(weight.shape[:-1], math.inf)
    for zero in zeros:
        widest = torch.maximum(high / max(top - zero, NEAR_ZERO), -low / max(zero, NEAR_ZERO))
        for factor in SCALES:
            scale = (widest * factor).half().float().clamp(min=2.0**-14)
            moved = ((weight / scale + zero).round().clamp(0, top) - zero) * scale - weight
            least = torch.minimum(least, ((moved @ gram) * moved).sum(-1))
    return least


def grams(model: nn.Module, names: list[str], ids: Tensor) -> dict[str, Tensor]:
    """Gram matrices of the inputs of some layers, group by group."""
    found: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].float().reshape(-1, inputs[0].shape[-1] // GROUP, GROUP).transpose(0, 1)
            found[name] = found.get(name, 0) + x.transpose(1, 2) @ x

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(note(name)) for name in names]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return found


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each width and set."""
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = windows_of([read_texts(path) for path in options.text], tokenizer, options.tokens).reshape(-1, 512)
    last = model.config.num_hidden_layers - 1
    names = [f"model.layers.{layer}.{name}" for layer in sorted({1, last // 3, last - 1}) for name in PROJECTIONS]
    inputs = grams(model, names, ids)
    layers = {}
    for name in names:
        weight = model.get_submodule(name).weight.detach()
        layers[name] = weight.view(len(weight), -1, GROUP).transpose(0, 1)
    for bits in options.bits:
        for label, zeros in sets_of(bits).items():
            relative = []
            for name, weight in layers.items():
                energy = ((weight @ inputs[name]) * weight).sum()
                relative.append(float(errors_of(weight, inputs[name], bits, zeros).sum() / energy))
            yield {
                "bits": bits,
                "zero points": label,
                "number": len(zeros),
                "bits_more": max(0.0, math.log2(len(zeros)) - bits) / GROUP,
                "relative_error": math.exp(sum(map(math.log, relative)) / len(relative)),
            }


def figures(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Every set's error beside that of integers."""
    integers = {row["bits"]: row["relative_error"] for row in found if row["zero points"] == "integers"}
    return {
        f"{row['bits']}bit_{row['zero points'].replace(' ', '_')}": figure(
            row["relative_error"] / integers[row["bits"]], "of the output error on integers"
        )
        for row in found
        if row["zero points"] != "integers"
    }


def main() -> None:
    """Measure all sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub name of a Llama-like model")
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    found = []
    for row in rows(parser.parse_args()):
        found.append(row)
        print(table([row]), flush=True)
        _results.write_results("zero_points", found, figures(found) if found else {})


if __name__ == "__main__":
    main()
