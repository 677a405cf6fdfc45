"""What a report is made of, before it becomes HTML or Markdown; both show the same tables."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of plain text."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table of finished cells.

    Attributes:
        title: what it shows, for readers who do not see it.
        header: titles of the columns.
        rows: cells, as many as titles.
        texts: columns of words, which stand at the left; numbers stand at the right.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    texts: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Figure:
    """A drawing and the numbers in it.

    Attributes:
        title: what it shows.
        svg: markup of ours, in which every foreign text is escaped.
        table: the numbers, or every so manieth of them.
    """

    title: str
    svg: str
    table: Table


@dataclass(frozen=True)
class Verbatim:
    """A text as it is."""

    title: str
    text: str


@dataclass(frozen=True)
class Answer:
    """What one model said.

    Attributes:
        speaker: whose it is.
        text: as generated.
        note: what was found in it.
        is_bad: whether that is a collapse.
    """

    speaker: str
    text: str
    note: str
    is_bad: bool


@dataclass(frozen=True)
class Dialogue:
    """A prompt and the answers to it."""

    prompt: str
    answers: tuple[Answer, ...]


Block = Paragraph | Table | Figure | Verbatim | Dialogue


@dataclass(frozen=True)
class Section:
    """One topic.

    Attributes:
        key: short name, unique in the report.
        title: heading.
        blocks: what it shows; nothing where `missing` is given.
        missing: what is not there and which command makes it; empty where all is there.
    """

    key: str
    title: str
    blocks: tuple[Block, ...] = ()
    missing: str = ""


@dataclass(frozen=True)
class Tile:
    """One of the figures at the top.

    Attributes:
        name: what it is.
        value: the figure.
        note: what to compare it with.
    """

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Document:
    """A whole report.

    Attributes:
        title: heading.
        subtitle: one line about the model.
        tiles: the figures that are asked for first.
        sections: in reading order.
        writer: name and version of what wrote it.
    """

    title: str
    subtitle: str
    tiles: tuple[Tile, ...]
    sections: tuple[Section, ...]
    writer: str = field(default="")
