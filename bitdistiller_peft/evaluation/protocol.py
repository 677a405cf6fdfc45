"""From a text to the chunks that a score is made of, and the id that says which scores can be compared.

The protocol is GPTQ's, which most published WikiText-2 figures follow. The text is tokenized in one go and cut into
chunks of `seq_len` tokens that do not overlap; what is left over at the end is dropped. Within a chunk every token but
the first is predicted from those before it, so a chunk of n tokens yields n - 1 predictions. If the tokenizer puts
tokens in front of a text (most often a BOS), they come once, before the whole text, and count as its first tokens.

The same model on the same text has another perplexity for every `seq_len`, every tokenizer and every way of joining
rows. Hence the id: it holds the version of these rules, the length and number of the chunks, whether there was a BOS,
and a hash of the very tokens. Two scores are comparable if, and only if, their ids are equal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitdistiller_peft.errors import ConfigError, DataError

PROTOCOL_VERSION = 1


@dataclass(frozen=True, eq=False)
class Chunks:
    """What a model is evaluated on.

    Attributes:
        ids: token ids, `[chunks, seq_len]`, int64, on the CPU.
        protocol: what identifies the protocol, e.g. ``"v1/seq_len=512/chunks=40/bos=no/tokens=91c2f06ab3d4"``.
    """

    ids: Tensor
    protocol: str

    @property
    def num_predictions(self) -> int:
        """How many tokens are predicted: all but the first of each chunk."""
        return self.ids.shape[0] * (self.ids.shape[1] - 1)

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """The chunks in order, `[batch, seq_len]` at a time; the last batch may be smaller.

        Raises:
            ConfigError: `batch_size` is below one.
        """
        check_at_least("batch_size", batch_size, 1, "Use batch_size=1.")
        return (self.ids[start : start + batch_size] for start in range(0, len(self.ids), batch_size))


def join_rows(rows: Sequence[str]) -> str:
    """Join the rows of a data set as GPTQ joins those of WikiText-2.

    Rows are separated by an empty line. A row ends in a line break of its own, which is added where it is missing, and
    a blank row is empty; so the lines of the raw file and the rows of the hub's data set give the same text.

    Args:
        rows: lines or documents.
    """
    return "\n\n".join("" if not row.strip() else row if row.endswith("\n") else row + "\n" for row in rows)


def cut_text(tokenizer: Any, text: str | Sequence[str], *, seq_len: int, max_chunks: int | None) -> Chunks:
    """Tokenize a text and cut it into chunks.

    Args:
        tokenizer: a transformers tokenizer; it is not changed.
        text: one text, or rows for `join_rows`.
        seq_len: tokens per chunk, at least 2.
        max_chunks: use only that many chunks from the beginning; `None` for all.

    Raises:
        ConfigError: `seq_len` or `max_chunks` is out of range.
        DataError: the text is empty, or shorter than one chunk.
    """
    check_at_least("seq_len", seq_len, 2, "Use seq_len=512.")
    if max_chunks is not None:
        check_at_least("max_chunks", max_chunks, 1, "Use max_chunks=None for the whole text.")
    joined = _as_text(text)
    front = front_tokens(tokenizer)
    tokens = front + tokenize(tokenizer, joined, add_special_tokens=False)
    num_chunks = min(len(tokens) // seq_len, max_chunks or len(tokens))
    if num_chunks == 0:
        raise DataError(
            f"`text` must fill at least one chunk of seq_len={seq_len} tokens: got {len(tokens)} tokens. "
            f"Use a longer text, or seq_len={max(2, len(tokens))} at most."
        )
    ids = torch.tensor(tokens[: num_chunks * seq_len], dtype=torch.int64).view(num_chunks, seq_len)
    digest = hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest()[:12]
    bos = "yes" if front else "no"
    return Chunks(ids, f"v{PROTOCOL_VERSION}/seq_len={seq_len}/chunks={num_chunks}/bos={bos}/tokens={digest}")


def check_fits(model: nn.Module, chunks: Chunks, role: str = "model") -> None:
    """Refuse chunks that a model cannot read.

    Args:
        model: a transformers model.
        chunks: what it is to be evaluated on.
        role: what the model is called in the message.

    Raises:
        ConfigError: a chunk is longer than the model's context.
        DataError: a token lies outside the model's vocabulary.
    """
    context, vocab = limits(model)
    seq_len = chunks.ids.shape[1]
    if context is not None and context < seq_len:
        raise ConfigError(
            f"`seq_len` must fit the context of the {role}: got seq_len={seq_len}, context={context} tokens. "
            f"Use seq_len={context} or less."
        )
    largest = int(chunks.ids.max())
    if vocab is not None and largest >= vocab:
        raise DataError(
            f"`tokenizer` must belong to the {role}: got token {largest}, but its vocabulary has {vocab} entries. "
            "Load both from the same place."
        )


def limits(model: nn.Module) -> tuple[int | None, int | None]:
    """Context in tokens and size of the vocabulary, as far as a model's config tells."""
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    context = getattr(text_config, "max_position_embeddings", None)
    vocab = getattr(text_config, "vocab_size", None)
    return context if isinstance(context, int) and context > 0 else None, vocab if isinstance(vocab, int) else None


def check_at_least(name: str, value: object, least: int, advice: str) -> None:
    """Refuse a count that is too small, or none.

    Raises:
        ConfigError: it is.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"`{name}` must be a whole number of at least {least}: got {name}={value!r}. {advice}")


def _as_text(text: str | Sequence[str]) -> str:
    if not isinstance(text, str):
        rows = list(text)
        if not all(isinstance(row, str) for row in rows):
            raise DataError("`text` must be a string or a list of strings. For a data set, pass list(dataset['text']).")
        text = join_rows(rows)
    if not text.strip():
        raise DataError("`text` must not be empty: got nothing but white space. Pass the text to evaluate on.")
    return text


def front_tokens(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts before any text. What it may put behind one would end each text early."""
    bare = tokenize(tokenizer, "a", add_special_tokens=False)
    whole = tokenize(tokenizer, "a", add_special_tokens=True)
    fronts = (whole[:at] for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
    return next(fronts, [])


def tokenize(tokenizer: Any, text: str, *, add_special_tokens: bool) -> list[int]:
    """Token ids of a text, however long it is."""
    # verbose=False: that a whole data set is longer than the context is no news here
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, truncation=False, verbose=False)
    return list(encoded["input_ids"])
