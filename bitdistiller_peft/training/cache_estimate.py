"""What a teacher cache takes on the disk, said before the first token is computed."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bitdistiller_peft.errors import DoesNotFitError
from bitdistiller_peft.losses import Head
from bitdistiller_peft.training.cache_store import CacheLayout
from bitdistiller_peft.training.documents import DIGEST_BYTES, Document

logger = logging.getLogger(__name__)

_TRADE = (  # benchmarks/training.py, part teachers
    "Hidden states give the live teacher's gradients within 1 %; on a 135M model and four texts, a top 64 with its "
    "tail was off by 25 to 33 % for a 3-bit and 17 to 33 % for a 4-bit student, a top 256 by 17 to 25 % and 11 to 21 %."
)


@dataclass(frozen=True)
class CacheEstimate:
    """What a cache takes on the disk.

    Attributes:
        num_documents: different documents.
        num_tokens: their tokens.
        num_bytes: of the cache as asked for.
        bytes_per_token: to value: of this layout and of the others, by name.
    """

    num_documents: int
    num_tokens: int
    num_bytes: int
    bytes_per_token: Mapping[str, int]

    def __str__(self) -> str:
        """Two lines: the size, and the trade against other layouts."""
        each = ", ".join(
            f"{name} {count:,} B/token = {count * self.num_tokens / 2**30:.2f} GiB"
            for name, count in self.bytes_per_token.items()
        )
        return (
            f"Teacher cache: {self.num_documents:,} documents, {self.num_tokens:,} tokens, "
            f"{self.num_bytes / 2**30:.2f} GiB.\n{each}. {_TRADE}"
        )


def estimate(documents: Mapping[bytes, Document], layout: CacheLayout, head: Head) -> CacheEstimate:
    """Compute the size of a cache.

    Args:
        documents: by digest.
        layout: what is kept.
        head: of the teacher.
    """
    num_tokens = sum(map(len, documents.values()))
    hidden = CacheLayout("hidden", "bfloat16", head.weight.shape[1], layout.vocab)
    others = {f"top {k}": CacheLayout("topk", "float16", k, layout.vocab) for k in (64, 256) if k <= layout.vocab}
    sizes = {"hidden states" if layout.kind == "hidden" else f"top {layout.width}": layout.bytes_per_token}
    sizes |= {k: v.bytes_per_token for k, v in {"hidden states": hidden, **others}.items() if k not in sizes}
    head_bytes = head.weight.nbytes if layout.kind == "hidden" else 0
    index = len(documents) * (DIGEST_BYTES + 8)
    return CacheEstimate(len(documents), num_tokens, num_tokens * layout.bytes_per_token + head_bytes + index, sizes)


def check_room(folder: Path, expected: CacheEstimate, tell: Callable[[CacheEstimate], object] | None = None) -> None:
    """Say what is coming, and refuse what the disk cannot hold.

    Args:
        folder: of the cache.
        expected: its size.
        tell: is told the size; None for the log.

    Raises:
        DoesNotFitError: there is too little space left.
    """
    if tell is None:
        logger.warning("%s", expected)
    else:
        tell(expected)
    there = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    free = shutil.disk_usage(folder).free
    if expected.num_bytes - there > free:
        raise DoesNotFitError(
            f"`output_dir` must have room for {expected.num_bytes:,} bytes: {folder} has {free:,} left. Cache fewer "
            "documents, or use kind='topk' with a smaller k."
        )
