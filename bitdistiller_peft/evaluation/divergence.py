"""How far a student's predictions are from its teacher's: finer than perplexity, and without a reference text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bitdistiller_peft.errors import TrainingError
from bitdistiller_peft.evaluation.forward import progress, run, tiles, widened
from bitdistiller_peft.evaluation.protocol import Chunks, check_fits, cut_text
from bitdistiller_peft.evaluation.state import detect_state
from bitdistiller_peft.evaluation.teacher import check_teacher, speaking
from bitdistiller_peft.losses import forward_kl
from bitdistiller_peft.tuner import borrowed


@dataclass(frozen=True)
class DivergenceResult:
    """A divergence and what it means.

    Attributes:
        mean_kl_nats: mean KL(teacher ‖ student) per predicted token.
        p95_kl_nats: the value that 95 % of the tokens stay below (linear interpolation).
        top1_agreement: share of the positions at which both find the same token likeliest.
        num_tokens: how many positions were compared.
        num_chunks: how many chunks they came from.
        protocol: how it was measured; two divergences from the same teacher are comparable if, and only if, this is
            equal.
        state: state of the student, see `detect_state`.
        teacher_state: state of the teacher.
        seconds: how long it took.
    """

    mean_kl_nats: float
    p95_kl_nats: float
    top1_agreement: float
    num_tokens: int
    num_chunks: int
    protocol: str
    state: str
    teacher_state: str
    seconds: float

    def __str__(self) -> str:
        return (
            f"KL(teacher ‖ student) {self.mean_kl_nats:.4f} nats/token, 95 % below {self.p95_kl_nats:.4f}, "
            f"top-1 agreement {self.top1_agreement:.1%} | {self.protocol} | "
            f"evaluated as: {self.state}, teacher: {self.teacher_state}"
        )


def evaluate_divergence(
    student: nn.Module,
    teacher: nn.Module | Literal["self"],
    tokenizer: Any,
    text: str | Sequence[str],
    *,
    seq_len: int = 512,
    max_chunks: int | None = None,
    batch_size: int = 1,
    allow_latent: bool = False,
    show_progress: bool = True,
) -> DivergenceResult:
    """Compare a student's next-token distributions with its teacher's over a text.

    Chunks and positions are those of `evaluate_perplexity`. Both models are run in eval mode, and given back as they
    were.

    Args:
        student: a transformers model or a `PeftModel`.
        teacher: a model with the same vocabulary, or ``"self"``: the student with its adapters disabled.
        tokenizer: the tokenizer of both.
        text: one text, or rows.
        seq_len: tokens per chunk.
        max_chunks: use only that many chunks from the beginning.
        batch_size: chunks per forward pass.
        allow_latent: let the student be the float master weights of a latent checkpoint.
        show_progress: show a progress bar.

    Raises:
        ConfigError: a number out of range, `seq_len` beyond a context, vocabularies of different size, or another
            text than ``"self"``.
        DataError: the text is empty or shorter than a chunk, or the tokenizer is not the models'.
        StateError: ``"self"`` for a model that is no student in force, or a model against itself.
        TrainingError: a divergence is not finite; the chunk is named.
    """
    state = detect_state(student, allow_latent=allow_latent)
    teacher_state = check_teacher(student, teacher, state)
    chunks = cut_text(tokenizer, text, seq_len=seq_len, max_chunks=max_chunks)
    check_fits(student, chunks, "student")
    if not isinstance(teacher, str):
        check_fits(teacher, chunks, "teacher")
    start = time.perf_counter()
    kls, agreements = _compare(student, teacher, chunks, batch_size, show_progress)
    return DivergenceResult(
        mean_kl_nats=float(kls.mean(dtype=np.float64)),
        p95_kl_nats=float(np.quantile(kls, 0.95)),
        top1_agreement=agreements / len(kls),
        num_tokens=len(kls),
        num_chunks=len(chunks.ids),
        protocol=f"kl/{chunks.protocol}",
        state=state,
        teacher_state=teacher_state,
        seconds=time.perf_counter() - start,
    )


def _compare(
    student: nn.Module, teacher: nn.Module | str, chunks: Chunks, batch_size: int, show_progress: bool
) -> tuple[npt.NDArray[np.floating[Any]], int]:
    """KL of every predicting position, in reading order, and the number of top-1 agreements."""
    batches = chunks.batches(batch_size)
    kls: list[Tensor] = []
    agreements = count = 0
    total = 0.0
    models = [student] if isinstance(teacher, str) else [student, teacher]
    with borrowed(*models), progress("Divergence", len(chunks.ids), show_progress) as bar:
        for index, ids in enumerate(batches):
            student_logits = run(student, ids)
            with speaking(teacher, student) as speaker:
                teacher_logits = run(speaker, ids)
            kl, agreed = _compare_batch(student_logits, teacher_logits, ids, first=index * batch_size)
            kls.append(kl)
            agreements += agreed
            total += kl.sum(dtype=torch.float64).item()
            count += kl.numel()
            bar.set_postfix(kl=f"{total / count:.4f}", refresh=False)
            bar.update(len(ids))
    return torch.cat(kls).numpy(), agreements


def _compare_batch(student_logits: Tensor, teacher_logits: Tensor, ids: Tensor, first: int) -> tuple[Tensor, int]:
    """KL of every predicting position of a batch, in reading order on the CPU, and the number of agreements."""
    kls, agreements = [], 0
    for row, positions in tiles(ids, student_logits.shape[-1]):
        ours = widened(student_logits[row, positions])
        theirs = widened(teacher_logits[row, positions].to(ours.device))
        kl = forward_kl(ours, theirs)
        if not bool(kl.isfinite().all()):
            raise TrainingError(
                f"every divergence must be finite: got NaN or Inf in chunk {first + row}. "
                "Look for NaN or Inf in the weights of both models."
            )
        kls.append(kl.cpu())
        agreements += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    return torch.cat(kls), agreements
