"""The notebooks run from the first cell to the last, at small scale, and are kept without outputs.

A cell is run as a block of the documentation is: in this process, in one namespace. nbclient would start a kernel, with
sockets and a process that the guard of the tests does not watch, to run the same statements.
"""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tests.standin import save_standin

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples" / "notebooks").glob("*.ipynb"))
HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


@each_notebook
def test_a_notebook_runs_from_top_to_bottom(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NOTEBOOK_SMALL", "1")
    monkeypatch.setenv("DRY_RUN", "1")
    save_standin(tmp_path / HUB_MODEL)  # a folder of that name is found before the Hub is asked
    module = types.ModuleType(f"notebook_{path.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for number, cell in enumerate(cells(path)):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), module.__dict__)
    printed = capsys.readouterr().out
    assert ("dry run: nothing was uploaded" if path.stem == "gpu_recipe" else "distilled") in printed


@each_notebook
def test_a_notebook_is_kept_as_it_was_written(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in content["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
            assert not re.search(r"^\s*[%!]", "".join(cell["source"]), re.MULTILINE), "plain Python only"
    assert content["cells"][0]["cell_type"] == "markdown"


def test_there_is_a_tour_for_the_cpu_and_a_recipe_for_the_gpu() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["cpu_tour", "gpu_recipe"]
