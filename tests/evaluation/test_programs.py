"""What runs a model's programs: it tells right from wrong, and neither leaks nor hangs nor believes an early exit."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import os
import time
from pathlib import Path

import pytest

from bitdistiller_peft.evaluation import programs
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
    begun, mark = tmp_path / "begun", tmp_path / "still-there"
    grandchild = (
        f"import os, time\nparent = os.getppid()\nopen({str(begun)!r}, 'w').write('x')\n"
        f"while os.getppid() == parent: time.sleep(0.02)\ntime.sleep(1)\nopen({str(mark)!r}, 'w').write('x')"
    )
    source = (
        f"import os, subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {grandchild!r}])\n"
        f"while not os.path.exists({str(begun)!r}): time.sleep(0.02)\nwhile True: pass"
    )
    assert run_program(source, seconds=1.0) == "timed out"
    assert begun.exists()
    time.sleep(2)
    assert not mark.exists()


def test_a_program_that_only_waits_is_ended_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "PATIENCE", 1)
    assert run_program("import time\ntime.sleep(100)", seconds=0.5) == "timed out"


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


PROBLEMS = [  # in the form of HumanEval: what the model sees, an answer that is right, one that is wrong, and checks
    (
        'def largest(numbers):\n    """Largest of some numbers; None if there are none."""\n',
        "    return max(numbers, default=None)\n",
        "    return max(numbers)\n",
        "assert candidate([3, 1]) == 3\n    assert candidate([]) is None",
    ),
    (
        'from typing import List\n\n\ndef sums(numbers: List[int]) -> List[int]:\n    """Sums from the left."""\n',
        "    total, found = 0, []\n    for number in numbers:\n        total += number\n"
        "        found.append(total)\n\n    return found\n",
        "    return [sum(numbers)]\n",
        "assert candidate([1, 2, 3]) == [1, 3, 6]",
    ),
    (
        'def turned(text):\n    """The text backwards, in capitals."""\n',
        "    def twice(part):\n        return part.upper()\n\n    return twice(text)[::-1]\n",
        "    return text[::-1]\n",
        "import random\n    assert candidate('abß') == 'SSBA'",
    ),
]


@pytest.mark.parametrize(("is_right", "share"), [(True, 1.0), (False, 0.0)], ids=["canonical", "wrong"])
def test_canonical_solutions_pass_and_wrong_ones_fail(*, is_right: bool, share: float) -> None:
    """Put together as lm-eval's `humaneval` does: prompt and answer, then the checks and a call of them."""
    names = ["largest", "sums", "turned"]
    answers = [[prompt + (right if is_right else wrong)] for prompt, right, wrong, _ in PROBLEMS]
    checks = [
        f"\n\nMETADATA = {{}}\n\n\ndef check(candidate):\n    {body}\n\ncheck({name})"
        for name, (*_, body) in zip(names, PROBLEMS, strict=True)
    ]
    scores, found = ProgramMetric().compute(references=checks, predictions=answers, k=[1], timeout=WAIT)
    assert scores == {"pass@1": share}, found


@pytest.mark.slow
@pytest.mark.skipif("HUMANEVAL" not in os.environ, reason="HUMANEVAL names OpenAI's HumanEval.jsonl.gz")
def test_the_solutions_of_humaneval_itself_all_pass() -> None:
    with gzip.open(os.environ["HUMANEVAL"], "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    answers = [[row["prompt"] + row["canonical_solution"]] for row in rows]
    checks = [f"{row['test']}\ncheck({row['entry_point']})" for row in rows]
    scores, found = ProgramMetric().compute(references=checks, predictions=answers, k=[1], num_workers=2)
    assert (len(rows), scores) == (164, {"pass@1": 1.0}), found
