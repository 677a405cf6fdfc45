"""The rules of what is asked of the training inside a block."""

from __future__ import annotations

from typing import Any

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
