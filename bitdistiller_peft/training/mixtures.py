"""Training data mixed from several sources by shares of tokens: pre-training text, conversations, the teacher's own.

Rows of every kind become tokens here, conversations by the tokenizer's chat template, so that shares are those of what
is trained on: a source of long documents would otherwise take over a mixture by rows.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from bitdistiller_peft.errors import BitDistillerError, ConfigError, DataError, add_location

IGNORED = -100  # a label that is no target, as transformers has it
Tokens = tuple[list[int], list[int]]
"""Token ids, and 1 for each that is a target"""


@dataclass(frozen=True)
class SourceShare:
    """What one source gave to a mixture.

    Attributes:
        name: of the source.
        asked: share of the tokens that was asked for.
        share: share of the tokens that it has.
        documents: rows drawn, each time counted.
        passes: how often the whole source was gone through; above 1, rows come again.
        tokens: tokens.
        targets: those of them that are targets of the loss.
    """

    name: str
    asked: float
    share: float
    documents: int
    passes: float
    tokens: int
    targets: int


@dataclass(frozen=True)
class MixReport:
    """What a mixture is made of; `print` it for a table.

    Attributes:
        sources: in the order in which they were given.
    """

    sources: tuple[SourceShare, ...]

    def __str__(self) -> str:
        header = ("source", "asked", "share", "documents", "passes", "tokens", "targets", "tokens/document")
        cells = [header]
        for row in self.sources:
            mean = row.tokens / max(1, row.documents)
            shares = (f"{row.asked:.1%}", f"{row.share:.1%}", f"{row.documents:,}", f"{row.passes:.2f}")
            cells.append((row.name, *shares, f"{row.tokens:,}", f"{row.targets:,}", f"{mean:.0f}"))
        widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
        )


def mix_data(
    sources: Mapping[str, Iterable[Any]],
    shares: Mapping[str, float],
    tokenizer: Any,
    *,
    num_tokens: int,
    max_length: int = 512,
    chat_template: str | None = None,
    seed: int = 0,
) -> tuple[Dataset, MixReport]:
    """Mix sources by shares of tokens.

    Args:
        sources: rows by name: texts, ``{"text": ...}``, ``{"messages": [...]}`` that end with the assistant's, or
            ``{"prompt": ..., "completion": ...}``, each a text or messages, as `load_teacher_data` gives them.
        shares: what part of the tokens each source gives; they add up to 1.
        tokenizer: of the student.
        num_tokens: tokens in all; a source gives rows until its part is full, and begins again where it runs out.
        max_length: longer rows are cut there.
        chat_template: in place of the tokenizer's own.
        seed: of the order.

    Returns:
        Rows of `input_ids` and `labels`, shuffled, for `DistillTrainer`; of texts every token is a target, of
        conversations and completions the answer. And the report of what is in it.

    Raises:
        ConfigError: shares that do not fit the sources or add up to 1, or a number out of range.
        DataError: a source without rows, a row of no known kind, or a template that is missing or changes what comes
            before the answer; source and row are named.

    Example:
        >>> data, report = mix_data({"own": rows, "web": texts}, {"own": 0.8, "web": 0.2}, tokenizer, num_tokens=10**6)
        ... # doctest: +SKIP
    """
    _check(sources, shares, num_tokens, max_length)
    reader = _Reader(tokenizer, max_length, chat_template)
    drawn: list[Tokens] = []
    found = []
    for name, rows in sources.items():
        try:
            mine, passes = _draw(list(rows), reader, int(shares[name] * num_tokens), random.Random(f"{seed} {name}"))
        except BitDistillerError as error:
            raise add_location(error, f"source {name!r}") from None
        found.append((name, mine, passes))
        drawn += mine
    random.Random(seed).shuffle(drawn)
    total = max(1, sum(len(ids) for ids, _ in drawn))
    report = MixReport(tuple(_share(name, shares[name], mine, passes, total) for name, mine, passes in found))
    labels = [[i if is_target else IGNORED for i, is_target in zip(*row, strict=True)] for row in drawn]
    return Dataset.from_dict({"input_ids": [ids for ids, _ in drawn], "labels": labels}), report


def _check(sources: Mapping[str, Iterable[Any]], shares: Mapping[str, float], num_tokens: int, max_length: int) -> None:
    if sources.keys() != shares.keys():
        raise ConfigError(
            f"`shares` must name the sources: got shares of {sorted(shares)} for sources {sorted(sources)}."
        )
    if any(not share > 0 for share in shares.values()) or abs(sum(shares.values()) - 1) > 1e-6:
        raise ConfigError(
            f"`shares` must be positive and add up to 1: got shares={dict(shares)}, {sum(shares.values()):g} in all."
        )
    for name, value in (("num_tokens", num_tokens), ("max_length", max_length)):
        if type(value) is not int or value < 2:
            raise ConfigError(f"`{name}` must be a whole number of at least 2: got {name}={value!r}. Use 512 or more.")


def _draw(rows: list[Any], reader: _Reader, quota: int, order: random.Random) -> tuple[list[Tokens], float]:
    """Rows in random order until they have so many tokens; the last one is cut to fit."""
    if not rows:
        raise DataError("a source must have rows: got none. Leave it out.")
    drawn: list[Tokens] = []
    left, count = quota, 0
    for index in _endless(len(rows), order):
        ids, mask = reader.read(rows[index], index)
        if left <= 0:
            break
        if not any(mask[:left]):
            break
        drawn.append((ids[:left], mask[:left]))
        left, count = left - len(ids), count + 1
    return drawn, count / len(rows)


def _endless(length: int, order: random.Random) -> Iterator[int]:
    while True:
        yield from order.sample(range(length), length)


def _share(name: str, asked: float, rows: list[Tokens], passes: float, total: int) -> SourceShare:
    tokens = sum(len(ids) for ids, _ in rows)
    return SourceShare(name, asked, tokens / total, len(rows), passes, tokens, sum(sum(mask) for _, mask in rows))


class _Reader:
    """Turns rows of every kind into tokens."""

    def __init__(self, tokenizer: Any, max_length: int, chat_template: str | None) -> None:
        self.tokenizer, self.max_length, self.template = tokenizer, max_length, chat_template

    def read(self, row: Any, index: int) -> Tokens:
        """The tokens of a row, and which of them are targets."""
        before, answer = self._parts(row, index)
        if before is None:
            ids = [*self.tokenizer(answer)["input_ids"], *self._end()]
            mask = [1] * len(ids)
        else:
            prompt, completion = (self._plain(text) for text in (before, answer))
            ids, mask = prompt + completion, [0] * len(prompt) + [1] * len(completion)
        if not any(mask[: self.max_length]):
            raise DataError(
                f"every row must have a target within max_length={self.max_length}: row {index} has none. Raise it, or "
                "leave the row out."
            )
        return ids[: self.max_length], mask[: self.max_length]

    def _parts(self, row: Any, index: int) -> tuple[str | None, str]:
        """What is given, or `None` for a mere text; and what is to be learnt."""
        if isinstance(row, str):
            return None, row
        keys = set(row) if isinstance(row, Mapping) else set()
        if "messages" in keys:
            return self._conversation(list(row["messages"]), index)
        if {"prompt", "completion"} <= keys:
            prompt, completion = row["prompt"], row["completion"]
            if isinstance(prompt, str) and isinstance(completion, str):
                return prompt, completion + self.tokenizer.decode(self._end())
            return self._conversation([*prompt, *completion], index)
        if isinstance(row.get("text") if keys else None, str):
            return None, row["text"]
        raise DataError(
            "every row must be a text, or have 'text', 'messages', or 'prompt' and 'completion': got "
            f"{sorted(keys) if keys else type(row).__name__} in row {index}."
        )

    def _conversation(self, messages: list[Any], index: int) -> tuple[str, str]:
        if not messages or messages[-1].get("role") != "assistant":
            raise DataError(f"a conversation must end with the assistant's message: row {index} does not.")
        if self.template is None and not getattr(self.tokenizer, "chat_template", None):
            raise DataError(
                "`chat_template` must be given for conversations: the tokenizer has none. Pass chat_template=..., or "
                "rows of text."
            )
        options = {"tokenize": False, "chat_template": self.template}
        before = self.tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, **options)
        whole = self.tokenizer.apply_chat_template(messages, **options)
        if not whole.startswith(before):
            raise DataError(
                f"the chat template must keep what comes before the answer as it is: it does not in row {index}. Pass "
                "a chat_template that does, or prompt and completion as text."
            )
        return before, whole[len(before) :]

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _end(self) -> list[int]:
        end: int | None = self.tokenizer.eos_token_id
        return [] if end is None else [end]
