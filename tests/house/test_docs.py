"""Every Python block in the README and the docs runs, page by page, in order."""

from __future__ import annotations

import importlib
import re
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.standin import save_standin

HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]

FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<language>[\w+-]*)")
NO_RUN = re.compile(r"^\s*<!--\s*no-run\b:?(?P<reason>.*?)-->\s*$")


@dataclass(frozen=True)
class Block:
    """One fenced Python block, with the line its code begins on."""

    line: int
    code: str
    skip_reason: str | None


def python_blocks(text: str) -> list[Block]:
    blocks: list[Block] = []
    lines = text.splitlines()
    reason: str | None = None
    at = 0
    while at < len(lines):
        line = lines[at]
        at += 1
        if comment := NO_RUN.match(line):
            reason = comment["reason"].strip()
            continue
        if opening := FENCE.match(line):
            indent, first = len(opening["indent"]), at
            closing = re.compile(rf"\s*{opening['fence']}{opening['fence'][0]}*\s*$")
            while at < len(lines) and not closing.match(lines[at]):
                at += 1
            if opening["language"] == "python":
                code = "\n".join(content[indent:] for content in lines[first:at])
                blocks.append(Block(first + 1, code, reason))
            at += 1
        if line.strip():
            reason = None
    return blocks


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = python_blocks(page.read_text(encoding="utf-8"))
    unexplained = [block.line for block in blocks if block.skip_reason == ""]
    assert not unexplained, f"no-run without a reason before lines {unexplained}"

    # A real module, so that dataclasses, inspect and pickling by name work in a block as they do in a script.
    module = types.ModuleType("docs_" + re.sub(r"\W", "_", page.stem))
    module.__file__ = str(page)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    for registry, names in (("grids.registry", "_FACTORIES"), ("losses.registry", "_DIVERGENCES")):
        home = importlib.import_module(f"bitdistiller_peft.{registry}")
        monkeypatch.setattr(home, names, dict(getattr(home, names)))  # what a page registers is gone after it
    save_standin(tmp_path / HUB_MODEL)  # a folder of that name is found before the Hub is asked
    for block in blocks:
        if block.skip_reason is None:
            # Padded, so that a traceback shows the page's own line.
            code = compile("\n" * (block.line - 1) + block.code, str(page), "exec", dont_inherit=True)
            exec(code, module.__dict__)


def test_blocks_are_found_with_their_line_and_reason() -> None:
    text = """\
```python
a = 1
```

- in a list

  ```python
  b = a
  ```

```bash
# not this
```

<!-- no-run: needs a GPU -->

```python
c = 3
```

<!-- no-run -->
```python
d = 4
```

<!-- no-run: belongs to nothing -->
text
````python
e = '''
```python
'''
````
"""
    found = [(block.line, block.code, block.skip_reason) for block in python_blocks(text)]
    assert found == [
        (2, "a = 1", None),
        (8, "b = a", None),
        (18, "c = 3", "needs a GPU"),
        (23, "d = 4", ""),
        (29, "e = '''\n```python\n'''", None),
    ]
