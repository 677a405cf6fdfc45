"""What became of mutmut's mutants: the score, and the survivors with a reason for each.

    python tests/trust/mutants.py report            after `make mutation`; status 1 below 80 %
    python tests/trust/mutants.py sample 300 7      names of 300 mutants, drawn with seed 7, one a line
    python tests/trust/mutants.py retry             those that mutmut did not judge, or found slow, with plain pytest

Mutants that no test runs count as survivors, and so do those whose run failed. Some are recognised by comparing syntax
trees: they only change the text of a message, or where a tensor is made, which a machine without an accelerator cannot
see, or count an axis from the front. The others need an entry in `survivors.json`.
"""

from __future__ import annotations

import ast
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

FOLDER = Path("mutants/bitdistiller_peft")
REASONS = Path(__file__).with_name("survivors.json")
ASKED = 0.8
SURVIVED, NO_TEST, NOT_RUN = 0, 33, 255
TIMED_OUT, OUT_OF_TIME = 36, (36, 24, -24, 152)  # on a busy machine that says nothing: such mutants are tried again
PATIENCE = 900  # seconds; tests that take longer hang, and a mutant that makes them hang is noticed
MESSAGE = "only the text of a message differs"
DEVICE = "only the device differs, and there is only one"
AXIS = "the axis is counted from the front, and there are two"


class Mutant(NamedTuple):
    """A mutant and what became of it."""

    name: str
    source: Path
    exit_code: int | None

    @property
    def is_alive(self) -> bool:
        """Whether no test has noticed it."""
        return self.exit_code in (SURVIVED, NO_TEST, NOT_RUN)


def mutants(folder: Path = FOLDER) -> Iterator[Mutant]:
    """All mutants, those that were not tried included (their exit code is None)."""
    for meta in sorted(folder.rglob("*.meta")):
        for name, code in json.loads(meta.read_text())["exit_code_by_key"].items():
            yield Mutant(name, meta.with_suffix(""), code)


def sample(names: list[str], count: int, seed: int) -> list[str]:
    """Some of the mutants, the same ones for the same seed."""
    return sorted(random.Random(seed).sample(sorted(names), min(count, len(names))))


def retry(folder: Path = FOLDER) -> None:
    """Run the mutants that mutmut did not get to run, or to its end, with plain pytest; write down what became of them.

    mutmut's worker ends with 255 where anything is raised in it, as often happens when `pytest.raises` sees no error.
    """
    tests = json.loads((folder.parent / "mutmut-stats.json").read_text())["tests_by_mangled_function_name"]
    for mutant in [found for found in mutants(folder) if found.exit_code in (NOT_RUN, *OUT_OF_TIME)]:
        code = _run(mutant, tests[mutant.name.rpartition("__mutmut_")[0]], folder.parent)
        print(code, mutant.name, flush=True)
        meta = mutant.source.with_name(f"{mutant.source.name}.meta")
        content = json.loads(meta.read_text())
        content["exit_code_by_key"][mutant.name] = code if code in (SURVIVED, 1, TIMED_OUT) else NOT_RUN
        meta.write_text(json.dumps(content))


def _run(mutant: Mutant, tests: list[str], folder: Path) -> int:
    """Pytest's status, that of a mutant that hangs, or 1 where only the mutant keeps tests from being collected."""
    try:
        code = _pytest(mutant.name, tests, folder)
    except subprocess.TimeoutExpired:
        return TIMED_OUT
    is_broken = code not in (0, 1) and _pytest("", ["--collect-only", *tests], folder) == 0
    return 1 if is_broken else code


def _pytest(name: str, arguments: list[str], folder: Path) -> int:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:xdist", *arguments]
    environment = os.environ | {"MUTANT_UNDER_TEST": name}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=PATIENCE).returncode


# ------------------------------------------------------------------------------------------------------------ reasons


class _Neutral(ast.NodeTransformer):
    """Takes out of a tree what may differ: messages, devices, or from where an axis is counted."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return ast.Raise(exc=ast.Constant("raised"), cause=None) if self.kind == MESSAGE else self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        is_prose = isinstance(node.value, str) and " " in node.value
        return ast.Constant("prose") if self.kind == MESSAGE and is_prose else node

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        return node.operand if self.kind == AXIS and ast.unparse(node) in ("-1", "+1") else self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if self.kind == DEVICE:
            node.keywords = [keyword for keyword in node.keywords if keyword.arg != "device"]
        return self.generic_visit(node)


def bodies(source: str) -> dict[str, ast.FunctionDef]:
    """The functions of a mutated file, mutants and originals, by name."""
    found = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
    return {node.name: node for node in found if "__mutmut_" in node.name}


def _seen(function: ast.FunctionDef, kind: str) -> str:
    tree = ast.parse(ast.unparse(function))
    body = _Neutral(kind).visit(tree).body[0].body
    return ast.unparse(ast.Module(body=body, type_ignores=[]))


def difference(name: str, functions: dict[str, ast.FunctionDef]) -> str:
    """The lines that differ from the original, `- ` and `+ `."""
    own, base = (_lines(functions[key]) for key in (name, original_of(name)))
    gone, come = [line for line in base if line not in own], [line for line in own if line not in base]
    return "\n".join([f"- {line.strip()}" for line in gone] + [f"+ {line.strip()}" for line in come])


def _lines(function: ast.FunctionDef) -> list[str]:
    """Of the function, without the one that has its name."""
    return [line for line in ast.unparse(function).splitlines() if not line.startswith("def ")]


def original_of(name: str) -> str:
    """The name of a mutant's original."""
    return f"{name.rpartition('__mutmut_')[0]}__mutmut_orig"


def reason_of(name: str, functions: dict[str, ast.FunctionDef], known: dict[str, str]) -> str | None:
    """Why a survivor may live, or None.

    Args:
        name: the function's name in the mutated file.
        functions: from `bodies`.
        known: reasons by `function: difference`.
    """
    for kind in (MESSAGE, DEVICE, AXIS):
        if _seen(functions[name], kind) == _seen(functions[original_of(name)], kind):
            return kind
    return known.get(f"{name.rpartition('__mutmut_')[0]}: {difference(name, functions)}")


# ------------------------------------------------------------------------------------------------------------- report


def report(folder: Path = FOLDER, reasons: Path = REASONS) -> int:
    """Print the score by part, and the survivors; 1 where less than asked was noticed."""
    known: dict[str, str] = json.loads(reasons.read_text())
    tried = [mutant for mutant in mutants(folder) if mutant.exit_code is not None]
    parts: dict[str, list[Mutant]] = {}
    for mutant in tried:
        parts.setdefault(mutant.source.parent.name, []).append(mutant)
    explained, open_ones = Counter[str](), []
    for source in sorted({mutant.source for mutant in tried if mutant.is_alive}):
        functions = bodies(source.read_text())
        for mutant in (m for m in tried if m.source == source and m.is_alive):
            name = mutant.name.rpartition(".")[2]
            reason = reason_of(name, functions, known)
            if reason is None:
                open_ones.append(f"{mutant.name}\n{difference(name, functions)}")
            else:
                explained[reason] += 1
    for part, members in sorted({**parts, "all": tried}.items()):
        dead = sum(not member.is_alive for member in members)
        print(f"{part:12} {dead:6} of {len(members):6} noticed: {dead / max(1, len(members)):.1%}")
    print(*(f"{count:6} survivors: {reason}" for reason, count in explained.most_common()), sep="\n")
    print(f"{len(open_ones):6} survivors without a reason", *open_ones, sep="\n")
    share = sum(not mutant.is_alive for mutant in tried) / max(1, len(tried))
    return 0 if tried and share >= ASKED else 1


if __name__ == "__main__":
    if sys.argv[1] == "sample":
        print(*sample([mutant.name for mutant in mutants()], int(sys.argv[2]), int(sys.argv[3])), sep="\n")
    elif sys.argv[1] == "retry":
        retry()
    else:
        sys.exit(report())
