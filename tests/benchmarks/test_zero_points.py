"""The benchmark of zero points tries the package's own sets, and finds the least error there is."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import _results, zero_points
from bitdistiller_peft.grids import get_grid
from bitdistiller_peft.quantizers import zero_of
from tests.quantizers.samples import normal
from tests.standin import english, save_standin


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_quarters_are_those_of_the_grid(bits: int) -> None:
    grid = get_grid("int_fine", bits)
    assert zero_points.sets_of(bits)["quarters"] == zero_of(torch.arange(grid.num_levels), grid).tolist()


def test_the_least_error_is_found_group_by_group() -> None:
    weight, inputs = normal(3, 5, 8), normal(3, 40, 8, seed=1)
    gram = inputs.transpose(1, 2) @ inputs
    together = zero_points.errors_of(weight, gram, 2, [1.0, 1.5])
    apart = [zero_points.errors_of(weight, gram, 2, [zero]) for zero in (1.0, 1.5)]
    assert torch.equal(together, torch.minimum(*apart))
    # one group by hand
    best = min(
        float((((row / scale + zero).round().clamp(0, 3) - zero) * scale - row) @ gram[0] @ (
            ((row / scale + zero).round().clamp(0, 3) - zero) * scale - row
        ))
        for row in [weight[0, 0]]
        for zero in (1.0, 1.5)
        for factor in zero_points.SCALES
        for scale in [(max(max(row.max(), 0) / (3 - zero), -min(row.min(), 0) / zero) * factor).half().float()]
    )  # fmt: skip
    assert float(together[0, 0]) == pytest.approx(best, rel=1e-4)


def test_larger_sets_err_less_and_say_what_they_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_results, "RESULTS", tmp_path / "results")
    save_standin(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n\n".join(english()[:4]))
    monkeypatch.setattr(zero_points, "GROUP", 32)
    arguments = ["--model", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt"), "--tokens", "512"]
    monkeypatch.setattr(sys, "argv", ["zero_points", *arguments, "--bits", "2"])
    zero_points.main()
    written = json.loads((tmp_path / "results" / "zero_points.cpu.json").read_text())
    rows = {row["zero points"]: row for row in written["rows"]}
    assert rows["every quarter"]["relative_error"] <= min(
        rows[name]["relative_error"] for name in ("integers", "halves")
    )
    assert rows["quarters"]["bits_more"] == rows["integers"]["bits_more"] == 0 < rows["every quarter"]["bits_more"]
    ratio = rows["quarters"]["relative_error"] / rows["integers"]["relative_error"]
    assert written["figures"]["2bit_quarters"]["value"] == pytest.approx(ratio)
