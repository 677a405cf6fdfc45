"""The site is whole without building it: navigation, links, generated reference, and error messages that exist."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

import pytest
import yaml

from bitdistiller_peft.errors import BitDistillerError

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
MKDOCS = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


@cache
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def generated() -> dict[str, str]:
    return generator().pages()


@cache
def written() -> dict[str, str]:
    return {str(f.relative_to(DOCS)): f.read_text(encoding="utf-8") for f in sorted(DOCS.rglob("*.md"))}


def leaves(nav: Any) -> list[str]:
    """The pages of a navigation, in order."""
    if isinstance(nav, str):
        return [nav]
    inner = nav.values() if isinstance(nav, dict) else nav
    return [page for entry in inner for page in leaves(entry)]


def test_the_navigation_lists_every_page_once_and_no_other() -> None:
    pages = leaves(MKDOCS["nav"])
    assert len(set(pages)) == len(pages)
    expected = written().keys() | generated().keys()
    assert expected - set(pages) == set(), "pages that nobody finds: add them to `nav` in mkdocs.yml"
    assert set(pages) - expected == set(), "entries of `nav` in mkdocs.yml without a page"


def anchors(text: str) -> set[str]:
    """The ids that the headings of a page get."""
    headings = re.findall(r"^#{1,6} (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    plain = (re.sub(r"[^\w\s-]", "", re.sub(r"[`*]|\]\([^)]*\)", "", heading)) for heading in headings)
    return {re.sub(r"[-\s]+", "-", heading.strip().lower()) for heading in plain}


def test_every_link_leads_to_a_page_and_a_heading_of_the_site() -> None:
    pages = written() | generated()
    broken = []
    for page, text in pages.items():
        for target in re.findall(
            r"\]\((?!https?:|mailto:)([^)\s]+)\)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        ):
            path, _, anchor = target.partition("#")
            steps: list[str] = []
            for part in (*PurePosixPath(page).parent.parts, *PurePosixPath(path).parts) if path else (page,):
                steps = steps[:-1] if part == ".." else [*steps, part]
            found = pages.get("/".join(steps))
            if found is None or (anchor and anchor not in anchors(found)):
                broken.append(f"{page}: {target}")
    assert not broken


def test_no_page_is_built_with_what_must_be_fetched() -> None:
    assert MKDOCS["strict"] is True
    assert MKDOCS["theme"]["font"] is False
    assert all(key != "extra_javascript" and key != "extra_css" for key in MKDOCS)


# ------------------------------------------------------------------------------------------------ the reference


def test_every_verb_and_setting_is_in_the_reference() -> None:
    from bitdistiller_peft.cli.dispatch import VERBS
    from bitdistiller_peft.cli.schema import all_keys

    commands, settings = generated()["reference/cli.md"], generated()["reference/settings.md"]
    for verb in VERBS:
        assert f"\n## {verb}\n" in commands
        assert f"usage: bitdistiller {verb}" in commands
    for key, option in all_keys().items():
        assert f"| `{option.name}` |" in settings, key
        assert generator()._cell(option.help) in settings, key
    for name in ("modules_to_not_convert", "save_steps", "zero_point_range", "loss_weights"):
        assert (f"| `{name}` |" in settings) == (name != "modules_to_not_convert"), name


def public() -> list[tuple[str, str]]:
    import bitdistiller_peft

    found = [("public", name) for name in bitdistiller_peft.__all__ if not name.startswith("__")]
    for package in generator().packages():
        found += [(package, name) for name in import_module(f"bitdistiller_peft.{package}").__all__]
    return found


def test_every_public_name_is_in_the_reference_with_its_first_sentence() -> None:
    missing = []
    for package, name in public():
        page = generated()[f"reference/{package}.md"]
        home = "bitdistiller_peft" if package == "public" else f"bitdistiller_peft.{package}"
        value = getattr(import_module(home), name)
        doc = (value.__doc__ or "") if callable(value) else ""
        first = doc.strip().partition("\n")[0].replace("``", "`")
        if f"\n## {name}\n" not in page or first not in page:
            missing.append(f"{package}.{name}")
    assert not missing


def test_a_docstring_becomes_lists_and_code() -> None:
    doc = "Do it.\n\nArgs:\n    a: the\n        first.\n    b: ``two``.\n\nReturns:\n    It.\n\nExample:\n    >>> f(1)"
    assert "\n".join(generator().markdown(doc)) == (
        "Do it.\n\n\n**Args**\n\n- `a`: the\n    first.\n- `b`: `two`.\n\n\n**Returns**\n\nIt.\n\n\n"
        "**Example**\n\n```python\n>>> f(1)\n```"
    )


def test_every_measured_figure_is_shown_and_a_missed_one_is_marked() -> None:
    page = generated()["measurements.md"]
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        section = page.partition(f"\n## {result['name']}\n")[2].partition("\n## ")[0]
        assert result["command"] in section
        for name, figure in result["figures"].items():
            (line,) = [line for line in section.splitlines() if line.startswith(f"| {name} | ")]
            asked, value = figure["asked"], figure["value"]
            is_missed = value < asked.get("min", value) or value > asked.get("max", value)
            assert line.endswith("| x |") == is_missed, name


# ------------------------------------------------------------------------------------------------ troubleshooting


def refusals() -> dict[str, Callable[[], object]]:
    """Something that each part of the package refuses."""
    from bitdistiller_peft import BitDistillerConfig, DistillConfig
    from bitdistiller_peft.cli.parse import parse
    from bitdistiller_peft.cli.texts import load_prompts
    from bitdistiller_peft.cli.verbs.eval import VERB
    from bitdistiller_peft.errors import GroupSizeError, UnknownNameError, add_location
    from bitdistiller_peft.evaluation import compare_results
    from bitdistiller_peft.export import export_model
    from bitdistiller_peft.hub import verify_checkpoint
    from bitdistiller_peft.importing import import_model

    def placed() -> None:
        raise add_location(GroupSizeError(48, 100), "layer 'a'")

    def unknown() -> None:
        raise UnknownNameError("grid", "itn", ["int"])

    return {
        "bits": lambda: BitDistillerConfig(bits=5),
        "several faults": lambda: DistillConfig("x", loss_type="mixture"),
        "group size": placed,
        "unknown name": unknown,
        "flag": lambda: parse(VERB, ["--sec-len", "3"]),
        "value": lambda: parse(VERB, ["--seq-len", "three"]),
        "prompts": lambda: load_prompts("nowhere.txt", "text", has_template=False, max_prompts=None),
        "comparison": lambda: compare_results({}),
        "checkpoint": lambda: verify_checkpoint("nowhere"),
        "import": lambda: import_model("nowhere"),
        "export": lambda: export_model("nowhere", "out", "gguf"),
    }


@pytest.mark.parametrize("case", refusals())
def test_what_is_refused_is_found_by_its_words(case: str) -> None:
    with pytest.raises(BitDistillerError) as caught:
        refusals()[case]()
    page = generated()["reference/errors.md"]
    texts = [text for text in re.findall(r"^- `` (.+) ``$", page, re.M) if len(text.replace("…", "").split()) > 4]
    for line in str(caught.value).splitlines():
        patterns = (".*".join(re.escape(part) for part in text.split("…")) for text in texts)
        assert any(re.search(pattern, line) for pattern in patterns), line


@cache
def messages() -> list[str]:
    """Every text in the package, with … in the place of values."""
    found = []
    for file in sorted((ROOT / "bitdistiller_peft").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                found.append("".join(map(str, parts)))
    return found


HEADINGS = re.findall(r"^### (.+)$", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("heading", [heading for heading in HEADINGS if not heading.startswith("Symptom: ")])
def test_a_message_that_is_explained_is_one_that_is_raised(heading: str) -> None:
    pattern = re.compile(".*".join(re.escape(part.strip()) for part in heading.split("…")), re.DOTALL)
    assert any(pattern.search(message) for message in messages())


def test_the_page_explains_at_least_a_score_of_messages() -> None:
    assert len(HEADINGS) >= 20


def test_a_chart_draws_every_number_to_scale_and_says_what_it_is() -> None:
    from xml.etree import ElementTree

    text = generator().bars("Speed <fast>", [("ours & more", 4.0), ("theirs", 1.0), ("none", 0.0)])
    root = ElementTree.fromstring(text)
    assert root.get("aria-label") == "Speed <fast>"
    lengths = [float(bar.get("width")) for bar in root.iter("rect")]
    assert lengths[0] == pytest.approx(4 * lengths[1], rel=0.01)
    assert lengths[2] == 0
    words = [entry.text for entry in root.iter("text")]
    assert words == ["Speed <fast>", "ours & more", "4", "theirs", "1", "none", "0"]
    assert lengths[0] + float(next(root.iter("rect")).get("x")) < generator().WIDTH


def test_the_page_of_measurements_shows_charts_of_what_was_measured() -> None:
    page = generated()["measurements.md"]
    for name in ("4096x4096", "11008x4096"):
        assert f'aria-label="One token, {name}' in page
