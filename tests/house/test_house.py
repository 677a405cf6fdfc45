"""The house rules hold: nothing dangerous in the package, nothing overlong, nothing undocumented."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import bitdistiller_peft

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "bitdistiller_peft"
FILES = sorted(PACKAGE.rglob("*.py"))

MAX_FILE_LINES = 400
MAX_BODY_LINES = 60
MAY_PRINT = {"print_quant_summary"}  # module-level functions whose purpose is to print
CODE_LOADERS = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef

each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def dotted(node: ast.expr) -> str:
    """The name as written, `torch.serialization.load`, or `""` for what is not a plain chain of names."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=attr) if dotted(value):
            return f"{dotted(value)}.{attr}"
    return ""


def imported(node: ast.AST) -> list[str]:
    """Every module or name that this statement imports, dotted."""
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=str(module), names=names, level=0):
            return [module, *(f"{module}.{alias.name}" for alias in names)]
    return []


def dangers(tree: ast.Module) -> Iterator[str]:
    """Every way to let data choose what code runs, as `line: what`."""
    for node in ast.walk(tree):
        for name in imported(node):
            if name.partition(".")[0] in CODE_LOADERS or name in {"torch.load", "torch.serialization.load"}:
                yield f"{node.lineno}: imports {name}"  # type: ignore[attr-defined]
        match node:
            case ast.Call(func=ast.Name(id="eval" | "exec" as name)):
                yield f"{node.lineno}: calls {name}()"
            case ast.Attribute() if dotted(node) in {"torch.load", "torch.serialization.load"}:
                yield f"{node.lineno}: uses {dotted(node)}"
            case ast.Attribute() if dotted(node) in {"builtins.eval", "builtins.exec"}:
                yield f"{node.lineno}: uses {dotted(node)}"
            case ast.Constant(value=str(text)) if text == "trust_remote_code" or text in CODE_LOADERS:
                yield f"{node.lineno}: names {text!r}"
            case ast.keyword(arg="trust_remote_code") | ast.arg(arg="trust_remote_code"):
                yield f"{node.lineno}: takes or passes trust_remote_code"
            case ast.Name(id="trust_remote_code") | ast.Attribute(attr="trust_remote_code"):
                yield f"{node.lineno}: uses trust_remote_code"
            case ast.keyword(arg="allow_pickle", value=value) if not (
                isinstance(value, ast.Constant) and value.value is False
            ):
                yield f"{node.lineno}: allows pickle"


@each_file
def test_no_file_lets_data_choose_what_code_runs(file: Path) -> None:
    assert not list(dangers(tree_of(file)))


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from dill import loads",
        "importlib.import_module('pickle')",
        "eval('1')",
        "exec('x = 1')",
        "import builtins\nbuiltins.exec('x = 1')",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "load_model(name, trust_remote_code=False)",
        "def load_model(name, *, trust_remote_code): ...",
        "options = {'trust_remote_code': True}",
        "np.load('x', allow_pickle=True)",
    ],
)
def test_the_danger_test_sees(code: str) -> None:
    assert list(dangers(ast.parse(code)))


def test_the_danger_test_lets_harmless_code_pass() -> None:
    code = (
        '"""Never a pickle."""\nmodel.eval()\nloader.exec_module(module)\nsafe.load(x)\nnp.load(x, allow_pickle=False)'
    )
    assert not list(dangers(ast.parse(code)))


@each_file
def test_nothing_prints_but_what_is_there_to_print(file: Path) -> None:
    def prints(node: ast.AST) -> list[int]:
        return [
            inner.lineno
            for inner in ast.walk(node)
            if isinstance(inner, ast.Name) and inner.id == "print" and isinstance(inner.ctx, ast.Load)
        ]

    offenders = [
        line
        for statement in tree_of(file).body
        if not (isinstance(statement, Function) and statement.name in MAY_PRINT)
        for line in prints(statement)
    ]
    assert not offenders, f"print on lines {offenders}; use logging.getLogger(__name__)"


@each_file
def test_nothing_asserts(file: Path) -> None:
    offenders = [node.lineno for node in ast.walk(tree_of(file)) if isinstance(node, ast.Assert)]
    assert not offenders, f"assert on lines {offenders}; raise an error of errors.py"


@each_file
def test_no_file_is_too_long(file: Path) -> None:
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE_LINES, f"{lines} lines, at most {MAX_FILE_LINES}"


@each_file
def test_no_function_body_is_too_long(file: Path) -> None:
    def length(function: Function) -> int:
        body = function.body[1:] if ast.get_docstring(function) is not None else function.body
        return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0

    functions = [node for node in ast.walk(tree_of(file)) if isinstance(node, Function)]
    too_long = [f"{node.lineno}: {node.name}, {length(node)}" for node in functions if length(node) > MAX_BODY_LINES]
    assert not too_long, f"at most {MAX_BODY_LINES} lines without the docstring: {too_long}"


def public_definitions(node: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[tuple[str, Definition]]:
    for child in node.body:
        if isinstance(child, Definition) and not child.name.startswith("_"):
            if {dotted(decorator).rpartition(".")[2] for decorator in child.decorator_list} & {"overload", "setter"}:
                continue  # documented by its implementation, its getter
            yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from public_definitions(child, f"{prefix}{child.name}.")


@each_file
def test_every_public_name_has_a_docstring(file: Path) -> None:
    tree = tree_of(file)
    silent = [name for name, node in public_definitions(tree) if not ast.get_docstring(node)]
    if not ast.get_docstring(tree):
        silent.insert(0, "the module itself")
    assert not silent, f"no docstring: {silent}"


@pytest.mark.parametrize("name", getattr(bitdistiller_peft, "__all__", []))
def test_every_exported_name_exists_and_is_documented(name: str) -> None:
    value = getattr(bitdistiller_peft, name)
    if inspect.isroutine(value) or inspect.isclass(value):
        assert inspect.getdoc(value), f"{name} has no docstring"


def test_changelog_begins_with_the_version_of_the_package() -> None:
    top = re.search(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert top is not None
    assert declared is not None
    assert top[1] == declared[1] == importlib.metadata.version("bitdistiller_peft")
    assert getattr(bitdistiller_peft, "__version__", declared[1]) == declared[1]
