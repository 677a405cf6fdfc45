"""`demo` takes the whole path offline, shows the commands that it runs, and what it claims is in its folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitdistiller_peft.cli.verbs import demo
from bitdistiller_peft.cli.verbs.demo import QUICK, Budget
from tests.cli.conftest import Command

LEAST = Budget(toy_steps=4, samples=2, prompts=4, new_tokens=4, steps=2, chunks=5)


@pytest.fixture(autouse=True)
def _least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "QUICK", LEAST)


def test_the_demo_shows_every_step_and_a_table(command: Command, tmp_path: Path) -> None:
    output = tmp_path / "demo"
    arguments = ["demo", "--quick", "--device", "cpu", "--output", output]
    done = command(*arguments)
    assert done.code == 0, done.err
    assert f"$ bitdistiller run -c {output / 'run.yaml'}" in done.out
    assert f"$ bitdistiller compare {output / 'teacher'}" in done.out
    assert "The teacher is a toy" in done.out
    for name in ("full precision", "rounded to 2 bits", "clip search", "distilled"):
        assert name in done.out
    packed = output / "run" / "distill" / "packed"
    assert command("verify", packed).code == 0

    again = command(*arguments, "--json")
    assert (again.code, "done before" in again.err) == (0, True)
    rows = again.json["rows"]
    assert [row["name"] for row in rows] == ["full precision", "rounded to 2 bits", "clip search", "distilled"]
    truth = command("inspect", packed, "--json").json
    assert rows[3]["bytes"] == truth["bytes"]
    assert rows[3]["bits"] == pytest.approx(truth["bits_per_weight"], abs=1e-4)
    assert rows[0]["bits"] == 32
    other = command("demo", "--device", "cpu", "--output", output)
    assert (other.code, "quick was 'True', is 'False'" in other.err) == (2, True)


@pytest.mark.slow
def test_the_quick_demo_shows_what_each_step_is_worth(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "QUICK", QUICK)
    done = command("demo", "--quick", "--device", "cpu", "--output", tmp_path / "demo", "--json")
    full, rounded, searched, distilled = (row["perplexity"] for row in done.json["rows"])
    assert full < distilled < searched < rounded


@pytest.mark.slow
def test_the_demo_takes_a_model_of_yours(command: Command, base: Path, tmp_path: Path) -> None:
    done = command("demo", "--quick", "--model", base, "--device", "cpu", "--output", tmp_path / "demo", "--json")
    assert done.code == 0, done.err
    assert "The teacher is a toy" not in done.err
    assert not (tmp_path / "demo" / "teacher").exists()
    assert Path(done.json["packed"], "config.json").is_file()


def test_a_dry_run_writes_nothing(command: Command, tmp_path: Path) -> None:
    done = command("demo", "--quick", "--output", tmp_path / "demo", "--dry-run")
    assert done.code == 0
    assert not (tmp_path / "demo").exists()
