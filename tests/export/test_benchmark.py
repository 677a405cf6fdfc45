"""The benchmark exports, damages and serves, writes what it saw, and goes on from there."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import _engines, _results, export


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own file of results, and engines that run in this process."""

    def serve(bench: export.Bench, engine: str, folder: Path, model: Path) -> dict[str, Any]:
        return _engines.serve(engine, folder, bench.request(model))

    monkeypatch.setattr(_results, "RESULTS", tmp_path)
    monkeypatch.setattr(export, "RESULTS", tmp_path)
    monkeypatch.setattr(export.Bench, "serve", serve)
    return tmp_path / "export.cpu.json"


def run(monkeypatch: pytest.MonkeyPatch, work: Path, *rows: str) -> None:
    monkeypatch.setattr(
        sys, "argv", ["export", "--work", str(work), "--nibbles", "2", "--chunks", "1", "--rows", *rows]
    )
    export.main()


def test_rows_are_served_written_and_not_run_again(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, tmp_path / "work", "dequantized", "bitnet")
    written = json.loads(results.read_text())
    assert [(row["row"], row["status"]) for row in written["rows"]] == [("dequantized", "served"), ("bitnet", "served")]
    figures = written["figures"]
    assert figures["nibbles_missed"] == {"value": 0, "asked": {"max": 0}, "unit": "nibbles"}
    assert figures["dequantized_in_transformers_equal_tokens"]["value"] == _engines.TOKENS
    assert figures["bitnet_in_transformers_perplexity_off"]["value"] < 3

    def refuse(bench: export.Bench, name: str) -> dict[str, Any]:
        return written["rows"][0] | {"row": name, "status": "refused"}

    monkeypatch.setattr(export.Bench, "row", refuse)
    run(monkeypatch, tmp_path / "work", "dequantized", "gptq")
    assert [row["status"] for row in json.loads(results.read_text())["rows"]] == ["served", "served", "refused"]


def test_an_engine_that_is_not_installed_is_named(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_engines.ENGINES, "GPTQModel", ("no-such-package", _engines.open_gptqmodel))
    run(monkeypatch, tmp_path / "work", "gptq")
    (row,) = json.loads(results.read_text())["rows"]
    assert row["status"].startswith("not installed: no-such-package; checked by")
    assert (row["caught"], row["of"]) == (2, 2)


def test_the_first_different_token_is_weighed_against_the_noise_of_the_text() -> None:
    ours = {
        "generation": {"ids": [5, 6, 7], "best": [-1.0] * 3, "second": [-2.0, -2.0, -1.1]},
        "scores": [[-2.0, -2.0]],
    }
    theirs = {**ours, "generation": {**ours["generation"], "ids": [5, 6, 8]}, "scores": [[-2.2, -2.2]]}
    found = export.compare(ours, theirs)
    assert found["equal tokens"] == 2
    assert found["noise"] == pytest.approx(0.2)
    assert found["gap"] == pytest.approx(0.1)
    assert found["ours"] == pytest.approx(math.exp(2))
    assert found["off %"] == pytest.approx(100 * math.expm1(0.2))
