"""The clip search against a straight transcription of the published one: same candidates, same tokens, same machine.

The transcription follows BitDistiller's equations (arXiv 2402.10631, section 3.1) on recorded activations: for each of
the 10 x 10 pairs of factors, clamp the weights, quantize them with their own min-max, multiply with the activations,
compare with the full-precision output. It multiplies with batched matrix products, which is kinder to a CPU than the
released code's elementwise product and sum. Ours builds its Gram matrices from the same activations, inside the time.

Then both answers are compared: once in the published arithmetic (fp32 scales), where the chosen ranges should be equal
unless the two best candidates are as good as each other; once in ours (stored fp16 scales), where our total error
should be no larger.

    python -m benchmarks.calibration                                      # a random tiny model
    python -m benchmarks.calibration --model PATH --text FILE             # real weights and activations
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

from benchmarks._results import figure, table, write_results
from bitdistiller_peft import BitDistillerConfig, get_bitdistiller_model
from bitdistiller_peft.calibration.blocks import BlockRunner
from bitdistiller_peft.calibration.capture import Gram
from bitdistiller_peft.calibration.clip import FACTORS, group_width, search_range
from bitdistiller_peft.calibration.slots import Slot, find_student
from bitdistiller_peft.calibration.texts import token_windows
from bitdistiller_peft.quantizers import QuantSpec, get_quantizer, to_groups

T = TypeVar("T")

NEAR_TIE = 1e-4  # relative difference of the two smallest errors under which either may be chosen
CHANNELS_AT_ONCE = 64


@dataclass(frozen=True)
class Published:
    """What the transcription found: ends and error ``[out, groups]``, and the gap to the second best candidate."""

    low: Tensor
    high: Tensor
    error: Tensor
    gap: Tensor


def pseudo_quantize(groups: Tensor, bits: int) -> Tensor:
    """Asymmetric integers from each group's own min-max, rounding half away from zero, as published."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    levels = 2**bits - 1
    scale = (high - low).clamp(min=1e-5) / levels
    zero = -round_away(low / scale).clamp(-levels, 0)
    return ((round_away(groups / scale) + zero).clamp(0, levels) - zero) * scale


def round_away(values: Tensor) -> Tensor:
    """Round to nearest, halves away from zero."""
    return values.sign() * (values.abs() + 0.5).floor()


def transcription(weight: Tensor, inputs: Tensor, bits: int, width: int) -> Published:
    """The published search: 100 candidates, output errors on ``[tokens, in]``, some output channels at a time."""
    x = inputs.reshape(len(inputs), -1, width).transpose(0, 1).contiguous()  # [groups, tokens, group]
    parts = [_channels(part, x, bits) for part in torch.split(weight.reshape(len(weight), -1, width), CHANNELS_AT_ONCE)]
    return Published(*(torch.cat([getattr(p, name) for p in parts]) for name in ("low", "high", "error", "gap")))


def _channels(groups: Tensor, x: Tensor, bits: int) -> Published:
    minimum, maximum = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    target = x @ groups.permute(1, 2, 0)  # [groups, tokens, out]
    best = torch.full(groups.shape[:2], torch.inf)
    second, low, high = best.clone(), minimum.squeeze(-1).clone(), maximum.squeeze(-1).clone()
    for above in FACTORS:
        for below in FACTORS:
            ends = minimum * below, maximum * above
            quantized = pseudo_quantize(torch.clamp(groups, *ends), bits)
            error = (x @ quantized.permute(1, 2, 0) - target).square().mean(1).T
            better = error < best
            second = torch.where(better, best, torch.minimum(second, error))
            best = torch.where(better, error, best)
            low, high = (torch.where(better, e.squeeze(-1), old) for e, old in zip(ends, (low, high), strict=True))
    return Published(low, high, best, (second - best) / best.clamp(min=1e-30))


def ours(weight: Tensor, inputs: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Our search, from activations to ranges."""
    found = search_range(weight, gram_of(inputs, group_width(spec, weight.shape[1])), spec, clamp_weight=True)
    return found.low, found.high


def gram_of(inputs: Tensor, width: int) -> Tensor:
    """The mean Gram matrices of ``[tokens, in]``, batch by batch as `calibrate` makes them."""
    gram = Gram(width)
    for batch in torch.split(inputs, 4096):
        gram.add(batch)
    mean = gram.mean()
    if mean is None:
        raise SystemExit("no activations")
    return mean


def total_error(weight: Tensor, gram: Tensor, spec: QuantSpec, ends: tuple[Tensor, Tensor]) -> float:
    """Output error in our arithmetic of weights clamped to a range and quantized by it."""
    groups = to_groups(weight, spec.group_size)
    low, high = (end.unsqueeze(-1) for end in ends)
    quantizer = get_quantizer(spec.grid)
    params = quantizer.params_from_range(*ends, spec)
    codes = quantizer.quantize(torch.clamp(groups, low, high), params, spec)
    moved = (quantizer.dequantize(codes, params, spec) - groups).double()
    return float(torch.einsum("ogi,gij,ogj->", moved, gram.double(), moved))


def activations(base: PreTrainedModel, slots: list[Slot], windows: Tensor, block: int) -> Iterator[tuple[Slot, Tensor]]:
    """What enters the linear layers of one block, fp32 ``[tokens, in]``."""
    batches = list(torch.split(windows, 8))
    runner = BlockRunner.create(base, [slot.layer for slot in slots], batches[0])
    if runner is None:
        raise SystemExit("the model cannot be run block by block")
    hidden = runner.record(batches)
    for number in range(block):
        hidden = [runner.run(number, index, states) for index, states in enumerate(hidden)]
    for slot in (s for s in slots if s.name.startswith(f"{runner.names[block]}.")):
        caught: list[Tensor] = []
        handle = slot.layer.register_forward_pre_hook(lambda module, args, into=caught: into.append(args[0]))
        for index, states in enumerate(hidden):
            runner.run(block, index, states)
        handle.remove()
        yield slot, torch.cat([part.reshape(-1, part.shape[-1]).float() for part in caught])


def timed(function: Callable[[], T]) -> tuple[float, T]:
    """Seconds that a call takes, and what it returns."""
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def compare(slot: Slot, inputs: Tensor, rows: int, bits: int) -> dict[str, Any]:
    """Time both searches on one layer, and compare what they chose."""
    weight = slot.weight.float()[: rows or None]
    width = group_width(slot.spec, weight.shape[1])
    plain = QuantSpec.create("int", bits, group_size=width, scale_dtype="float32")
    stored = QuantSpec.create("int", bits, group_size=width)
    ours(weight[:8], inputs[:64], plain)  # warm up
    theirs_s, published = timed(lambda: transcription(weight, inputs, bits, width))
    ours_s, found = timed(lambda: ours(weight, inputs, stored))
    low, high = ours(weight, inputs, plain)
    differs = (low != published.low.clamp(max=0)) | (high != published.high.clamp(min=0))
    gram = gram_of(inputs, width)
    own = total_error(weight, gram, stored, found)
    other = total_error(weight, gram, stored, (published.low.clamp(max=0), published.high.clamp(min=0)))
    return {
        "layer": slot.layer_name,
        "out": weight.shape[0],
        "in": weight.shape[1],
        "tokens": len(inputs),
        "published s": theirs_s,
        "ours s": ours_s,
        "ratio": theirs_s / ours_s,
        "groups": differs.numel(),
        "differ": int(differs.sum()),
        "no tie": int((differs & (published.gap > NEAR_TIE)).sum()),
        "error ratio": own / other,
    }


def make_model(args: argparse.Namespace) -> tuple[PreTrainedModel, Tensor]:
    """The model and the token windows to look at."""
    longest = max(args.tokens)
    if args.model is None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=96, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
        )
        windows = torch.randint(0, 96, (-(-longest // 128), 128))
        return AutoModelForCausalLM.from_config(config).eval(), windows
    if args.text is None:
        raise SystemExit("--model needs --text")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = Path(args.text).read_text(encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    return model, token_windows([text], tokenizer, -(-longest // 512), 512)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or name of a causal language model; a random tiny one by default")
    parser.add_argument("--text", help="text file to calibrate on; needed with --model")
    parser.add_argument("--block", type=int, default=1, help="decoder block whose linear layers are searched")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 4096], help="numbers of tokens to measure")
    parser.add_argument("--rows", type=int, default=0, help="output channels of each layer; 0 for all of them")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    """Measure, print, write."""
    args = parse()
    torch.set_num_threads(args.threads)
    model, windows = make_model(args)
    student = get_bitdistiller_model(model, BitDistillerConfig(bits=args.bits, group_size=args.group_size))
    base, slots = find_student(student)
    rows = [
        compare(slot, inputs[:tokens], args.rows, args.bits)
        for slot, inputs in activations(base, slots, windows, args.block)
        for tokens in args.tokens
    ]
    rows.sort(key=lambda row: row["tokens"])
    print(table(rows))
    figures = summarise(rows, args.tokens)
    for tokens in args.tokens:
        print(f"{tokens} tokens, all layers: {figures[f'speedup_{tokens}_tokens']['value']:.1f} x the transcription")
    differ, compared, no_tie = (figures[f"ranges_{name}"]["value"] for name in ("that_differ", "compared", "wrong"))
    print(f"ranges: {differ} of {compared} differ, {no_tie} of them by more than a near tie")
    print(f"written to {write_results('calibration', rows, figures)}")


def summarise(rows: list[dict[str, Any]], token_counts: list[int]) -> dict[str, dict[str, Any]]:
    """The figures: speed by number of tokens, and whether the answers agree."""
    figures = {}
    for tokens in token_counts:
        some = [row for row in rows if row["tokens"] == tokens]
        ratio = sum(row["published s"] for row in some) / sum(row["ours s"] for row in some)
        figures[f"speedup_{tokens}_tokens"] = figure(ratio, "x", at_least=10 if tokens == max(token_counts) else None)
    figures["ranges_wrong"] = figure(sum(row["no tie"] for row in rows), "groups", at_most=0)
    figures["ranges_that_differ"] = figure(sum(row["differ"] for row in rows), "groups")
    figures["ranges_compared"] = figure(sum(row["groups"] for row in rows), "groups")
    worst = max(row["error ratio"] for row in rows)
    figures["largest_error_ratio"] = figure(worst, "ours / published", at_most=1 + 1e-6)
    return figures


if __name__ == "__main__":
    main()
