"""A folder as `bitdistiller run` leaves it, with figures that are known, and hostile twins of it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from bitdistiller_peft import BitDistillerQuantConfig
from bitdistiller_peft.evaluation import (
    Collapse,
    DivergenceResult,
    Gallery,
    GalleryEntry,
    Generation,
    PerplexityResult,
)
from tests.standin import save_standin

STEPS = 30
SETTINGS = "# bitdistiller run, bitdistiller_peft 0.1.0. Works as --config.\nmodel: base\nseed: 0\n"


def log(steps: int = STEPS) -> list[dict[str, Any]]:
    """What a trainer logs: curves that fall, each differently."""
    return [
        {
            "step": step,
            "loss": 3.0 / step + 0.1,
            "forward_kl": 2.0 / step,
            "reverse_kl": 2.5 / step,
            "flip_rate": 0.05 * math.exp(-step / 10),
            "oscillation": 0.01 * step / steps,
            "clamped": 0.02,
        }
        for step in range(1, steps + 1)
    ] + [{"step": steps, "train_runtime": 12.5}]


def perplexity(value: float, state: str) -> dict[str, Any]:
    return asdict(PerplexityResult(value, math.log(value), 378, 6, "ppl/v1/tokens=abc", state, 1.5, (1.0,) * 6))


def gallery(text: str = "Paris.", prompt: str = "What is the capital of France?") -> dict[str, Any]:
    bad = Generation("!!!!!!!!", 8, False, Collapse("repeated character", repeats=8.0, detail="'!' 8 times"))
    good = Generation(text, 3, True, Collapse("healthy"))
    entries = (GalleryEntry(prompt, good, good), GalleryEntry("Say hello.", bad, good))
    found = Gallery(entries, "gallery/v1/tokens=def", "packed", "full_precision", 2.5)
    return {**asdict(found), "num_collapsed": found.num_collapsed, "num_lost_ends": found.num_lost_ends}


def evaluation(packed: str = "out/distill/packed", **answers: str) -> dict[str, Any]:
    distance = DivergenceResult(0.1234, 0.4567, 0.875, 378, 6, "kl/v1/tokens=abc", "packed", "full_precision", 3.25)
    return {
        "rows": [
            {"model": "base", "perplexity": perplexity(12.5, "full_precision")},
            {
                "model": packed,
                "perplexity": perplexity(20.75, "packed"),
                "divergence": asdict(distance),
                "gallery": gallery(**answers),
                "tasks": {
                    "scores": [
                        {"task": "arc_easy", "metric": "acc", "filter": "none", "value": 0.4321, "stderr": 0.0123,
                         "num_samples": 200, "num_fewshot": 0, "protocol": "task/v1"}
                    ],
                    "state": "packed",
                    "seconds": 9.0,
                },
            },
        ],
        "pairs": [{"measure": "nll", "first": "base", "other": packed, "difference": 0.5068, "low": 0.4, "high": 0.6,
                   "significant": True}],
    }  # fmt: skip


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny full-precision model."""
    return save_standin(tmp_path_factory.mktemp("full") / "base")


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """Its packed twin, 2 bits, rounded to nearest; it names its base."""
    folder = tmp_path_factory.mktemp("packed") / "packed"
    config = BitDistillerQuantConfig(bits=2, group_size=32, provenance={"base_model": str(base), "loss": "cakld"})
    AutoModelForCausalLM.from_pretrained(base, quantization_config=config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_chain(packed: Path) -> Callable[..., Path]:
    """Write the folder of a chain."""

    def make(folder: Path, **answers: str) -> Path:
        shutil.copytree(packed, folder / "distill" / "packed")
        write(folder / "resolved.yaml", SETTINGS)
        write(folder / "calibrate" / "result.json", {"method": "clip", "seconds": 61.5, "data": {"num_samples": 2}})
        write(folder / "generate" / "result.json", {"rows": 3, "tokens": 24, "seconds": 5.0})
        write(folder / "distill" / "result.json", {"steps": STEPS, "gamma": 0.4875, "seconds": 125.0})
        write(folder / "distill" / "metrics.jsonl", "".join(json.dumps(entry) + "\n" for entry in log()))
        write(folder / "eval" / "result.json", evaluation(**answers))
        write(folder / "costs.json", {"distill": {"seconds": 7265.0, "peak_memory_bytes": 3 * 2**30}})
        finding = {
            "name": "oscillation",
            "severity": "warning",
            "first_step": 7,
            "seen": "9 % swing.",
            "advice": "Lower.",
        }
        write(folder / "distill" / "trainer" / "doctor.json", {"findings": [finding]})
        return folder

    return make


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory, make_chain: Callable[..., Path]) -> Path:
    """The folder of a chain; tests that change it make their own."""
    return make_chain(tmp_path_factory.mktemp("chain") / "smollm2-w2")
