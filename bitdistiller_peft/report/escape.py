"""Foreign text made harmless: names, generations and settings may hold anything."""

from __future__ import annotations

import html
import re

_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
"""What no document may hold, and what turns the direction of the text around it."""
_SIGNS = re.compile(r"([\\`*_\[\]|~<>&]|^[-#+=]|(?<=:)/(?=/))")
"""What Markdown or HTML would read as more than a sign; the last one is what makes a link of an address."""


def clean(text: object) -> str:
    """The text without control characters, half surrogates and direction overrides: U+FFFD stands for each."""
    return _CONTROLS.sub("\ufffd", str(text).replace("\r\n", "\n").replace("\r", "\n"))


def html_text(text: object) -> str:
    """Text for an element or a quoted attribute."""
    return html.escape(clean(text), quote=True)


def markdown_text(text: object) -> str:
    """Text for a paragraph, heading or cell: in one line, every sign that Markdown or HTML would read escaped."""
    return _SIGNS.sub(r"\\\1", " ".join(clean(text).split()))


def fence(text: object) -> str:
    """Text as a fenced block, the fence longer than any in it."""
    content = clean(text)
    longest = max((len(run) for run in re.findall("`+", content)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}text\n{content}\n{ticks}"
