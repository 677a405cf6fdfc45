"""Text for the demo: WikiText-2 where it is at hand, else the English that every CPython carries."""

from __future__ import annotations

import pydoc_data.topics
from dataclasses import dataclass
from pathlib import Path

HUB_TEXT = "Salesforce/wikitext"
EVALUATION_SHARE = 0.6


@dataclass(frozen=True)
class DemoText:
    """Text to calibrate on and text to evaluate on, without overlap.

    Attributes:
        name: what the text is, for the table.
        calibration: documents.
        evaluation: one text.
    """

    name: str
    calibration: list[str]
    evaluation: str


def load_text(source: str | None) -> DemoText:
    """Load the demo's text.

    Args:
        source: a text file (for example WikiText-2's test split), ``"hub"`` for WikiText-2 from the Hub, or `None` for
            Python's own help topics.

    Raises:
        FileNotFoundError: no such file.
    """
    if source is None:
        return python_topics()
    if source == "hub":
        return hub_text()
    text = Path(source).read_text(encoding="utf-8")
    # cut at a paragraph, so that no sentence stands on both sides
    cut = text.find("\n", int(len(text) * EVALUATION_SHARE)) + 1
    return DemoText(Path(source).name, [text[cut:]], text[:cut])


def python_topics() -> DemoText:
    """Python's help topics, every third one for evaluation."""
    topics = sorted(set(pydoc_data.topics.topics.values()), key=lambda text: (len(text), text))
    evaluation = [text for index, text in enumerate(topics) if index % 3 == 0]
    calibration = [text for index, text in enumerate(topics) if index % 3]
    return DemoText("pydoc_data.topics", calibration[::-1], "\n\n".join(evaluation[::-1]))


def hub_text() -> DemoText:
    """WikiText-2 from the Hub: train split for calibration, test split for evaluation."""
    from datasets import load_dataset

    parts = {split: load_dataset(HUB_TEXT, "wikitext-2-raw-v1", split=split)["text"] for split in ("train", "test")}
    joined = {split: "\n\n".join(row + "\n" if row.strip() else "" for row in rows) for split, rows in parts.items()}
    return DemoText("WikiText-2 raw", [joined["train"][:2_000_000]], joined["test"])
