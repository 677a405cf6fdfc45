"""The same report as Markdown: the same tables, with the numbers of a drawing in its place."""

from __future__ import annotations

from bitdistiller_peft.report.document import Block, Dialogue, Document, Figure, Paragraph, Section, Table, Verbatim
from bitdistiller_peft.report.escape import clean, fence, markdown_text


def to_markdown(document: Document) -> str:
    """The whole file.

    Args:
        document: what to show; every text in it is escaped here.
    """
    parts = [f"# {markdown_text(document.title)}", markdown_text(document.subtitle)]
    if document.tiles:
        rows = tuple((tile.name, tile.value, tile.note) for tile in document.tiles)
        parts.append(_table(Table("In short", ("figure", "value", ""), rows, texts=(0, 2))))
    for section in document.sections:
        parts += _section(section)
    return "\n\n".join([*parts, f"---\n\n{markdown_text(document.writer)}"]) + "\n"


def _section(section: Section) -> list[str]:
    missing = [_with_code(section.missing)] if section.missing else []
    return [f"## {markdown_text(section.title)}", *missing, *(_block(block) for block in section.blocks)]


def _block(block: Block) -> str:
    match block:
        case Paragraph(words):
            return _with_code(words)
        case Table() | Figure(table=Table()):
            table = block if isinstance(block, Table) else block.table
            return f"### {markdown_text(block.title)}\n\n{_table(table)}"
        case Verbatim(title, words):
            return f"### {_with_code(title)}\n\n{fence(words)}"
        case Dialogue(prompt, answers):
            shown = [
                f"{markdown_text(answer.speaker)}{': ' if answer.note else ''}{markdown_text(answer.note)}\n\n"
                f"{fence(answer.text)}"
                for answer in answers
            ]
            return "\n\n".join([f"**Prompt:** {markdown_text(prompt)}", *shown])
    return ""


def _table(table: Table) -> str:
    rulers = ["---" if at in table.texts else "---:" for at in range(len(table.header))]
    lines = [[markdown_text(cell) for cell in row] for row in (table.header, *table.rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (lines[0], rulers, *lines[1:]))


def _with_code(words: str) -> str:
    """Escape, but for what stands between backticks."""
    pieces = words.split("`")
    if len(pieces) % 2 == 0:
        return markdown_text(words)
    # the words around a piece keep it from beginning a line, and its spaces from being cut off
    kept = [markdown_text(f"x{piece}x")[1:-1] for piece in pieces]
    code = [" ".join(clean(piece).split()) for piece in pieces]
    return "".join(words if at % 2 == 0 else f"`{code[at]}`" for at, words in enumerate(kept))
