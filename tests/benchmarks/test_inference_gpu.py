"""The GPU benchmark, dry: all of it runs in Triton's interpreter, and its figures are held against what was asked."""

from __future__ import annotations

import argparse

import pytest
import torch

from benchmarks import inference_gpu
from bitdistiller_peft import use_backend
from bitdistiller_peft.kernels.triton import ops


@pytest.mark.slow
@pytest.mark.skipif(not ops.is_usable(torch.device("cpu")), reason="Triton is not installed, or was imported for a GPU")
def test_every_kind_is_measured_beside_torch_and_copying() -> None:
    options = argparse.Namespace(device="cpu", rounds=1, tokens=[1, 16])
    with use_backend("triton"), torch.inference_mode():
        rows = inference_gpu.products(64, 64, options)
    assert [(row["weight"], row["tokens"]) for row in rows] == [
        (f"{grid}{bits}", tokens) for tokens in (1, 16) for grid, bits in inference_gpu.KINDS
    ]
    assert all(row["x faster than bf16"] > 0 and row["share of copy bandwidth"] > 0 for row in rows)


def test_figures_say_what_was_asked_at_two_bits() -> None:
    row = {"shape": "8x8", "MB read": 1.0, "ms": 1.0, "share of copy bandwidth": 0.5, "x faster than bf16": 2.5}
    rows = [{**row, "weight": weight, "tokens": tokens} for weight in ("int2", "nf3") for tokens in (1, 64, 512)]
    figures = inference_gpu.summarise(rows, [])
    assert figures["int2_8x8_1_speedup"] == {"value": 2.5, "asked": {"min": 3.0}, "unit": "x bf16"}
    assert figures["int2_8x8_1_bandwidth"]["asked"] == {"min": 0.6}
    assert figures["int2_8x8_512_speedup"]["asked"] == {"min": 0.8}
    assert figures["nf3_8x8_1_speedup"]["asked"] == {}
    assert "int2_8x8_64_speedup" not in figures
