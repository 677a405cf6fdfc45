"""Known ways in which quantization-aware training goes wrong: how each shows in the log, and what helps.

Every threshold is a constant with its reason. They are meant to be silent on a run that works.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from torch import nn

from bitdistiller_peft.layers import SUFFIXES
from bitdistiller_peft.training.checks import smallest_learning_rate
from bitdistiller_peft.training.metrics import trained_weights

LOOKS = 3
"""Log entries in a row that must agree: one may be an accident, or lie in the warm-up."""
OSCILLATION = 0.02
"""Share of codes that swing. Tiny models at learning rates that work have up to 0.5 %, at 20 times those 10 %."""
DEAD_SCALES = 0.01
"""Share of learned scales that are dead. Adam moves every scale that has a gradient: a sound run has none."""
STUCK_WEIGHTS = 0.5
"""Share of half-precision weights that no step has changed: then most updates are rounded away."""
NO_FLIPS = 1e-6
"""Flip rate that counts as none: not one in a million codes."""
NO_FLIPS_LOOKS = 5
"""Log entries without a flip: more than for others, since flips are few while the learning rate rises."""
FULL_SPEED = 0.5
"""Share of the highest learning rate so far; below it, at both ends of a schedule, little moves, as it should."""
LOSS_WINDOW = 5
"""Log entries whose median is compared: batches differ, medians of five hardly."""
LOSS_RISE = 1.5
"""How many times its lowest median the loss may be; noise between batches of a few texts is far below that."""
LOSS_FLOOR = 1e-3
"""Nats per token below which a loss is noise around zero, and a ratio means nothing."""
ENTROPY_COLLAPSE = 0.25
"""Student's entropy over the teacher's. Reverse KL sharpens a student by a few percent, never to a quarter."""
LEAST_TEACHER_ENTROPY = 0.1
"""Nats; a teacher that is surer than that leaves nothing to collapse."""

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """One thing that goes wrong.

    Attributes:
        name: ``"dead_scales"``, ``"oscillation"``, ``"learning_rate_lost"``, ``"no_flips"``, ``"loss_rising"``,
            ``"entropy_collapse"`` or ``"not_finite"``.
        severity: ``"warning"`` for time that is wasted, ``"error"`` for a run that will not give a good model.
        seen: what showed it, with numbers.
        advice: what to change, with values that work.
    """

    name: str
    severity: str
    seen: str
    advice: str

    def __str__(self) -> str:
        """One paragraph for the log."""
        return f"{self.name.replace('_', ' ')} ({self.severity}): {self.seen} {self.advice}"

    def to_dict(self) -> dict[str, str]:
        """Plain values for ``doctor.json``."""
        return dataclasses.asdict(self)


def diagnose(log_history: Sequence[Entry], model: nn.Module | None = None) -> list[Finding]:
    """Look for known failures in what a run has logged.

    Args:
        log_history: `trainer.state.log_history`, or that of a ``trainer_state.json``; the newest entry last.
        model: the student, for advice with its own numbers.

    Returns:
        What was found at the end of the log; empty for a healthy run.

    Example:
        >>> diagnose([{"loss": 1.0}, {"loss": float("nan")}])[0].name
        'not_finite'
    """
    entries = [entry for entry in log_history if "loss" in entry]
    found = {finding.name: finding for check in _CHECKS if (finding := check(entries, model)) is not None}
    if "not_finite" in found:
        return [found["not_finite"]]  # all else follows from it
    if "learning_rate_lost" in found:
        found.pop("no_flips", None)  # codes cannot change where weights do not
    return list(found.values())


def not_finite(seen: str) -> Finding:
    """The finding of a run that was stopped by a loss or gradient that is NaN or infinite.

    Args:
        seen: a sentence.
    """
    advice = (
        "Lower learning_rate to a tenth, set max_grad_norm=1.0, and use bf16=True rather than fp16=True. Then resume "
        "from the last checkpoint."
    )
    return Finding("not_finite", "error", seen, advice)


def _not_finite(entries: Sequence[Entry], model: nn.Module | None) -> Finding | None:
    bad = next((entry for entry in entries if not math.isfinite(entry["loss"])), None)
    return None if bad is None else not_finite(f"The loss was {bad['loss']} at step {bad.get('step', '?')}.")


def _loss_rising(entries: Sequence[Entry], model: nn.Module | None) -> Finding | None:
    losses = [float(entry["loss"]) for entry in entries]
    if len(losses) < 2 * LOSS_WINDOW:
        return None
    # windows from the end, so that the last one is whole
    medians = [median(losses[end - LOSS_WINDOW : end]) for end in range(len(losses), LOSS_WINDOW - 1, -LOSS_WINDOW)]
    lowest, last = min(medians), medians[0]
    if not last > max(LOSS_RISE * lowest, LOSS_FLOOR):
        return None
    rate = _rate(entries)
    seen = f"The loss rose from {lowest:.4g} to {last:.4g} (medians of {LOSS_WINDOW} log entries)."
    return Finding(
        "loss_rising",
        "error",
        seen,
        f"Lower learning_rate{_to(rate / 10)}, set max_grad_norm=1.0 and warmup_steps=0.1 (a tenth of all steps), and "
        "start again from the last checkpoint before the rise.",
    )


def _entropy_collapse(entries: Sequence[Entry], model: nn.Module | None) -> Finding | None:
    last = _last(entries, LOOKS, "entropy", "teacher_entropy")
    ratios = [e["entropy"] / e["teacher_entropy"] for e in last if e["teacher_entropy"] > LEAST_TEACHER_ENTROPY]
    if len(ratios) < LOOKS or max(ratios) > ENTROPY_COLLAPSE:
        return None
    ours, theirs = last[-1]["entropy"], last[-1]["teacher_entropy"]
    return Finding(
        "entropy_collapse",
        "error",
        f"The student's entropy is {ours:.3g} nats per token, the teacher's {theirs:.3g}: it gives one token nearly "
        "all probability, and will repeat itself.",
        "Use more forward KL (loss_type='cakld' with gamma=0.2, ce_weight=0), lower learning_rate"
        f"{_to(_rate(entries) / 4)}, and look whether the training texts repeat.",
    )


def _dead_scales(entries: Sequence[Entry], model: nn.Module | None) -> Finding | None:
    last = _last(entries, LOOKS, "dead_scales")
    if len(last) < LOOKS or min(entry["dead_scales"] for entry in last) < DEAD_SCALES or not _rate(last):
        return None
    return Finding(
        "dead_scales",
        "warning",
        f"{last[-1]['dead_scales']:.1%} of the learned scales are at the smallest number that can be stored, or have "
        "not moved since the start.",
        "Start from calibrated ranges (calibrate(model, tokenizer, texts)), leave scale_learning_rate at None (that of "
        f"the weights, {_rate(last):.1g}) or at most 1e-4, and train scales with Adam, not SGD. doctor.json names the "
        "layers.",
    )


def _oscillation(entries: Sequence[Entry], model: nn.Module | None) -> Finding | None:
    last = _last(entries, LOOKS, "oscillation")
    if len(last) < LOOKS or min(entry["oscillation"] for entry in last) < OSCILLATION:
        return None
    return Finding(
        "oscillation",
        "warning",
        f"{last[-1]['oscillation']:.1%} of the codes flip back and forth between neighbours instead of settling.",
        f"Lower learning_rate{_to(_rate(entries) / 4)}, let it fall to zero (lr_scheduler_type='cosine'), or average "
        "over more texts (gradient_accumulation_steps 4 times as large).",
    )


def _learning_rate_lost(entries: Sequence[Entry], model: nn.Module | None) -> Finding | None:
    last = _last(_at_full_speed(entries), LOOKS, "stuck_weights")
    if len(last) < LOOKS or min(entry["stuck_weights"] for entry in last) < STUCK_WEIGHTS:
        return None
    smallest = None if model is None else smallest_learning_rate(model)
    also = "" if smallest is None else f" Otherwise learning_rate must be at least {smallest:.1e}, with Adam."
    return Finding(
        "learning_rate_lost",
        "error",
        f"{last[-1]['stuck_weights']:.0%} of the half-precision master weights did not change between log entries, at "
        f"learning_rate={_rate(last):.1g}: an update below 2**-9 of a bf16 weight is rounded away.",
        f"Use master_dtype='float32' in BitDistillerConfig, which works at any learning rate.{also}",
    )


def _no_flips(entries: Sequence[Entry], model: nn.Module | None) -> Finding | None:
    last = _last(_at_full_speed(entries), NO_FLIPS_LOOKS, "flip_rate")
    if len(last) < NO_FLIPS_LOOKS or max(entry["flip_rate"] for entry in last) > NO_FLIPS or not _rate(last):
        return None
    if model is not None and not _trains_weights(model):
        return None  # scales alone are trained
    return Finding(
        "no_flips",
        "warning",
        f"No code has changed in {NO_FLIPS_LOOKS} log entries at learning_rate={_rate(last):.1g}: the weights do not "
        "reach the next level, and only scales learn.",
        f"Raise learning_rate{_to(max(10 * _rate(last), 1e-5))}; short runs on small models want about 1e-4.",
    )


def _trains_weights(model: nn.Module) -> bool:
    """Whether a weight is trained, or a low-rank update of it, and not only scales and zero points."""
    named = (entry for holder, _, _ in trained_weights(model) for entry in holder.named_parameters(recurse=False))
    return any(tensor.requires_grad and not name.endswith(SUFFIXES) for name, tensor in named)


_CHECKS: tuple[Callable[[Sequence[Entry], nn.Module | None], Finding | None], ...] = (
    _not_finite,
    _loss_rising,
    _entropy_collapse,
    _dead_scales,
    _oscillation,
    _learning_rate_lost,
    _no_flips,
)


def _last(entries: Sequence[Entry], count: int, *names: str) -> list[Entry]:
    """The newest entries that have all of these figures."""
    return [entry for entry in entries if all(name in entry for name in names)][-count:]


def _rate(entries: Sequence[Entry]) -> float:
    """The highest learning rate of some entries; 0 where none was logged."""
    return max((float(entry.get("learning_rate", 0.0)) for entry in entries), default=0.0)


def _at_full_speed(entries: Sequence[Entry]) -> list[Entry]:
    """Entries whose learning rate is near the highest; the ends of a schedule are left out."""
    highest = _rate(entries)
    return [entry for entry in entries if highest and entry.get("learning_rate", 0.0) >= FULL_SPEED * highest]


def _to(rate: float) -> str:
    return f" to {rate:.1g}" if rate else ""
