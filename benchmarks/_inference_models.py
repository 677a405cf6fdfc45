"""Whole models, generating greedily: full precision, packed, and llama.cpp; they take turns."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from benchmarks._llama_cpp import Scorer
from benchmarks._results import figure
from bitdistiller_peft import BitDistillerConfig, get_bitdistiller_model

PROMPT = 16  # tokens
SHAPE_06B = {  # of Qwen3-0.6B
    "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
}  # fmt: skip
ASKED = {"over bf16": 1.5, "over llama.cpp": 1.3, "ternary": 2.65, "ternary memory": 10.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is generated with, and how."""
    parser.add_argument("--base", help="a model's folder in full precision, for tokens per second")
    parser.add_argument("--models", nargs="*", default=[], metavar="NAME=FOLDER", help="the same model, packed")
    parser.add_argument("--gguf", type=Path, help="the same model for llama.cpp")
    parser.add_argument("--make-0.6b", dest="make_06b", type=Path, help="folder: also a random model of 0.6B, ternary")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--model-rounds", type=int, default=5)
    parser.add_argument("--static-cache", action="store_true")
    parser.add_argument("--compile", action="store_true")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Tokens per second of everything that was named, and bytes on disk."""
    rows: list[dict[str, Any]] = []
    if args.base:
        kinds = {"bf16": args.base, **dict(item.split("=", 1) for item in args.models)}
        rows += _turns({name: Path(folder) for name, folder in kinds.items()}, args, args.gguf)
    if args.make_06b:
        make_06b(args.make_06b)
        rows += _turns({f"0.6B {name}": args.make_06b / name for name in ("bf16", "ternary")}, args, None)
    return rows


def _turns(folders: dict[str, Path], args: argparse.Namespace, gguf: Path | None) -> list[dict[str, Any]]:
    calls = {name: _transformers(folder, args) for name, folder in folders.items()}
    if gguf is not None:
        calls["llama.cpp"] = _llama_cpp(gguf, args.new_tokens)
    times: dict[str, list[float]] = {name: [] for name in calls}
    now = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for turn in range(args.model_rounds + 1):  # the first one fills caches, and compiles
        for name, call in calls.items():
            start = now()
            call()
            if turn:
                times[name].append(now() - start)
    middle = {name: statistics.median(values) for name, values in times.items()}
    files = {name: folder / "model.safetensors" for name, folder in folders.items()} | {"llama.cpp": gguf}
    return [
        {
            "model": name,
            "cache": "static" if args.static_cache else "dynamic",
            "compiled": "yes" if args.compile else "no",
            "MB": files[name].stat().st_size / 1e6,  # type: ignore[union-attr]
            "tokens/s": args.new_tokens / seconds,
        }
        for name, seconds in middle.items()
    ]


def _transformers(folder: Path, args: argparse.Namespace) -> Callable[[], object]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    if args.compile:
        model.forward = torch.compile(model.forward)
    prompt = torch.arange(PROMPT).reshape(1, PROMPT)
    options: dict[str, Any] = {"max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens}
    options |= {"do_sample": False, "cache_implementation": "static" if args.static_cache else None}
    return lambda: model.generate(prompt, **options)


def _llama_cpp(path: Path, new_tokens: int) -> Callable[[], object]:
    scorer = Scorer(path)
    return lambda: scorer.generate(list(range(PROMPT)), new_tokens)


def make_06b(folder: Path) -> None:
    """A random model of the shape of Qwen3-0.6B: in bf16, and as BitNet Distillation has it, embeddings in 4 bits."""
    if (folder / "ternary" / "config.json").exists():
        return
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3Config(**SHAPE_06B), dtype=torch.bfloat16)
    model.save_pretrained(folder / "bf16")
    config = BitDistillerConfig.from_recipe("bitnet-distillation", train_other="norms", embedding_bits=4)
    get_bitdistiller_model(model, config).pack_and_unload().save_pretrained(folder / "ternary")


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What was asked, of the first packed model, and of every ternary one beside what BitNet Distillation reports."""
    speed, size = ({row["model"]: row[key] for row in rows} for key in ("tokens/s", "MB"))
    found: dict[str, Any] = {}
    packed = [name for name in speed if name not in ("bf16", "llama.cpp") and not name.startswith("0.6B")]
    for number, name in enumerate(packed):
        ratio = speed[name] / speed["bf16"]
        is_ternary = name.startswith("ternary")
        least = ASKED["ternary"] if is_ternary else ASKED["over bf16"]
        found[f"{name}_tokens_per_second"] = figure(ratio, "x bf16", at_least=least)
        if "llama.cpp" in speed and not is_ternary:
            most = ASKED["over llama.cpp"] if number == 0 else None
            ratio = speed["llama.cpp"] / speed[name]
            found[f"{name}_time_of_llama_cpp"] = figure(ratio, "x llama.cpp's time per token", at_most=most)
    if "0.6B ternary" in speed:
        ratio, smaller = (of["0.6B ternary"] / of["0.6B bf16"] for of in (speed, size))
        found["0.6B_ternary_tokens_per_second"] = figure(ratio, "x bf16", at_least=ASKED["ternary"])
        found["0.6B_ternary_memory"] = figure(1 / smaller, "times smaller", at_least=ASKED["ternary memory"])
    return found
