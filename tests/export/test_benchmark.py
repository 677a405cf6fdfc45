"""The benchmark exports, damages and serves, and writes what it saw."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import _results, export


def test_the_benchmark_runs_and_writes_what_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_results, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["export", "--formats", "bitnet", "dequantized", "--nibbles", "2"])
    export.main()
    written = json.loads((tmp_path / "export.cpu.json").read_text())
    assert [row["format"] for row in written["rows"]] == ["bitnet", "dequantized", "dequantized"]
    figures = written["figures"]
    assert figures["formats_that_hold_the_model"]["value"] == 1
    assert figures["nibbles_missed"] == {"value": 0, "asked": {"max": 0}, "unit": "nibbles"}
    assert figures["dequantized_in_transformers_equal_tokens"]["value"] == export.TOKENS


def test_the_first_different_token_is_weighed_against_the_noise_before_it() -> None:
    ours = export.Generation([5, 6, 7], [-1.0, -1.0, -1.0], [-2.0, -2.0, -1.1])
    theirs = export.Generation([5, 6, 8], [-1.0, -1.2, -1.0], [-2.0, -2.0, -2.0])
    found = export.compare(ours, theirs)
    assert found["equal tokens"] == 2
    assert found["noise"] == pytest.approx(0.2)
    assert found["gap"] == pytest.approx(0.1)
