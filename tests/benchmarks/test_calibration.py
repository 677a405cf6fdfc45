"""The benchmark compares like with like: the published search, written from its equations, chooses as ours does."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import _results, calibration
from bitdistiller_peft.quantizers import QuantSpec


def test_the_transcription_and_ours_choose_the_same_ranges(generator: torch.Generator) -> None:
    weight = 0.1 * torch.randn(20, 64, generator=generator)
    inputs = torch.randn(50, 64, generator=generator) * torch.rand(64, generator=generator)
    published = calibration.transcription(weight, inputs, 2, 16)
    spec = QuantSpec.create("int", 2, group_size=16, scale_dtype="float32")
    low, high = calibration.ours(weight, inputs, spec)
    differs = (low != published.low) | (high != published.high)
    assert not (differs & (published.gap > calibration.NEAR_TIE)).any()
    assert differs.float().mean() < 0.05


def test_the_benchmark_runs_and_writes_what_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], local_seed: Any
) -> None:
    monkeypatch.setattr(_results, "RESULTS", tmp_path)
    threads = str(torch.get_num_threads())
    arguments = ["calibration", "--tokens", "128", "256", "--rows", "16", "--threads", threads, "--text", "/a/b/text"]
    monkeypatch.setattr(sys, "argv", arguments)
    with local_seed(0):
        calibration.main()
    written = json.loads((tmp_path / "calibration.cpu.json").read_text())
    assert list(written) == ["name", "command", "commit", "when", "device", "versions", "rows", "figures"]
    assert written["command"].endswith(f"--rows 16 --threads {threads} --text text")
    assert len(written["rows"]) == 14
    assert written["figures"]["speedup_256_tokens"]["asked"] == {"min": 10}
    assert written["figures"]["ranges_wrong"] == {"value": 0, "asked": {"max": 0}, "unit": "groups"}
    assert written["figures"]["largest_error_ratio"]["value"] <= 1 + 1e-6
    assert "256 tokens, all layers" in capsys.readouterr().out
