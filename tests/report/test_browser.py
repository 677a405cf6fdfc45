"""A real browser shows the page on a phone and on a desk, by day and by night, and asks nobody for anything.

Needs `playwright` and a Chromium: its own, one on the path, or the one that the variable CHROMIUM names.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bitdistiller_peft.report import write_report

pytestmark = pytest.mark.slow
FLAGS = ["--no-sandbox", "--no-zygote", "--in-process-gpu", "--use-gl=angle", "--use-angle=swiftshader"]

LEGIBLE = Path(__file__).with_name("legible.js")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    reason = "pip install playwright && playwright install chromium"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    with playwright.sync_playwright() as engine:
        try:
            opened = engine.chromium.launch(executable_path=path, args=FLAGS)
        except playwright.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def report(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(chain, tmp_path_factory.mktemp("page"), show_progress=False).html


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [340, 1280], ids=["phone", "desk"])
def test_the_page_is_legible_and_fetches_nothing(width: int, scheme: str, browser: Any, report: Path) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    asked: list[str] = []
    said: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(report.as_uri())
    for details in page.query_selector_all("summary"):
        details.click()
    assert asked == [report.as_uri()]
    assert said == []
    found = page.evaluate(LEGIBLE.read_text(encoding="utf-8").split("\n", 1)[1])
    assert (found["wide"], found["scrolls"]) == ([], False)
    assert found["faint"] == [], "text stands out from what is behind it, 4.5 to 1 (WCAG AA)"
    assert found["background"] == {"light": "rgb(251, 251, 250)", "dark": "rgb(20, 23, 26)"}[scheme]
    assert found["smallest"] >= 8, "words in drawings are at least 8 pixels high"
    context.close()
