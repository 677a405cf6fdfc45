"""Programs that a model writes, run and judged: the metric of HumanEval and MBPP, without a network.

lm-evaluation-harness fetches this metric, a program, from the Hub, and runs the model's programs beside the caller's
secrets. Here each program gets a Python process of its own: an empty environment, an empty folder that is then
deleted, no input, and limits of time, memory, file size. That keeps a clumsy program from doing harm, not a hostile
one: use a container.
"""

from __future__ import annotations

import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

SECONDS = 3.0
"""What a program may take, as in HumanEval (Chen et al. 2021, section 2.3); of the processor, where that is counted."""

PATIENCE = 10
"""Times as long by the clock, for programs that wait; else a busy machine would fail programs that are right."""

MEMORY = 4 << 30
"""Bytes of address space of a program."""

NAME = "code_eval"

_CHILD = f"""
import os, sys
word = sys.stdin.readline()
seconds = int(sys.stdin.readline())
source = sys.stdin.read()
try:
    import resource
    for kind, most in ((resource.RLIMIT_AS, {MEMORY}), (resource.RLIMIT_FSIZE, 1 << 20), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(kind, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
except ImportError:
    pass
out = os.fdopen(os.dup(1), "w")  # of this process alone; what the program starts has no way to answer
nowhere = open(os.devnull, "r+")
for number in range(3):
    os.dup2(nowhere.fileno(), number)
sys.stdin = sys.stdout = sys.stderr = nowhere
try:
    exec(compile(source, "<program>", "exec"), {{"__name__": "__main__"}})
except BaseException as error:
    out.write(f"failed: {{type(error).__name__}}: {{error}}"[:200])
else:
    out.write(word)
out.flush()
"""


def run_program(source: str, *, seconds: float = SECONDS) -> str:
    """Run a program to its end.

    Args:
        source: Python; with its checks, which raise where something is wrong.
        seconds: what it may take of the processor, in whole seconds, the start of Python included; by the clock,
            `PATIENCE` times as long.

    Returns:
        ``"passed"``, ``"timed out"``, or ``"failed: "`` and why. A program that leaves before its end has failed,
        whatever its exit code.
    """
    word = secrets.token_hex(16)  # what only a run to the end gives back
    with tempfile.TemporaryDirectory() as folder:
        child = subprocess.Popen(
            [sys.executable, "-I", "-c", _CHILD],
            cwd=folder,
            env={"PATH": os.defpath, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            given = f"{word}\n{math.ceil(seconds)}\n{source}".encode(errors="replace")
            said, _ = child.communicate(given, timeout=PATIENCE * seconds)
        except subprocess.TimeoutExpired:
            return "timed out"
        finally:
            _end(child)
    if hasattr(signal, "SIGXCPU") and child.returncode == -signal.SIGXCPU:
        return "timed out"
    text = said.decode(errors="replace").strip()
    if text == word:
        return "passed"
    return text if text.startswith("failed: ") else f"failed: it left with exit code {child.returncode}"


def _end(child: subprocess.Popen[bytes]) -> None:
    """The program and what it started."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError):
            os.killpg(child.pid, 9)
    child.kill()
    child.communicate()


def estimate_pass(total: int, passed: int, k: int) -> float:
    """Chance that at least one of `k` answers is right, without bias (Chen et al. 2021, equation 1).

    Args:
        total: answers that were run.
        passed: how many of them were right.
        k: answers that one may give; at most `total`.
    """
    return 1.0 - math.comb(total - passed, k) / math.comb(total, k)


class ProgramMetric:
    """What `evaluate.load("code_eval")` gives, as lm-eval's tasks use it."""

    def compute(
        self,
        *,
        references: Sequence[str],
        predictions: Sequence[Sequence[str]],
        k: Sequence[int] = (1, 10, 100),
        num_workers: int = 4,
        timeout: float = SECONDS,
    ) -> tuple[dict[str, Any], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """Run every answer with its checks.

        Args:
            references: the checks of each problem, as a program.
            predictions: answers to each problem, as programs.
            k: how many answers one may give; those above the number of answers are left out.
            num_workers: programs at once.
            timeout: seconds of each.

        Returns:
            ``pass@k`` by name, the mean over problems; and what became of every answer, by problem.
        """
        with ThreadPoolExecutor(num_workers) as pool:
            results = [
                list(pool.map(lambda answer: run_program(answer, seconds=timeout), [f"{a}\n{checks}" for a in answers]))
                for answers, checks in zip(predictions, references, strict=True)
            ]
        fewest = min(map(len, results), default=0)
        scores = {
            f"pass@{each}": np.mean([estimate_pass(len(r), r.count("passed"), each) for r in results])
            for each in k
            if each <= fewest
        }
        found = {
            task: [(i, {"passed": said == "passed", "result": said}) for i, said in enumerate(row)]
            for task, row in enumerate(results)
        }
        return scores, found


@contextmanager
def own_metric() -> Iterator[None]:
    """Give lm-eval's tasks this metric where they ask for `code_eval`; nothing is fetched then."""
    import evaluate

    load = evaluate.load

    def find(path: str, *arguments: Any, **named: Any) -> Any:
        return ProgramMetric() if path == NAME else load(path, *arguments, **named)

    evaluate.load = find
    try:
        yield
    finally:
        evaluate.load = load
