"""What runs a model's programs: it tells right from wrong, and neither leaks nor hangs nor believes an early exit."""

from __future__ import annotations

import itertools
import math
import os
import time
from pathlib import Path

import pytest

from bitdistiller_peft.evaluation.programs import ProgramMetric, estimate_pass, run_program

WAIT = 60.0  # a busy machine starts Python slowly


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def add(a, b): return a + b\nassert add(1, 2) == 3", "passed"),
        ("print('noise')\nimport sys\nsys.stderr.write('noise')", "passed"),
        ("assert 1 == 2", "failed: AssertionError"),
        ("this is no program", "failed: SyntaxError"),
        ("import sys\nsys.exit(0)", "failed: SystemExit"),
        ("import os\nos._exit(0)", "failed: it left with exit code 0"),
        ("import os\nos.write(1, b'passed')\nos._exit(0)", "failed: it left with exit code 0"),
        ("input()", "failed: EOFError"),
        ("x = bytearray(1 << 40)", "failed: MemoryError"),
        ("open('large', 'wb').write(bytes(2 << 20))", "failed: OSError"),
    ],
    ids=["right", "noise", "wrong", "syntax", "exit", "leaves", "lies", "input", "memory", "file"],
)
def test_a_program_passes_if_it_runs_to_its_end(source: str, said: str) -> None:
    found = run_program(source, seconds=WAIT)
    assert found.startswith(said)


def test_a_program_that_does_not_end_is_ended_and_so_is_what_it_started(tmp_path: Path) -> None:
    mark = tmp_path / "still-there"
    grandchild = f"import time; time.sleep(4); open({str(mark)!r}, 'w').write('x')"
    source = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {grandchild!r}])\nwhile True: pass"
    assert run_program(source, seconds=2.0) == "timed out"
    time.sleep(4)
    assert not mark.exists()


def test_a_program_sees_no_secrets_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.chdir(tmp_path)
    source = "import os\nassert 'HF_TOKEN' not in os.environ\nassert not os.listdir()\nopen('left', 'w').write('x')"
    assert run_program(source, seconds=WAIT) == "passed"
    assert not os.listdir(tmp_path)  # noqa: PTH208


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_estimate_is_the_share_of_draws_with_a_right_one(k: int) -> None:
    answers = [True, False, False, True, False]
    draws = list(itertools.combinations(answers, k))
    expected = sum(map(any, draws)) / len(draws)
    assert math.isclose(estimate_pass(5, 2, k), expected)


def test_the_metric_is_the_mean_over_problems() -> None:
    checks = ["assert f() == 1", "assert f() == 2"]
    answers = [["def f(): return 1", "def f(): return 0"], ["def f(): return 2", "def f(): return 2"]]
    scores, found = ProgramMetric().compute(references=checks, predictions=answers, k=[1, 2, 10], timeout=WAIT)
    assert scores == {"pass@1": 0.75, "pass@2": 1.0}  # 10 answers of 2 cannot be drawn
    assert [entry["passed"] for _, entry in found[0]] == [True, False]
    assert found[0][1][1]["result"] == "failed: AssertionError:"
