"""The benchmark of methods writes row after row, goes on where it was stopped, and mixes no two questions."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import _results, methods
from tests.standin import english, save_standin

ARGUMENTS = ["--chunks", "2", "--samples", "2", "--seq-len", "64", "--bits", "3", "--methods", "rtn", "gptq"]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(_results, "RESULTS", tmp_path / "results")
    (tmp_path / "text.txt").write_text(english()[0], encoding="utf-8")
    model, text = save_standin(tmp_path / "model"), str(tmp_path / "text.txt")
    arguments = ["methods", "--model", str(model), "--calibration", text, "--text", text, *ARGUMENTS]
    monkeypatch.setattr(sys, "argv", arguments)
    return arguments


def test_rows_are_written_as_they_end_and_taken_up_again(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [*command, "--grids", "int"])
    methods.main()
    path = tmp_path / "results" / "methods.cpu.json"
    first = json.loads(path.read_text())
    assert [(row["method"], row["grid"]) for row in first["rows"]] == [("full", "-"), ("rtn", "int"), ("gptq", "int")]
    assert str(tmp_path) not in path.read_text()
    monkeypatch.setattr(sys, "argv", [*command, "--grids", "int", "int_sym"])
    monkeypatch.setattr(methods.Task, "row", lambda self, setting: {**setting, "perplexity": 7.0, "seconds": 0.0})
    methods.main()
    second = json.loads(path.read_text())
    assert second["rows"][:3] == first["rows"]
    assert [row["grid"] for row in second["rows"][3:]] == ["int_sym", "int_sym"]
    assert "int_sym" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*command, "--grids", "int", "--seq-len", "32"])
    with pytest.raises(SystemExit, match="another model, text or size"):
        methods.main()
    monkeypatch.setattr(sys, "argv", [*command, "--grids", "int", "--seq-len", "32", "--restart"])
    methods.main()
    assert [row["seq_len"] for row in json.loads(path.read_text())["rows"]] == [32] * 3


def test_figures_are_the_published_orderings() -> None:
    rows = [
        {"method": "rtn", "grid": grid, "bits": bits, "group": 64, "perplexity": score}
        for bits in (3, 4)
        for grid, score in (("nf", 10.0), ("nf_sym", 20.0), ("int", 5.0))
    ]
    found = methods.figures(rows)
    assert found["rtn_nf_over_nf_sym_3bit_g64"]["value"] == pytest.approx(0.6931, abs=1e-4)
    assert found["rtn_nf_over_int_3bit_g64"]["value"] < 0
    assert found["rtn_nf_over_int_3bit_g64"]["asked"] == {"min": 0.0}
    assert found["rtn_nf_over_int_4bit_g64"]["asked"] == {}
