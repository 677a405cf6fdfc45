"""Divergences by name. The set is open: `register_divergence` takes one more.

A divergence is a function of `(student_logits, teacher_logits)`, both `[tokens, vocab]` in fp32, to nats per token
`[tokens]`, differentiable by autograd in its first argument. Register it once at import; from then on its name is a
`loss_type` of `Objective` and a key of a mixture. The fused loss calls it on one tile of tokens at a time, so it needs
no more memory than the built-in ones. The built-in names have closed-form gradients there and are also found here.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.losses.divergences import forward_kl, jensen_shannon, reverse_kl
from bitdistiller_peft.registry import look_up

Divergence = Callable[[Tensor, Tensor], Tensor]

_LOSS_TYPES = ("cakld", "ce", "mixture")
_STATISTICS = ("loss", "cross_entropy", "student_entropy", "teacher_entropy", "confidence", "agreement")
RESERVED_NAMES = (*_LOSS_TYPES, *_STATISTICS)
"""Loss types that are not a function of two sets of logits alone, and statistics that are reported under their name."""

_DIVERGENCES: dict[str, Divergence] = {}


def register_divergence(name: str, function: Divergence) -> None:
    """Add a divergence under a new name.

    Args:
        name: what users write as `loss_type` or as a key of a mixture.
        function: maps student and teacher logits, `[tokens, vocab]`, to nats per token, `[tokens]`.

    Raises:
        ConfigError: the name is taken or reserved.
    """
    if name in _DIVERGENCES or name in RESERVED_NAMES:
        taken = sorted({*_DIVERGENCES, *RESERVED_NAMES})
        raise ConfigError(f"`name` must be new: got name={name!r}. Names in use: {taken}.")
    _DIVERGENCES[name] = function


def divergence_names() -> list[str]:
    """List the registered names, sorted."""
    return sorted(_DIVERGENCES)


def get_divergence(name: str) -> Divergence:
    """Look up a divergence.

    Args:
        name: a registered name, e.g. ``"forward_kl"``.

    Raises:
        UnknownNameError: no divergence has this name.
    """
    return look_up(_DIVERGENCES, "divergence", name)


register_divergence("forward_kl", forward_kl)
register_divergence("reverse_kl", reverse_kl)
register_divergence("jsd", jensen_shannon)
