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

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright && playwright install chromium")
pytestmark = pytest.mark.slow
FLAGS = ["--no-sandbox", "--no-zygote", "--in-process-gpu", "--use-gl=angle", "--use-angle=swiftshader"]

WIDE = """() => [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') && !e.closest('svg')
    && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(e => e.tagName + '.' + e.className)"""
FAINT = """() => { const rgb = c => c.match(/[\\d.]+/g).map(Number);
  const light = c => { const [r, g, b] = rgb(c).map(v => { v /= 255; return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4 });
    return .2126 * r + .7152 * g + .0722 * b };
  const behind = e => { while (e) { const c = getComputedStyle(e).backgroundColor; if (rgb(c)[3] !== 0) return c; e = e.parentElement }
    return 'rgb(255,255,255)' };
  return [...document.querySelectorAll('h1,h2,h3,h4,p,a,td,th,pre,dt,dd,summary,footer')].filter(e => e.textContent.trim()).map(e => {
    const a = light(getComputedStyle(e).color), b = light(behind(e)); return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.tagName]
  }).filter(pair => pair[0] < 4.5) }"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
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
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert page.evaluate(WIDE) == []
    assert page.evaluate(FAINT) == [], "text stands out from what is behind it, 4.5 to 1 (WCAG AA)"
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(251, 251, 250)", "dark": "rgb(20, 23, 26)"}[scheme]
    sizes = page.evaluate(
        "[...document.querySelectorAll('svg.chart')].map(s => s.getBoundingClientRect().width / s.viewBox.baseVal.width)"
    )
    assert min(sizes) * 12 >= 8, "words in drawings are at least 8 pixels high"
    context.close()
