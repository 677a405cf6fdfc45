"""The rules of single options."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from bitdistiller_peft.errors import ConfigError

ORDER = "order"


def checked_stages(stages: Any) -> Any:
    """Bring `stages` into one form, or refuse them."""
    if stages is None or stages == ORDER:
        return stages
    is_list = isinstance(stages, (list, tuple)) and len(stages) > 0
    if not is_list or not all(isinstance(names, (list, tuple)) and names for names in stages):
        raise ConfigError(
            f"`stages` must be None, 'order' or lists of names: got stages={stages!r}. Use e.g. "
            "(('q_proj', 'k_proj'), ('v_proj', 'o_proj'), ('gate_proj', 'up_proj', 'down_proj'))."
        )
    return tuple(tuple(map(str, names)) for names in stages)


def checked_widths(widths: Any) -> tuple[int, ...]:
    """Bring `progressive_bits` into one form, or refuse them."""
    is_list = isinstance(widths, (list, tuple)) and all(type(bits) is int for bits in widths)
    if not is_list or list(widths) != sorted(set(widths), reverse=True):
        raise ConfigError(
            f"`progressive_bits` must be falling whole numbers: got progressive_bits={widths!r}. Use (4,) or ()."
        )
    return tuple(widths)


def check_device(device: Any) -> None:
    """Refuse a device that torch does not know or cannot reach."""
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"`device` must be None or a device of this machine: got device={device!r} ({str(error).splitlines()[0]}). "
            "Use 'cuda' where there is a GPU."
        ) from None


def check_flags(options: object, names: Iterable[str]) -> None:
    """Refuse fields that are neither True nor False."""
    for name in names:
        if type(getattr(options, name)) is not bool:
            raise ConfigError(f"`{name}` must be True or False: got {name}={getattr(options, name)!r}.")


def checked_factors(values: Sequence[float]) -> tuple[float, ...]:
    """Bring `factors` into one form, falling, or refuse them."""
    try:
        factors = tuple(sorted({float(value) for value in values}, reverse=True))
    except (TypeError, ValueError):
        raise ConfigError(f"`factors` must be numbers: got factors={values!r}. Use e.g. (1.0, 0.9, 0.8).") from None
    if not factors or factors[0] != 1 or factors[-1] <= 0:
        raise ConfigError(f"`factors` must lie in (0, 1], with 1 among them: got factors={list(factors)}.")
    return factors
