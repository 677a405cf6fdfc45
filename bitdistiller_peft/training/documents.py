"""Documents: the runs of tokens that a model reads without looking at others, whatever they are batched with.

What a causal teacher says of a document depends on its tokens alone. So the tokens are its name: a digest of them finds
it again in a data set that was shuffled, packed, padded or split in another way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from bitdistiller_peft.errors import DataError

DIGEST_BYTES = 16
Document = np.ndarray[Any, Any]
"""Its tokens, int32"""
_ROWS_AT_ONCE = 1000


class Span(NamedTuple):
    """Where a document lies in a batch."""

    row: int
    columns: slice
    digest: bytes


def digest_of(tokens: Any) -> bytes:
    """Name a document by its tokens.

    Args:
        tokens: one-dimensional integers.
    """
    return hashlib.blake2b(np.asarray(tokens, dtype="<i4").tobytes(), digest_size=DIGEST_BYTES).digest()


def iter_documents(dataset: Any, name: str = "dataset") -> Iterator[Document]:
    """Go through the documents of a prepared data set, packed rows taken apart.

    Args:
        dataset: a `datasets.Dataset` with `input_ids` and, where it is packed, `seq_lengths`.
        name: what an error calls it.

    Raises:
        DataError: it is a stream, or not tokenized.
    """
    columns = getattr(dataset, "column_names", None)
    if not isinstance(dataset, Sized) or columns is None or "input_ids" not in columns:
        found = "a stream" if not isinstance(dataset, Sized) else f"columns {columns}"
        raise DataError(
            f"`{name}` must be a tokenized datasets.Dataset with `input_ids`: got {found}. Pass trainer.train_dataset, "
            "which is what DistillTrainer made of your data."
        )
    kept = dataset.select_columns([c for c in ("input_ids", "seq_lengths") if c in columns])  # type: ignore[attr-defined]
    for batch in kept.with_format("numpy").iter(_ROWS_AT_ONCE):
        lengths = batch.get("seq_lengths", [None] * len(batch["input_ids"]))
        for tokens, pieces in zip(batch["input_ids"], lengths, strict=True):
            row = np.asarray(tokens, dtype="<i4")
            yield from [row] if pieces is None else np.split(row, np.cumsum(pieces)[:-1])


def fingerprint_documents(digests: Iterable[bytes]) -> str:
    """SHA-256 of a set of documents, in no order."""
    return hashlib.sha256(b"".join(sorted(set(digests)))).hexdigest()


def fingerprint_dataset(dataset: Any) -> str | None:
    """SHA-256 of the documents of a prepared data set, in no order; None for a stream."""
    if not isinstance(dataset, Sized) or "input_ids" not in (getattr(dataset, "column_names", None) or []):
        return None
    return fingerprint_documents(map(digest_of, iter_documents(dataset)))


def spans_of(inputs: Mapping[str, Any]) -> list[Span]:
    """Find the documents of a batch.

    Documents of one token predict nothing and are left out; so is padding, whatever its form.

    Args:
        inputs: `input_ids` `[batch, time]` with `attention_mask` `[batch, time]` where rows are padded, or
            `position_ids` that start from 0 with every document where rows are packed.
    """
    ids: np.ndarray[Any, Any] = inputs["input_ids"].cpu().numpy()
    mask: Tensor | None = inputs.get("attention_mask")
    positions: Tensor | None = inputs.get("position_ids")
    spans: list[Span] = []
    for row, tokens in enumerate(ids):
        if mask is None and positions is not None:
            starts = np.flatnonzero(positions[row].cpu().numpy() == 0).tolist()
            cuts = [slice(a, b) for a, b in zip(starts, [*starts[1:], len(tokens)], strict=True)]
        else:
            used = range(len(tokens)) if mask is None else np.flatnonzero(mask[row].cpu().numpy()).tolist()
            cuts = [slice(used[0], used[-1] + 1)] if len(used) else []
        spans += [Span(row, cut, digest_of(tokens[cut])) for cut in cuts if cut.stop - cut.start > 1]
    return spans
