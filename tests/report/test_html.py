"""The page is well formed, asks for nothing, and shows foreign texts as texts, whatever stands in them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from bitdistiller_peft.errors import CheckpointError
from bitdistiller_peft.report import write_report
from tests.report.conftest import evaluation, log, write
from tests.report.page import Element, parse, section

HOSTILE = [
    "<script>alert(1)</script>",
    "</pre></main></body><svg onload=alert(1)>",
    "\"><img src=x onerror='alert(1)'>",
    "' onmouseover='alert(1)",
    "<!-- no end",
    "<![CDATA[ <b>",
    "&lt;script&gt; &amp; &#x3c;",
    "<?php echo 1 ?>",
    "]]></style><style>@import url(http://evil.example/x.css);",
    "`code` **bold** [a](javascript:alert(1)) | a | b |",
    "\u202egnp.exe \x00\x07\x1b[31m end",
    "line\r\nline\rline",
]
ATTRIBUTES = {
    "class", "id", "href", "lang", "charset", "name", "content", "http-equiv", "aria-label", "aria-labelledby", "role",
    "tabindex", "scope", "viewbox", "x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "width", "height", "points",
    "transform", "text-anchor", "fill-opacity",
}  # fmt: skip


@pytest.fixture(scope="module")
def html(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(chain, tmp_path_factory.mktemp("out"), show_progress=False).html.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Element:
    return parse(html)


def check_harmless(page: Element) -> None:
    for element in page.all():
        assert element.tag not in ("script", "img", "iframe", "object", "embed", "link", "form", "base")
        assert set(element.attributes) <= ATTRIBUTES, element.attributes
        assert element.attributes.get("href", "#").startswith("#")
    (style,) = page.all("style")
    assert not re.search(r"@import|url\(|expression", style.text)
    policies = [e.attributes["content"] for e in page.all("meta", **{"http-equiv": "Content-Security-Policy"})]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_the_page_is_well_formed_and_asks_for_nothing(page: Element) -> None:
    check_harmless(page)
    ids = [element.attributes["id"] for element in page.all() if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    for element in page.all():
        for name in ("aria-labelledby", "href"):
            if name in element.attributes:
                assert element.attributes[name].removeprefix("#") in ids
    assert page.all("html")[0].attributes["lang"] == "en"
    (viewport,) = page.all("meta", name="viewport")
    assert viewport.attributes["content"] == "width=device-width, initial-scale=1"


def test_every_table_scrolls_by_itself_and_every_drawing_says_what_it_is(page: Element) -> None:
    boxes = page.all("div", kind="scroll")
    assert len(boxes) == len(page.all("table")) == sum(len(box.all("table")) for box in boxes)
    assert all(box.attributes["tabindex"] == "0" and box.attributes["aria-label"] for box in boxes)
    for svg in page.all("svg"):
        assert svg.attributes["role"] == "img"
        assert svg.all("title")[0].text in svg.attributes["aria-label"]
        assert svg.all("desc")[0].text in svg.attributes["aria-label"]
    assert len(page.all("svg")) == 7, "loss, KLs, flips, doctor, errors, histogram, sizes"


def test_dark_mode_and_narrow_screens_are_in_the_style(page: Element) -> None:
    style = page.all("style")[0].text
    light, dark = re.search(r":root \{(.+?)\}", style, re.S), re.search(r"dark\) \{\s*:root \{(.+?)\}", style, re.S)
    assert light
    assert dark
    names = [set(re.findall(r"--[\w-]+(?=:)", found[1])) for found in (light, dark)]
    assert names[0] == names[1], "every colour has a dark twin"
    assert set(re.findall(r"var\((--[\w-]+)\)", style)) <= names[0]
    classes = {name for e in page.all() for name in (e.attributes.get("class") or "").split()}
    assert classes - set(re.findall(r"\.([\w-]+)", style)) <= {"cell", "tick"}, "the two that need no rule of their own"


def test_figures_in_the_tables_are_those_of_the_files(page: Element) -> None:
    scores, tasks, pairs = (table.table() for table in section(page, "scores").all("table"))
    assert scores[1][:4] == ["base", "full_precision", "12.5", "2.526"]
    assert scores[2][1:] == ["packed", "20.75", "3.033", "0.1234", "0.4567", "87.5 %", "378"]
    assert tasks[1] == ["out/distill/packed", "arc_easy/acc", "0.4321", "0.0123", "200", "0", "task/v1"]
    assert pairs[1] == ["out/distill/packed - base", "nll", "0.5068", "0.4 to 0.6"]
    assert section(page, "costs").all("table")[0].table()[1:] == [
        ["calibrate", "61.5 s", "", ""],
        ["generate", "5.0 s", "", ""],
        ["distill", "2.02 h", "3.00 GiB", ""],
        ["eval", "17.8 s", "", ""],
    ]
    tiles = {tile.all("dt")[0].text: tile.all("dd")[0].text for tile in page.all("dl")[0].all("div")}
    assert tiles["Perplexity"] == "20.75full_precision: 12.5"
    assert tiles["Collapsed answers"] == "1 of 2"
    doctor = next(t.table() for t in section(page, "training").all("table") if t.table()[0][0] == "finding")
    assert doctor[1] == ["oscillation", "warning", "7", "9 % swing.", "Lower."]


def test_the_numbers_under_a_curve_are_those_of_the_log(page: Element) -> None:
    tables = [figure.all("table")[0].table() for figure in section(page, "training").all("figure")]
    entries = {entry["step"]: entry for entry in log()[:-1]}
    for table, keys in zip(
        tables, (["loss"], ["forward_kl", "reverse_kl"], ["flip_rate"], ["oscillation", "clamped"]), strict=True
    ):
        assert [table[1][0], table[-1][0]] == ["1", "30"]
        for step, *values in table[1:]:
            for key, value in zip(keys, values, strict=True):
                assert float(value) == pytest.approx(entries[int(step)][key], rel=1e-3, abs=1e-9)


def test_the_gallery_shows_both_answers_and_marks_the_broken_one(page: Element) -> None:
    dialogues = section(page, "gallery").all("div", kind="dialogue")
    assert [d.all("p")[0].text for d in dialogues] == ["What is the capital of France?", "Say hello."]
    assert [pre.text for pre in dialogues[1].all("pre")] == ["!!!!!!!!", "Paris."]
    (bad,) = section(page, "gallery").all("div", kind="answer bad")
    assert bad.all("h4")[0].text == "model · repeated character: '!' 8 times"


def test_provenance_holds_the_settings_the_recipe_and_the_checksums(page: Element, chain: Path) -> None:
    found = section(page, "provenance")
    assert found.all("pre")[0].text == (chain / "resolved.yaml").read_text()
    cells = {row[0]: row[1] for table in found.all("table") for row in table.table() if len(row) >= 2}
    assert cells["provenance.loss"] == "cakld"
    assert cells["gamma"] == "0.4875"
    assert cells["data.num_samples"] == "2"
    manifest = json.loads((chain / "distill" / "packed" / "bitdistiller.json").read_text())
    files = next(t.table() for t in found.all("table") if t.table()[0] == ["file", "bytes", "SHA-256"])
    entry = manifest["files"]["model.safetensors"]
    assert files[1] == ["model.safetensors", f"{entry['bytes']:,}", entry["sha256"]]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_texts_are_shown_and_not_obeyed(
    text: str, html: str, make_chain: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_chain(tmp_path / "run")
    result = evaluation(text, text=text, prompt=text)
    result["rows"][1]["perplexity"] |= {"protocol": text, "state": text}
    result["rows"][1]["gallery"]["entries"][0]["answer"]["collapse"] = {"kind": text, "detail": text}
    result["rows"][1]["tasks"]["scores"][0]["task"] = text
    write(folder / "eval" / "result.json", result)
    write(
        folder / "distill" / "trainer" / "doctor.json",
        {"findings": [dict.fromkeys(("name", "severity", "seen", "advice", "first_step"), text)]},
    )
    write(folder / "export" / "result.json", {"folder": text, "reports": {text: {text: text}}})
    (folder / "resolved.yaml").write_bytes(f"# {text} \ud800\n".encode("utf-8", "surrogatepass"))  # no UTF-8
    config = json.loads((folder / "distill" / "packed" / "config.json").read_text())
    config["quantization_config"]["provenance"] = {"base_model": text, "loss": text}
    config["architectures"] = ["LlamaForCausalLM"]
    write(folder / "distill" / "packed" / "config.json", config)
    page = parse(write_report(folder, show_progress=False).html.read_text(encoding="utf-8"))
    check_harmless(page)
    shown = "\n".join(str(line) for line in _expected(text).split("\n"))
    assert section(page, "gallery").all("pre")[0].text == shown
    assert section(page, "scores").all("table")[0].table()[2][0] == shown
    harmless = Counter(
        e.tag for e in parse(html).all() if e.tag not in ("rect", "line", "text", "g", "title", "svg", "desc")
    )
    kinds = set(harmless) | {"code"}
    assert {e.tag for e in page.all()} - kinds <= {"rect", "line", "text", "g", "title", "svg", "desc", "circle"}
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\ud800-\udfff]", page.text)


def test_a_text_that_no_file_can_hold_is_refused_with_the_file(
    make_chain: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = make_chain(tmp_path / "run")
    path = folder / "distill" / "packed" / "config.json"
    path.write_text(path.read_text().replace("{", '{"note": "\\ud800", ', 1))
    with pytest.raises(CheckpointError, match=r"config\.json must be readable JSON"):
        write_report(folder, show_progress=False)


def _expected(text: str) -> str:
    """The text with what no page may hold replaced."""
    return re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\u202e]", "\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))
