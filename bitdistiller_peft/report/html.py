"""A report as one HTML file: style and drawings are in it, nothing is fetched, nothing runs."""

from __future__ import annotations

from importlib.resources import files
from itertools import groupby

from bitdistiller_peft.report.document import (
    Answer,
    Block,
    Dialogue,
    Document,
    Figure,
    Paragraph,
    Section,
    Table,
    Verbatim,
)
from bitdistiller_peft.report.escape import html_text

GENERATOR = "bitdistiller report"
"""By this the file is known as ours, and may be replaced."""
_LONG = 40
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""Whatever a text in the report may say: a browser loads and runs nothing for it."""


def to_html(document: Document) -> str:
    """The whole file.

    Args:
        document: what to show; every text in it is escaped here.
    """
    style = files(__package__).joinpath("style.css").read_text(encoding="utf-8")
    links = "".join(f'<a href="#{html_text(s.key)}">{html_text(s.title)}</a> ' for s in document.sections)
    return "\n".join(
        (
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            f'<meta name="generator" content="{GENERATOR}">',
            f"<title>{html_text(document.title)}</title>",
            f"<style>{style}</style>",
            "</head>",
            "<body>",
            f"<header><h1>{html_text(document.title)}</h1><p>{html_text(document.subtitle)}</p>",
            _tiles(document),
            f'<nav aria-label="Sections">{links}</nav></header>',
            "<main>",
            *(_section(section) for section in document.sections),
            "</main>",
            f"<footer>{html_text(document.writer)}</footer>",
            "</body>",
            "</html>",
            "",
        )
    )


def _tiles(document: Document) -> str:
    if not document.tiles:
        return ""
    tiles = (
        f"<div><dt>{html_text(tile.name)}</dt><dd>{html_text(tile.value)}"
        + (f"<small>{html_text(tile.note)}</small>" if tile.note else "")
        + "</dd></div>"
        for tile in document.tiles
    )
    return f'<dl class="tiles">{"".join(tiles)}</dl>'


def _section(section: Section) -> str:
    body = [f'<p class="missing">{_with_code(section.missing)}</p>'] if section.missing else []
    for is_figure, blocks in groupby(section.blocks, key=lambda block: isinstance(block, Figure)):
        shown = "\n".join(_block(block) for block in blocks)
        body.append(f'<div class="figures">\n{shown}\n</div>' if is_figure else shown)
    inner = "\n".join(body)
    key = html_text(section.key)
    head = f'<section id="{key}" aria-labelledby="{key}-title">\n<h2 id="{key}-title">{html_text(section.title)}</h2>'
    return f"{head}\n{inner}\n</section>"


def _block(block: Block) -> str:
    match block:
        case Paragraph(words):
            return f"<p>{_with_code(words)}</p>"
        case Table():
            return f"<h3>{html_text(block.title)}</h3>\n{_table(block)}"
        case Figure(title, svg, table):
            numbers = f"<details><summary>The numbers</summary>\n{_table(table)}\n</details>"
            return f"<figure><figcaption>{html_text(title)}</figcaption>\n{svg}\n{numbers}\n</figure>"
        case Verbatim(title, words):
            return f'<h3>{_with_code(title)}</h3>\n<div class="verbatim"><pre>{html_text(words)}</pre></div>'
        case Dialogue(prompt, answers):
            shown = "\n".join(_answer(answer) for answer in answers)
            return f'<div class="dialogue"><p>{html_text(prompt)}</p>\n<div class="answers">\n{shown}\n</div></div>'


def _answer(answer: Answer) -> str:
    kind = "answer bad" if answer.is_bad else "answer"
    head = f"{answer.speaker} · {answer.note}" if answer.note else answer.speaker
    return f'<div class="{kind}"><h4>{html_text(head)}</h4><pre>{html_text(answer.text)}</pre></div>'


def _table(table: Table) -> str:
    def cell(tag: str, column: int, words: str) -> str:
        kind = "text long" if tag == "td" and len(words) > _LONG else "text"
        scope = ' scope="col"' if tag == "th" else ""
        mark = f' class="{kind}"' if column in table.texts else ""
        return f"<{tag}{scope}{mark}>{html_text(words)}</{tag}>"

    head = "".join(cell("th", at, title) for at, title in enumerate(table.header))
    rows = "\n".join("<tr>" + "".join(cell("td", at, c) for at, c in enumerate(row)) + "</tr>" for row in table.rows)
    region = f'<div class="scroll" tabindex="0" role="region" aria-label="{html_text(table.title)}">'
    return f"{region}<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>"


def _with_code(words: str) -> str:
    """Escape, and set what stands between backticks as code."""
    pieces = html_text(words).split("`")
    if len(pieces) % 2 == 0:  # a backtick without its partner is a sign like others
        return "`".join(pieces)
    return "".join(piece if at % 2 == 0 else f"<code>{piece}</code>" for at, piece in enumerate(pieces))
