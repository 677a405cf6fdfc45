"""Loading a packed model: memory and time beside the size of its files, on a file of a gigabyte.

The model is a decoder of the usual shapes with random codes; what it says does not matter here. One process loads it
and multiplies once with every layer, and reports its own memory: what is anonymous or written to counts, pages of the
file that are only mapped do not, since the system takes them back when it needs them. Reading is timed in the same
process: the file from beginning to end, CRC-32C included, with warm caches as for loading.

    python -m benchmarks.loading                 # about 1.1 GB in a temporary folder
    python -m benchmarks.loading --layers 1 --width 256 --vocabulary 512 --name dry
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks._results import figure, table, write_results
from bitdistiller_peft import BitDistillerQuantConfig
from bitdistiller_peft.hub.convert import convert_skeleton, resolve_skips
from bitdistiller_peft.hub.quantizer import as_quantized
from bitdistiller_peft.hub.verify import verify_checkpoint
from bitdistiller_peft.packing import pack_codes

BITS, GROUP_SIZE = 2, 64
ASKED_MEMORY, ASKED_TIME = 1.2, 2.0


def save_random(folder: Path, options: argparse.Namespace, layers: int) -> None:
    """A packed model of random codes that was never dense."""
    width = options.width
    config = LlamaConfig(
        vocab_size=options.vocabulary, hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=max(2, width // 128), dtype="bfloat16", tie_word_embeddings=False,
    )  # fmt: skip
    quantization = BitDistillerQuantConfig(bits=BITS, group_size=GROUP_SIZE)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    widths = {f"{name}.weight": module.in_features for name, module in model.named_modules() if _is_linear(module)}
    quantization.modules_to_not_convert = resolve_skips(model, None)
    converted = set(convert_skeleton(model, quantization))
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        if key.endswith("_zero_point"):  # bits beyond the last group have to be zero
            groups = widths[key.removesuffix("_zero_point")] // GROUP_SIZE
            codes = torch.randint(0, 1 << BITS, (len(parameter), groups), generator=generator)
            parameter.data = pack_codes(codes.to(torch.uint8), BITS)
        elif parameter.dtype == torch.int32:
            parameter.data.random_(-(2**31), 2**31 - 1, generator=generator)
        else:
            parameter.data.uniform_(0.01, 0.02, generator=generator)
    as_quantized(model, quantization, {key: n for key, n in widths.items() if key.rpartition(".")[0] in converted})
    model.save_pretrained(folder)


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear)


def child(small: str, folder: str) -> dict[str, float]:
    """Load, multiply, and say what it took; a small model first, so that nothing is counted that any process needs."""
    token = torch.zeros(1, 1, dtype=torch.long)
    with torch.inference_mode():
        AutoModelForCausalLM.from_pretrained(small, dtype="auto")(token)
    files = sorted(Path(folder).glob("*.safetensors"))
    started = time.perf_counter()
    verify_checkpoint(folder)  # reads every byte, and its CRC
    reading = time.perf_counter() - started
    before = memory()
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    seconds = time.perf_counter() - started
    loaded = memory()
    with torch.inference_mode():
        model(token)
    used = memory()
    size = sum(file.stat().st_size for file in files)
    return {
        "file_gb": size / 1e9,
        "loaded_gb": (loaded - before) / 1e9,
        "used_gb": (used - before) / 1e9,
        "read_seconds": reading,
        "load_seconds": seconds,
    }


def memory() -> int:
    """Bytes of this process that no file stands behind."""
    for line in Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this system does not tell a process its own memory")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--name", default="loading", help="of the results file")
    parser.add_argument("--child", nargs=2, metavar=("SMALL", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(*options.child)))
        return
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / "small", Path(name) / "large"]
        save_random(folders[0], argparse.Namespace(width=256, vocabulary=512), layers=1)
        save_random(folders[1], options, layers=options.layers)
        command = [sys.executable, "-m", "benchmarks.loading", "--child", *map(str, folders)]
        row: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    figures = {
        "memory_loaded": figure(row["loaded_gb"] / row["file_gb"], "x file", at_most=ASKED_MEMORY),
        "memory_after_use": figure(row["used_gb"] / row["file_gb"], "x file", at_most=ASKED_MEMORY),
        "time": figure(row["load_seconds"] / row["read_seconds"], "x reading with CRC", at_most=ASKED_TIME),
    }
    print(table([row]))
    for key, value in figures.items():
        print(f"{key}: {value['value']:.2f} {value['unit']}, asked: {value['asked']}")
    print(f"results: {write_results(options.name, [row], figures).name}")


if __name__ == "__main__":
    main()
