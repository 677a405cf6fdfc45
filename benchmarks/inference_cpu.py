"""Packed layers on a CPU: one token from cold memory, batches, and greedy tokens per second of a whole model.

Weights are read from copies that together exceed the caches, so each call finds its weight in memory. All take turns,
in an order drawn anew each time, so that a slow moment of the machine falls on all of them. Times are CPU seconds of
the thread with one thread, wall seconds otherwise; medians count. "Streaming" is the time to read as many bytes as the
packed weight has, with the fastest loop at hand, from memory, in the same round.

    python -m benchmarks.inference_cpu                        # one thread, 4096 x 4096 and 11008 x 4096
    python -m benchmarks.inference_cpu --base FULL-PRECISION --models int2=PACKED ternary=PACKED --gguf FILE
    python -m benchmarks.inference_cpu --make-0.6b FOLDER     # also a random model of 0.6B, ternary (2 GB)

Other people's products take turns with ours, those of `benchmarks._inference_peers` that are installed. llama.cpp and
onnxruntime round the activations to 8-bit integers, which ours do for ternary weights only.
"""

from __future__ import annotations

import argparse
import ctypes
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import _inference_models
from benchmarks._inference_peers import Peer, peers
from benchmarks._results import figure, table, write_results
from bitdistiller_peft import use_backend
from bitdistiller_peft.kernels import backend_info, packed_linear, packed_ternary_int8_linear
from bitdistiller_peft.kernels.cpu.library import isa, load
from bitdistiller_peft.kernels.cpu.weights import Stream
from bitdistiller_peft.layers import PackedLinear
from bitdistiller_peft.layers.companions import packed_params
from bitdistiller_peft.quantizers import QuantParams, QuantSpec

SHAPES = ((4096, 4096), (11008, 4096))
KINDS = (("int", 2), ("int", 3), ("int", 4), ("nf", 3))
GROUP_SIZE = 128
INTEGERS = "ternary x int8"  # the one of ours that rounds its inputs
PEERS = {  # and which of ours
    "llama.cpp Q2_K": "int2", "llama.cpp TQ2_0": INTEGERS, "onnxruntime int2": "int2",
    "onnxruntime int2, float inputs": "int2", "torch int4": "int4",
    "bitsandbytes nf4": "int4",
}  # fmt: skip
COLD_BYTES = 160 << 20  # more than the last-level cache holds
PEER_ROUNDS = 30  # the slowest of them takes a hundred times as long as the others
ASKED = {"roof": 1.6, "speedup": {("int", 2): 8.0, ("int", 3): 5.0}, "batch": 1.3}


class Packed(NamedTuple):
    """Copies of a random packed weight, each with its own memory."""

    spec: QuantSpec
    words: list[Tensor]
    params: QuantParams
    stream_bytes: int
    packed_bytes: int


def random_packed(grid: str, bits: int, rows: int, cols: int, group_size: int | str = GROUP_SIZE) -> Packed:
    """A weight of random codes: how fast it multiplies does not depend on them."""
    spec = QuantSpec.create(grid, bits, group_size=group_size)
    layer = PackedLinear(cols, rows, spec=spec)
    generator = torch.Generator().manual_seed(0)
    for tensor in layer.parameters():
        if tensor.dtype == torch.int32:
            tensor.data.random_(-(2**31), 2**31 - 1, generator=generator)
        else:
            tensor.data.uniform_(0.01, 0.02, generator=generator)
    params = packed_params(layer, "weight")
    packed_bytes = sum(tensor.nbytes for tensor in layer.parameters())
    count = -(-COLD_BYTES // packed_bytes)
    words = [layer.weight.data.clone() for _ in range(count)]
    stream_bytes = _stream(words[0], params, spec, cols).data.nbytes if group_size == GROUP_SIZE else packed_bytes
    return Packed(spec, words, params, stream_bytes, packed_bytes)


def _stream(words: Tensor, params: QuantParams, spec: QuantSpec, cols: int) -> Stream:
    from bitdistiller_peft.kernels.cpu.ops import STREAMS, Layout

    second = params.zero_point if params.zero_point is not None else params.scale_negative
    layout = Layout(spec.grid.name, spec.grid.bits, GROUP_SIZE, "bitstream")
    return STREAMS.get(words, params.scale, second, layout, cols)


def clock(call: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    now = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = now()
    call()
    return (now() - start) * 1e3


def _of_peer(peer: Peer, turn: int) -> float:
    return clock(peer.calls[turn % len(peer.calls)])


def _of_dense(weights: list[Tensor], inputs: Tensor, turn: int) -> float:
    return clock(lambda: F.linear(inputs, weights[turn % len(weights)]))


def _copy(made: Packed, third: int, turn: int) -> Tensor:
    return made.words[(turn + third * len(made.words) // 3) % len(made.words)]


def _of_packed(multiply: Callable[..., Tensor], made: Packed, inputs: Tensor, third: int, turn: int) -> float:
    words = _copy(made, third, turn)
    return clock(lambda: multiply(inputs, words, made.params, made.spec))


def _of_kernel(made: Packed, inputs: Tensor, library: ctypes.CDLL, turn: int) -> float:
    """The C function alone: without Python and the operator."""
    stream = _stream(_copy(made, 2, turn), made.params, made.spec, inputs.shape[1])
    out = torch.empty(1, stream.struct.rows, dtype=inputs.dtype)
    given = (stream.pointer, stream.address, inputs.data_ptr(), 1, None, out.data_ptr(), 1, isa())
    return clock(lambda: library.bd_linear(*given, torch.get_num_threads()))


def _of_reading(start: int, size: int, memory: Tensor, library: ctypes.CDLL, turn: int) -> float:
    place = (start + turn * size) % (COLD_BYTES - size) // 64 * 64
    address = ctypes.c_void_p(memory.data_ptr() + place)
    return clock(lambda: library.bd_read(address, size // 8, isa()))


def one_token(rows: int, cols: int, rounds: int) -> list[dict[str, Any]]:
    """Every kind of weight, one token, cold."""
    library = load()
    if library is None:
        raise SystemExit("the CPU kernels cannot be compiled on this machine")
    inputs = {dtype: torch.randn(1, cols).to(dtype) for dtype in (torch.bfloat16, torch.float32)}
    dense = {
        dtype: [torch.randn(rows, cols).to(dtype) for _ in range(-(-COLD_BYTES // (rows * cols * dtype.itemsize)))]
        for dtype in inputs
    }
    packed = {kind: random_packed(*kind, rows, cols) for kind in KINDS}
    for made in packed.values():
        for words in made.words:
            _stream(words, made.params, made.spec, cols)
    memory = torch.ones(
        COLD_BYTES, dtype=torch.uint8
    )  # untouched zeros would all be one page, and never leave the cache
    integers = random_packed("ternary", 2, rows, cols, "tensor")
    for words in integers.words:
        packed_ternary_int8_linear(inputs[torch.bfloat16], words, integers.params, integers.spec)  # makes its stream
    others = peers(rows, cols, COLD_BYTES)
    calls: dict[Any, Callable[[int], float]] = {name: partial(_of_peer, peer) for name, peer in others.items()}
    calls[INTEGERS] = partial(_of_packed, packed_ternary_int8_linear, integers, inputs[torch.bfloat16], 0)
    for place, (dtype, weights) in enumerate(dense.items()):
        calls[dtype] = partial(_of_dense, weights, inputs[dtype])
        for kind, made in packed.items():  # the two dtypes, and the kernel alone, take turns on different copies
            calls[kind, dtype] = partial(_of_packed, packed_linear, made, inputs[dtype], place)
    for place, (kind, made) in enumerate(packed.items()):
        calls[kind, "kernel"] = partial(_of_kernel, made, inputs[torch.bfloat16], library)
        start = place * COLD_BYTES // len(packed)  # what one kind has read is in the cache
        calls[kind, "read"] = partial(_of_reading, start, made.stream_bytes, memory, library)
    times: dict[Any, list[float]] = defaultdict(list)
    for turn in range(rounds):
        # in another order each time: a call finds the caches and tables that the one before it left
        for name in random.Random(turn).sample(list(calls), len(calls)):
            if turn < PEER_ROUNDS or name not in others:
                times[name].append(calls[name](turn))
    sizes = {INTEGERS: integers.packed_bytes} | {name: peer.num_bytes for name, peer in others.items()}
    return _one_token_rows(rows, cols, packed, times, sizes)


def _one_token_rows(
    rows: int, cols: int, packed: dict[Any, Packed], times: dict[Any, list[float]], sizes: dict[str, int]
) -> list[dict[str, Any]]:
    middle = {key: statistics.median(values) for key, values in times.items()}
    lines = []
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        size = rows * cols * dtype.itemsize / 1e6
        lines.append(_line(f"{rows}x{cols}", f"torch {name}", name, size, middle[dtype], 0.0, middle))
        for kind, made in packed.items():
            roof = middle[kind, dtype] / middle[kind, "read"]
            label = f"{kind[0]}{kind[1]}"
            lines.append(
                _line(f"{rows}x{cols}", label, name, made.stream_bytes / 1e6, middle[kind, dtype], roof, middle)
            )
    for kind, made in packed.items():
        ms = middle[kind, "kernel"]
        label, roof = f"{kind[0]}{kind[1]} kernel alone", ms / middle[kind, "read"]
        lines.append(_line(f"{rows}x{cols}", label, "bfloat16", made.stream_bytes / 1e6, ms, roof, middle))
    for name, size in sizes.items():
        dtype = "float32" if name.startswith(("llama.cpp", "onnxruntime")) else "bfloat16"
        lines.append(_line(f"{rows}x{cols}", name, dtype, size / 1e6, middle[name], 0.0, middle))
    return lines


def _line(
    shape: str, kind: str, dtype: str, size: float, ms: float, roof: float, middle: dict[Any, float]
) -> dict[str, Any]:
    return {
        "shape": shape,
        "weight": kind,
        "inputs": dtype,
        "tokens": 1,
        "MB read": size,
        "ms": ms,
        "x streaming": roof,
        "x faster than bf16": middle[torch.bfloat16] / ms,
    }


def batches(rows: int, cols: int, counts: list[int], rounds: int) -> list[dict[str, Any]]:
    """Packed against torch's bf16 product for growing numbers of tokens; weights as cold as one round leaves them."""
    packed = {kind: random_packed(*kind, rows, cols) for kind in KINDS[:3]}
    weight = torch.randn(rows, cols).bfloat16()
    lines = []
    for count in counts:
        inputs = torch.randn(count, cols).bfloat16()
        times: dict[Any, list[float]] = defaultdict(list)
        for turn in range(max(3, rounds // max(1, count // 16))):
            times["dense"].append(clock(lambda: F.linear(inputs, weight)))  # noqa: B023
            for kind, made in packed.items():
                words = made.words[turn % 2]
                call = lambda m=made, w=words: packed_linear(inputs, w, m.params, m.spec)  # noqa: E731, B023
                times[kind].append(clock(call))
        middle = {key: statistics.median(values[1:]) for key, values in times.items()}
        for kind in packed:
            lines.append(
                {
                    "shape": f"{rows}x{cols}",
                    "weight": f"{kind[0]}{kind[1]}",
                    "inputs": "bfloat16",
                    "tokens": count,
                    "MB read": packed[kind].stream_bytes / 1e6,
                    "ms": middle[kind],
                    "x streaming": 0.0,
                    "x faster than bf16": middle["dense"] / middle[kind],
                }
            )
    return lines


def summarise(rows: list[dict[str, Any]], models: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The figures, with what was asked."""
    figures = {}
    for row in rows:
        name, _, part = row["weight"].partition(" ")
        key = "_".join([name, row["shape"], *part.split()])
        if row["tokens"] == 1 and row["inputs"] == "bfloat16" and row["x streaming"]:
            kind = (name[:-1], int(name[-1]))
            asked = ASKED["speedup"].get(kind)  # type: ignore[attr-defined]
            figures[f"{key}_speedup"] = figure(row["x faster than bf16"], "x bf16", at_least=asked)
            figures[f"{key}_roof"] = figure(row["x streaming"], "x streaming", at_most=ASKED["roof"])  # type: ignore[arg-type]
    kinds = {f"{grid}{bits}" for grid, bits in KINDS}
    sweep = [row for row in rows if not row["x streaming"] and row["weight"] in kinds]
    for kind in sorted({row["weight"] for row in sweep}):
        worst = max(1 / row["x faster than bf16"] for row in sweep if row["weight"] == kind)
        figures[f"{kind}_slowest_batch"] = figure(worst, "x bf16's time", at_most=ASKED["batch"])  # type: ignore[arg-type]
    alone = [row for row in rows if row["inputs"] == "bfloat16" and (row["x streaming"] or row["weight"] == INTEGERS)]
    ours = {(row["shape"], row["weight"]): row["ms"] for row in alone}
    for row in rows:
        peer = row["weight"]
        if peer in PEERS:
            ratio = ours[row["shape"], PEERS[peer]] / row["ms"]
            name = f"{PEERS[peer]}_{row['shape']}_time_of_{peer}".replace(" ", "_")
            figures[name] = figure(ratio, "x its time", at_most=1.0)
    return figures | _inference_models.figures(models)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--shapes", nargs="*", default=[f"{r}x{c}" for r, c in SHAPES], help="ROWSxCOLUMNS")
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64, 128, 512, 2048])
    parser.add_argument("--name", default="inference_cpu", help="of the results file")
    _inference_models.add_arguments(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shapes = [tuple(int(n) for n in shape.split("x")) for shape in args.shapes]
    with use_backend("cpu"), torch.inference_mode():
        print(backend_info("cpu"))
        rows = [row for shape in shapes for row in one_token(*shape, args.rounds)]
        rows += batches(*shapes[0], args.tokens, args.rounds) if shapes and args.tokens else []
        print(table(rows))
        models = _inference_models.run(args)
        print(table(models))
    figures = summarise(rows, models)
    for name, value in figures.items():
        print(f"{name}: {value['value']:.2f} {value['unit']}, asked: {value['asked'] or 'nothing'}")
    print(f"written to {write_results(args.name, [*rows, *models], figures)}")


if __name__ == "__main__":
    main()
