"""A small mutation test of the packing, and the script that judges the large one (`make mutation`)."""

from __future__ import annotations

import ast
import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bitdistiller_peft.errors import CheckpointError
from bitdistiller_peft.packing import base3, bitstream
from tests.trust import mutants

SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult}
SWAPS |= {ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}
SWAPS |= {ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.And: ast.Or}


def changed(tree: ast.Module) -> Iterator[ast.Module]:
    """Every tree with one operator swapped or one integer one larger, inside the functions, not inside messages."""
    count = sum(1 for _ in sites(tree))
    for index in range(count):
        copied = copy.deepcopy(tree)
        list(sites(copied))[index]()
        yield copied


def sites(tree: ast.Module) -> Iterator[Callable[[], None]]:
    """What can be changed, each as a call that does it."""
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        texts = {id(part) for node in ast.walk(function) if isinstance(node, ast.Raise) for part in ast.walk(node)}
        for node in ast.walk(function):
            if id(node) in texts:
                continue
            if isinstance(node, ast.Constant) and type(node.value) is int:
                yield lambda node=node: setattr(node, "value", node.value + 1)
            if type(getattr(node, "op", None)) in SWAPS:
                yield lambda node=node: setattr(node, "op", SWAPS[type(node.op)]())
            if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
                yield lambda node=node: node.ops.__setitem__(0, SWAPS[type(node.ops[0])]())


def numbers(words: torch.Tensor, bits: int, count: int) -> list[list[int]]:
    """Codes by arithmetic on Python integers."""
    rows = []
    for row in words.tolist():
        stream = sum((word % 2**32) << (32 * i) for i, word in enumerate(row))
        rows.append([(stream >> (bits * i)) % 2**bits for i in range(count)])
    return rows


def is_refused(call: Callable[..., None], *args: object) -> bool:
    try:
        call(*args)
    except CheckpointError:
        return True
    return False


def check_bitstream(module: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    for bits in (1, 2, 3, 4, 5, 8):
        for count in (1, 31, 32, 33, 64, 107):
            codes = torch.randint(0, 2**bits, (2, count), generator=generator)
            words = module.pack_codes(codes, bits)
            assert words.shape == (2, -(-count * bits // 32)) == (2, module.num_words(count, bits))
            assert numbers(words, bits, count) == codes.tolist() == module.unpack_codes(words, bits, count).tolist()
            module.check_tail(words, bits, count)
            if used := count * bits % 32:
                words[1, -1] ^= torch.tensor(1 << used if used < 31 else -(1 << 31), dtype=torch.int32)
                assert is_refused(module.check_tail, words, bits, count)


def check_base3(module: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (1, 4, 5, 19, 20, 21, 40, 77):
        codes = torch.randint(0, 3, (2, count), generator=generator)
        words = module.pack_base3(codes)
        assert words.shape == (2, -(-count // 20)) == (2, module.num_words_base3(count))
        in_bytes = numbers(words, 8, words.shape[-1] * 4)
        digits = [[byte // 3**i % 3 for byte in row for i in range(5)] for row in in_bytes]
        assert [row[:count] for row in digits] == codes.tolist() == module.unpack_base3(words, count).tolist()
        module.check_base3(words, count)
        assert is_refused(module.check_base3, torch.full_like(words, 243), count)
        if count % 20:
            longer = torch.cat([codes, torch.ones_like(codes[:, :1])], 1)
            assert is_refused(module.check_base3, module.pack_base3(longer), count)


@pytest.mark.parametrize(
    ("module", "check"), [(bitstream, check_bitstream), (base3, check_base3)], ids=["bits", "base3"]
)
def test_changed_packing_is_noticed(module: ModuleType, check: Callable[[ModuleType], None]) -> None:
    tree = ast.parse(Path(str(module.__file__)).read_text())
    noticed, alive = 0, []
    for mutant in [tree, *changed(tree)]:
        made = ModuleType(module.__name__)
        try:
            exec(compile(ast.fix_missing_locations(mutant), "mutant", "exec"), made.__dict__)
            check(made)
        except Exception:  # noqa: BLE001  (a mutant may raise anything)
            noticed += 1
        else:
            alive.append(ast.unparse(mutant))
    assert alive[0] == ast.unparse(tree), "the original must pass"
    assert noticed > 15
    assert noticed / (noticed + len(alive) - 1) >= 0.8, alive[1:]


MUTATED = """
def x_f__mutmut_orig(a):
    if a < 0:
        raise ValueError("negative")
    return torch.zeros(a, device=a.device) + 1

def x_f__mutmut_1(a):
    if a < 0:
        raise ValueError("XXnegativeXX")
    return torch.zeros(a, device=a.device) + 1

def x_f__mutmut_2(a):
    if a < 0:
        raise ValueError("negative")
    return torch.zeros(a, device=None) + 1

def x_f__mutmut_3(a):
    if a < 0:
        raise ValueError("negative")
    return torch.zeros(a, device=a.device) + 2

def x_f__mutmut_4(a):
    if a <= 0:
        raise ValueError("negative")
    return torch.zeros(a, device=a.device) + 1
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    part = tmp_path / "bitdistiller_peft" / "packing"
    part.mkdir(parents=True)
    (part / "f.py").write_text(MUTATED)
    return part


def verdicts(part: Path, **codes: int | None) -> Path:
    named = {f"bitdistiller_peft.packing.f.x_f__mutmut_{name[1:]}": code for name, code in codes.items()}
    (part / "f.py.meta").write_text(json.dumps({"exit_code_by_key": named}))
    return part.parent


def test_survivors_are_told_apart(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reasons = tmp_path / "reasons.json"
    why = "zero is refused one call before"
    reasons.write_text(json.dumps({"x_f: - if a < 0:\n+ if a <= 0:": why}))
    status = mutants.report(verdicts(folder, m1=0, m2=0, m3=33, m4=0), reasons)
    printed = capsys.readouterr().out
    assert status == 1
    assert "0 of      4 noticed: 0.0%" in printed
    for reason in (mutants.MESSAGE, mutants.DEVICE, why):
        assert f"     1 survivors: {reason}" in printed
    assert printed.endswith(
        "     1 survivors without a reason\nbitdistiller_peft.packing.f.x_f__mutmut_3\n"
        "- return torch.zeros(a, device=a.device) + 1\n+ return torch.zeros(a, device=a.device) + 2\n"
    )


def test_four_of_five_are_enough_and_those_not_tried_do_not_count(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "reasons.json").write_text("{}")
    judge = lambda **codes: mutants.report(verdicts(folder, **codes), tmp_path / "reasons.json")  # noqa: E731
    assert judge(m1=1, m2=1, m3=36, m4=1) == 0
    assert judge(m1=1, m2=1, m3=1, m4=0) == 1
    assert judge(m1=1, m2=None, m3=None, m4=None) == 0
    assert judge(m1=None, m2=None, m3=None, m4=None) == 1


PLAIN = """
import os, time

mutant = os.environ["MUTANT_UNDER_TEST"][-1:]
assert mutant != "5"

def test_it():
    if mutant == "3":
        time.sleep(60)
    assert mutant != "1"
"""


def test_what_mutmut_did_not_judge_is_tried_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mutants, "PATIENCE", 10)
    package = verdicts(folder, m1=255, m2=36, m3=-24, m4=1, m5=255)
    meta = folder / "f.py.meta"
    content = json.loads(meta.read_text())
    content["exit_code_by_key"]["bitdistiller_peft.packing.f.x_g__mutmut_6"] = 255
    meta.write_text(json.dumps(content))
    (tmp_path / "test_f.py").write_text(PLAIN)
    stats = {"tests_by_mangled_function_name": {"bitdistiller_peft.packing.f.x_f": ["test_f.py::test_it"]}}
    stats["tests_by_mangled_function_name"]["bitdistiller_peft.packing.f.x_g"] = [
        "test_f.py::test_that"
    ]  # not there: no verdict
    (tmp_path / "mutmut-stats.json").write_text(json.dumps(stats))
    mutants.retry(package)
    found = {mutant.name[-1]: mutant.exit_code for mutant in mutants.mutants(package)}
    assert found == {"1": 1, "2": 0, "3": mutants.TIMED_OUT, "4": 1, "5": 1, "6": mutants.NOT_RUN}


def test_a_sample_is_the_same_for_the_same_seed() -> None:
    names = [f"m{i}" for i in range(100)]
    assert mutants.sample(names, 10, 1) == mutants.sample(names[::-1], 10, 1) != mutants.sample(names, 10, 2)
    assert mutants.sample(names, 1000, 1) == sorted(names)
