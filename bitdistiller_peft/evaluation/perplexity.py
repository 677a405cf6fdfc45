"""Perplexity, with the protocol that it was measured by and the state of what was measured."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitdistiller_peft.errors import TrainingError
from bitdistiller_peft.evaluation.forward import progress, run, tiles, widened
from bitdistiller_peft.evaluation.protocol import check_fits, cut_text
from bitdistiller_peft.evaluation.state import detect_state
from bitdistiller_peft.tuner import borrowed


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity and what it means.

    Attributes:
        perplexity: `exp(nll_nats_per_token)`.
        nll_nats_per_token: mean negative log-likelihood of the predicted tokens.
        num_tokens: how many tokens were predicted.
        num_chunks: how many chunks they came from.
        protocol: how it was measured; two perplexities are comparable if, and only if, this is equal.
        state: what was measured, see `detect_state`.
        seconds: how long it took.
        chunk_nll_nats: mean negative log-likelihood of each chunk, for paired comparisons of two models.
    """

    perplexity: float
    nll_nats_per_token: float
    num_tokens: int
    num_chunks: int
    protocol: str
    state: str
    seconds: float
    chunk_nll_nats: tuple[float, ...] = field(repr=False)

    def __str__(self) -> str:
        return f"perplexity {self.perplexity:,.2f} | {self.protocol} | evaluated as: {self.state}"


def evaluate_perplexity(
    model: nn.Module,
    tokenizer: Any,
    text: str | Sequence[str],
    *,
    seq_len: int = 512,
    max_chunks: int | None = None,
    batch_size: int = 1,
    allow_latent: bool = False,
    show_progress: bool = True,
) -> PerplexityResult:
    """Measure how well a causal language model predicts a text.

    Non-overlapping chunks, each token predicted from those before it in its chunk (`evaluation.protocol` has the
    rules). Logits are taken as the model computes them and widened to fp32, a piece at a time. The model is run in eval
    mode; train mode, adapters, gradient flags and random state are given back as they were.

    Args:
        model: a transformers model or a `PeftModel`, in whatever state; the state is found out and reported.
        tokenizer: the model's tokenizer.
        text: one text, or the rows of a data set, joined as `evaluation.protocol.join_rows` says.
        seq_len: tokens per chunk; what is left over at the end of the text is dropped.
        max_chunks: use only that many chunks from the beginning.
        batch_size: chunks per forward pass; changes speed, memory and the last digits, not the protocol.
        allow_latent: score the float master weights of a latent checkpoint as they are.
        show_progress: show a progress bar.

    Returns:
        The perplexity, its protocol and the model's state.

    Raises:
        ConfigError: a number out of range, or `seq_len` beyond the model's context.
        DataError: the text is empty or shorter than a chunk, or the tokenizer is not the model's.
        StateError: the layers are in different states, or see `allow_latent`.
        TrainingError: a log-likelihood is not finite; the chunk is named.

    Example:
        >>> print(evaluate_perplexity(model, tokenizer, text, max_chunks=40))  # doctest: +SKIP
        perplexity 28.70 | ppl/v1/seq_len=512/chunks=40/bos=no/tokens=... | evaluated as: full_precision
    """
    state = detect_state(model, allow_latent=allow_latent)
    chunks = cut_text(tokenizer, text, seq_len=seq_len, max_chunks=max_chunks)
    check_fits(model, chunks)
    batches = chunks.batches(batch_size)
    start = time.perf_counter()
    sums: list[float] = []
    with borrowed(model), progress("Perplexity", len(chunks.ids), show_progress) as bar:
        for ids in batches:
            sums += _chunk_sums(run(model, ids), ids, first=len(sums))
            bar.set_postfix(perplexity=f"{_exp(sum(sums) / (len(sums) * (seq_len - 1))):,.2f}", refresh=False)
            bar.update(len(ids))
    nll = math.fsum(sums) / chunks.num_predictions
    return PerplexityResult(
        perplexity=_exp(nll),
        nll_nats_per_token=nll,
        num_tokens=chunks.num_predictions,
        num_chunks=len(sums),
        protocol=f"ppl/{chunks.protocol}",
        state=state,
        seconds=time.perf_counter() - start,
        chunk_nll_nats=tuple(total / (seq_len - 1) for total in sums),
    )


def _chunk_sums(logits: Tensor, ids: Tensor, first: int) -> list[float]:
    """Negative log-likelihood of each chunk of a batch, summed over its predictions, in nats."""
    ids = ids.to(logits.device)
    sums = torch.zeros(len(ids), dtype=torch.float64)
    for row, positions in tiles(ids, logits.shape[-1]):
        targets = ids[row, positions.start + 1 : positions.stop + 1]
        nll = F.cross_entropy(widened(logits[row, positions]), targets, reduction="none")
        sums[row] += nll.double().sum().cpu()
    for row in (~sums.isfinite()).nonzero().flatten().tolist():
        raise TrainingError(
            f"every token must have a finite log-likelihood: got {sums[row].item()} in chunk {first + row}. "
            "Look for NaN or Inf in the weights, or for a dtype that overflows."
        )
    return sums.tolist()


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
