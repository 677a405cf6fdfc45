"""The second opinion on the losses: Python floats, one vocabulary entry at a time, straight from the definitions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

Vector = Sequence[float]


def log_softmax(logits: Vector) -> list[float]:
    top = max(logits)
    log_z = top + math.log(math.fsum(math.exp(logit - top) for logit in logits))
    return [logit - log_z for logit in logits]


def kl(log_p: Vector, log_q: Vector) -> float:
    """Sum of p * log(p / q) over the outcomes that p allows."""
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True) if math.exp(a) > 0)


def forward_kl(student: Vector, teacher: Vector) -> float:
    return kl(log_softmax(teacher), log_softmax(student))


def reverse_kl(student: Vector, teacher: Vector) -> float:
    return kl(log_softmax(student), log_softmax(teacher))


def jensen_shannon(student: Vector, teacher: Vector, beta: float = 0.5) -> float:
    if beta == 0:
        return forward_kl(student, teacher)
    if beta == 1:
        return reverse_kl(student, teacher)
    log_s, log_t = log_softmax(student), log_softmax(teacher)
    shares = [(1 - beta) * math.exp(a) + beta * math.exp(b) for a, b in zip(log_s, log_t, strict=True)]
    log_m = [math.log(share) if share > 0 else -math.inf for share in shares]
    return beta * kl(log_t, log_m) + (1 - beta) * kl(log_s, log_m)


def entropy(logits: Vector) -> float:
    return -math.fsum(math.exp(a) * a for a in log_softmax(logits) if math.exp(a) > 0)


def project(
    hidden: Vector, weight: Sequence[Vector], bias: Vector | None, scale: float, cap: float | None
) -> list[float]:
    logits = []
    for index, row in enumerate(weight):
        logit = math.fsum(h * w for h, w in zip(hidden, row, strict=True))
        logit += 0.0 if bias is None else bias[index]
        logit *= scale
        logits.append(logit if cap is None else cap * math.tanh(logit / cap))
    return logits


def statistics(student: Vector, teacher: Vector, label: int, temperature: float, beta: float) -> dict[str, float]:
    """Everything that is measured for one token."""
    warm_student, warm_teacher = [x / temperature for x in student], [x / temperature for x in teacher]
    return {
        "cross_entropy": -log_softmax(student)[label],
        "student_entropy": entropy(student),
        "teacher_entropy": entropy(teacher),
        "confidence": math.exp(log_softmax(teacher)[label]),
        "agreement": float(student.index(max(student)) == teacher.index(max(teacher))),
        "forward_kl": forward_kl(warm_student, warm_teacher),
        "reverse_kl": reverse_kl(warm_student, warm_teacher),
        "jsd": jensen_shannon(warm_student, warm_teacher, beta),
    }


def token_loss(
    measured: Mapping[str, float], parts: Mapping[str, float], gamma: float | str | None, divergence_factor: float
) -> float:
    """The objective for one token, from what `statistics` measured."""
    loss = 0.0
    for part, weight in parts.items():
        if part == "ce":
            loss += weight * measured["cross_entropy"]
        elif part == "cakld":
            share = measured["confidence"] if gamma == "per_token" else float(gamma or 0.0)
            mixed = share * measured["reverse_kl"] + (1 - share) * measured["forward_kl"]
            loss += divergence_factor * weight * mixed
        else:
            loss += divergence_factor * weight * measured[part]
    return loss
