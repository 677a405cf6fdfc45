"""`examples/distill_2bit.py` runs from end to end, on a text and on the teacher's own words."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from examples import distill_2bit
from tests import standin
from tests.training import helpers  # noqa: F401  plugs in


@pytest.mark.slow
@pytest.mark.parametrize("source", ["text", "teacher"])
def test_the_example_ends_with_a_packed_model(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = standin.save_standin(tmp_path / "model")
    command = ["distill_2bit.py", "--model", str(model), "--output", str(tmp_path / "out"), "--steps", "2"]
    if source == "text":
        (tmp_path / "text.txt").write_text("\n\n".join(standin.english()[:20]))
        command += ["--text", str(tmp_path / "text.txt")]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(distill_2bit, "NEW_TOKENS", 96)
    distill_2bit.main()
    assert "2 bits:" in capsys.readouterr().out
    assert (tmp_path / "out" / "packed" / "bitdistiller.json").exists()
