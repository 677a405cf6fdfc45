"""What block-wise reconstruction holds at once, on decoder blocks of the shape of a 7B model (Llama-2-7B's).

Only the block at work is trained, so what it needs beside the model does not grow with the number of blocks: random
stacks of two and of more blocks are calibrated, each in a process of its own, and the high-water mark of the process
while `calibrate` runs is compared with what it held before. What a GPU must hold is then the block at work and the one
that is looked ahead to, students included, and that difference; with `device="cuda"` all others and the hidden states
of the text stay in main memory. Figures for a whole 7B model are added up from those of one block, and say so in their
names.

    python -m benchmarks.block_stack
    python -m benchmarks.block_stack --device cuda      # the block at work on a GPU; its allocator's peak is reported
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks._results import figure, table, write_results
from bitdistiller_peft import BitDistillerConfig, calibrate, get_bitdistiller_model

SHAPE = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32}
SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 4}
BLOCKS_OF_7B, VOCABULARY_OF_7B = 32, 32000
WINDOWS_OF_BALANCED, LENGTH_OF_BALANCED = 480, 64


def main() -> None:
    """Measure stacks of several depths and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 3], help="blocks in the stacks")
    parser.add_argument("--device", default="cpu", help="where the block at work is")
    parser.add_argument("--windows", type=int, default=2, help="windows, one a step")
    parser.add_argument("--length", type=int, default=LENGTH_OF_BALANCED, help="tokens in a window")
    parser.add_argument("--dtype", default="float32", help="of the full-precision model")
    parser.add_argument("--small", action="store_true", help="small blocks, to try the script")
    parser.add_argument("--depth", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.depth is not None:
        print(json.dumps(measure(args)))
        return
    rows = [_in_a_process(depth) for depth in args.depths]
    found = figures(rows, args)
    print(table([_shown(row) for row in rows]))
    if not args.small:
        write_results("block_stack", rows, found, device="cuda" if args.device.startswith("cuda") else "cpu")


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    sizes = {"model GB": "held", "beside it GB": "extra", "GPU GB": "gpu"}
    return {"blocks": row["blocks"], **{name: row[key] / 1e9 for name, key in sizes.items()}, "seconds": row["seconds"]}


def _in_a_process(depth: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.block_stack", *sys.argv[1:], "--depth", str(depth)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Calibrate one stack and tell what was held, in bytes."""
    shape = SMALL if args.small else SHAPE
    torch.manual_seed(0)
    config = LlamaConfig(**shape, num_hidden_layers=args.depth, vocab_size=256, tie_word_embeddings=True)
    model = LlamaForCausalLM(config).to(getattr(torch, args.dtype)).eval()
    student = get_bitdistiller_model(model, BitDistillerConfig(bits=2, group_size=64, learn_zero_point=True))
    ids = torch.randint(0, 256, (args.windows, args.length), generator=torch.Generator().manual_seed(0))
    block = sum(t.numel() * t.element_size() for t in model.model.layers[0].state_dict().values())
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM begins anew
    held, started = _memory("VmRSS"), time.perf_counter()
    calibrate(
        student, None, ids, method="blockwise", look_ahead=1, epochs=1, factors=(1.0, 0.8), show_progress=False,
        device=None if args.device == "cpu" else args.device,
    )  # fmt: skip
    seconds, gpu = time.perf_counter() - started, 0
    if args.device.startswith("cuda"):
        gpu = torch.cuda.max_memory_allocated()
    return {
        "blocks": args.depth, "held": held, "extra": _memory("VmHWM") - held, "gpu": gpu, "block": block,
        "seconds": seconds, "tokens_in_a_step": args.length, "dtype": args.dtype,
    }  # fmt: skip


def _memory(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])


def figures(rows: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What was asked for: one block at a time, and a 7B model beside a GPU of 24 GB."""
    first, last = rows[0], rows[-1]
    width = (SMALL if args.small else SHAPE)["hidden_size"]
    at_work = last["gpu"] or 2 * last["block"] + last["extra"]  # the block behind is there, too
    states = 3 * WINDOWS_OF_BALANCED * LENGTH_OF_BALANCED * width * getattr(torch, args.dtype).itemsize
    whole = BLOCKS_OF_7B * last["block"] + 2 * VOCABULARY_OF_7B * width * getattr(torch, args.dtype).itemsize
    return {
        f"memory beside the model, {last['blocks']} blocks / {first['blocks']}": figure(
            last["extra"] / first["extra"], "times", at_most=1.2
        ),
        "a 7B block at work, the one behind, and all that training adds": figure(at_work / 1e9, "GB", at_most=24.0),
        "hidden states of 480 windows of 64 tokens, in main memory (computed)": figure(states / 1e9, "GB"),
        "a 7B student of 32 blocks, in main memory (computed)": figure(whole / 1e9, "GB"),
    }


if __name__ == "__main__":
    main()
