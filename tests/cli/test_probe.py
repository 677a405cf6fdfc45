"""A probe reads off the time that a line gives, and runs the real work of every stage that it knows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitdistiller_peft.cli.probe import extrapolate
from tests.cli.conftest import Command

COST = st.floats(0, 10)


@given(COST, COST, COST, COST, st.integers(1, 100), st.integers(1, 10_000))
def test_times_on_the_surface_are_found_exactly(
    fixed: float, block: float, piece: float, both: float, blocks: int, amount: int
) -> None:
    def truth(blocks: int, amount: int) -> float:
        return fixed + block * blocks + (piece + both * blocks) * amount

    times = {(b, a): truth(b, a) for b in (1, 2) for a in (4, 8)}
    if amount >= 4:
        assert extrapolate(times, blocks, amount) == pytest.approx(truth(blocks, amount), rel=1e-6, abs=1e-6)


def test_noise_makes_no_time_negative() -> None:
    assert extrapolate({(1, 4): 1.0, (2, 4): 0.5, (1, 8): 0.9, (2, 8): 0.4}, 30, 1000) == 1.0


def test_estimate_tells_the_time_of_each_stage_and_the_size_of_a_cache(
    command: Command, base: Path, files: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": "a list of words"}) for _ in range(6)), encoding="utf-8")
    settings = ["--model", base, "--quant.group-size", "32", "--device", "cpu", "--distill.data", data]
    settings += [
        "--run.stages",
        "calibrate",
        "generate",
        "cache",
        "distill",
        "--generate.prompts",
        files / "prompts.txt",
    ]
    settings += ["--calibrate.num-samples", "4", "--calibrate.seq-len", "32", "--distill.max-length", "32"]
    settings += ["--distill.per-device-train-batch-size", "2", "--distill.num-train-epochs", "2"]
    done = command("estimate", *settings, "--json")
    assert done.code == 0, done.err
    seconds = done.json["seconds"]
    assert set(seconds) == {"calibrate", "generate", "distill"}
    assert all(entry["each"] > 0 for entry in seconds.values())
    assert seconds["distill"]["all"] == pytest.approx(6 * seconds["distill"]["each"])  # 3 steps, twice
    assert done.json["disk"]["teacher cache, at most"] == 6 * 32 * 64 * 2
    assert done.json["disk_bytes"] == sum(done.json["disk"].values())
    assert command("estimate", *settings, "--no-probe", "--json").json["seconds"] == {}
