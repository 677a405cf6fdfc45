"""What `bitdistiller estimate` predicts against what a stage takes: peak memory and size, on three model sizes.

Random Llama-shaped models; each measured run is the command itself, in a process of its own. The process first runs the
stage on a very small model, so that all code is loaded and all one-off buffers are there; what it holds then is the
baseline, and its high-water mark (VmHWM) begins anew. Predicted and measured are without that baseline.

The heap is glibc's own, as it is. Time is predicted by the probe, by the clock; the measured stage is told by the clock
and by the processor, since other work on the machine slows both, and it includes loading and saving, which the probe
leaves out.

    python -m benchmarks.estimate                                  # all; a few minutes on one core
    python -m benchmarks.estimate --sizes 30M --stages distill --keep   # the other rows of the results stay
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import io
import json
import os
import pydoc_data.topics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks._results import RESULTS, ROOT, commit, figure, table, write_results

SIZES: dict[str, tuple[int, int, int, int, int]] = {  # hidden, intermediate, layers, heads, vocabulary
    "tiny": (64, 128, 2, 2, 512),
    "30M": (384, 1024, 14, 6, 16384),
    "60M": (512, 1408, 16, 8, 32768),
    "135M": (576, 1536, 30, 9, 49152),
}
METHODS = ("blockwise", "gptq", "awq")
STAGES = ("distill", "distill, no checkpointing", "calibrate", *(f"calibrate, {method}" for method in METHODS))
ASKED_ERROR = 0.15
SEQ_LEN = 256


def save_model(folder: Path, size: str) -> Path:
    """A random model with a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    hidden, intermediate, layers, heads, vocab = SIZES[size]
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(models.BPE({char: at for at, char in enumerate(["<end>", *alphabet])}, []))
    bytes_.pre_tokenizer, bytes_.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bytes_, eos_token="<end>", pad_token="<end>").save_pretrained(folder)
    return folder


def settings_of(model: Path, data: Path, stage: str) -> list[str]:
    """What the command is told; what has a say in memory is a default, but for lengths and batches."""
    verb, _, variant = stage.partition(", ")
    common = ["--model", str(model), "--device", "cpu", "--dtype", "float32"]
    common += ["--quant.bits", "2", "--quant.group-size", "64", "--run.stages", verb]
    values: dict[str, Any] = {
        "distill": {
            "data": data, "max_steps": 2, "per_device_train_batch_size": 2, "max_length": SEQ_LEN, "bf16": "false",
            "gamma": 0.5, "gradient_checkpointing": "false" if variant else "true", "resume": "false",
        },
        "calibrate": {
            "texts": "python-topics", "num_samples": 4, "seq_len": SEQ_LEN,
            "method": variant or "clip",
        },
    }[verb]  # fmt: skip
    return common + [
        word for key, value in values.items() for word in (f"--{verb}.{key.replace('_', '-')}", str(value))
    ]


def predict(settings: list[str], folder: Path) -> dict[str, Any]:
    """What `estimate` says."""
    from bitdistiller_peft.cli import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(["estimate", *settings, "--output", str(folder), "--json"])
    if code:
        raise SystemExit(f"estimate ended with {code}")
    return dict(json.loads(out.getvalue()))


def run_stage(settings: list[str], folder: Path) -> None:
    """The command, in this process."""
    from bitdistiller_peft.cli import main

    if main(["run", *settings, "--output", str(folder)]):
        raise SystemExit("the stage failed")


def measure_here(stage: str, model: Path, data: Path, warm: Path) -> dict[str, Any]:
    """Peak and seconds of a stage in this process, beyond what it held before."""
    with tempfile.TemporaryDirectory() as folder:
        run_stage(settings_of(warm, data, stage), Path(folder) / "warm")
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM begins anew
        start, clock = time.process_time(), time.perf_counter()
        run_stage(settings_of(model, data, stage), Path(folder) / "measured")
        seconds, clock = time.process_time() - start, time.perf_counter() - clock
        packed = sum(file.stat().st_size for file in (Path(folder) / "measured").glob("*/packed/*.safetensors"))
    return {"peak": memory("VmHWM") - before, "baseline": before, "seconds": seconds, "clock": clock, "packed": packed}


def memory(name: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def measure(stage: str, paths: tuple[Path, Path, Path]) -> dict[str, Any]:
    """`measure_here` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.estimate", "--child", stage, *map(str, paths)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def row_of(size: str, stage: str, paths: tuple[Path, Path, Path], *, probe: bool) -> dict[str, Any]:
    """Predicted and measured; `paths` are those of model, data and the very small model."""
    with tempfile.TemporaryDirectory() as folder:
        predicted = predict([*settings_of(*paths[:2], stage), *([] if probe else ["--no-probe"])], Path(folder))
    verb = stage.partition(",")[0]
    peak = predicted["peak_bytes"][verb] - predicted["runtime_bytes"]
    found = measure(stage, paths)
    return {
        "commit": commit()[:12],
        "size": size,
        "stage": stage,
        "weights": predicted["weights"],
        "predicted MiB": round(peak / 2**20, 1),
        "measured MiB": round(found["peak"] / 2**20, 1),
        "error": round(peak / found["peak"] - 1, 4),
        "baseline MiB": round(found["baseline"] / 2**20, 1),
        "predicted seconds": round((predicted["seconds"].get(verb) or {}).get("all") or 0.0, 1),
        "seconds by the clock": round(found["clock"], 1),
        "seconds of the processor": round(found["seconds"], 1),
        "packed predicted": predicted["packed_bytes"],
        "packed measured": found["packed"],
    }


def kept_rows(name: str) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows of an earlier run, by size and stage."""
    content = json.loads((RESULTS / f"{name}.cpu.json").read_text(encoding="utf-8"))
    return {(row["size"], row["stage"]): {"commit": content["commit"][:12], **row} for row in content["rows"]}


def figures_of(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The largest error of a peak, and of all sizes of packed files."""
    errors = [abs(row["error"]) for row in rows]
    sizes = [abs(row["packed predicted"] / row["packed measured"] - 1) for row in rows if row["packed measured"]]
    return {
        "largest error of peak memory": figure(max(errors), "of measured", at_most=ASKED_ERROR),
        "largest error of packed size": figure(max(sizes, default=0.0), "of measured"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["30M", "60M", "135M"], choices=list(SIZES))
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--keep", action="store_true", help="leave the rows of the results that are not measured again")
    parser.add_argument("--no-probe", action="store_true", help="predict memory and size alone")
    parser.add_argument("--name", default="estimate", help="of the results file")
    parser.add_argument("--child", nargs=4, metavar=("STAGE", "MODEL", "DATA", "WARM"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        stage, *paths = options.child
        with contextlib.redirect_stdout(sys.stderr):
            found = measure_here(stage, *map(Path, paths))
        print(json.dumps(found))
        return
    rows = kept_rows(options.name) if options.keep else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "data.jsonl"
        texts = sorted(pydoc_data.topics.topics.values(), key=len)[-24:]  # each fills a window
        data.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
        warm = save_model(folder / "tiny", "tiny")
        for size in options.sizes:
            model = save_model(folder / size, size)
            for stage in options.stages:
                rows[size, stage] = row_of(size, stage, (model, data, warm), probe=not options.no_probe)
                print(table([rows[size, stage]]), flush=True)
                ordered = [rows[key] for key in sorted(rows, key=lambda key: (list(SIZES).index(key[0]), key[1]))]
                write_results(options.name, ordered, figures_of(ordered))
    print(table(ordered))


if __name__ == "__main__":
    main()
