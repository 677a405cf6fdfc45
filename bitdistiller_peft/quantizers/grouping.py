"""Groups: the runs of weights that share a scale, always along the input axis."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from bitdistiller_peft.errors import ConfigError, GroupSizeError

GroupSize = int | Literal["tensor"]


def check_group_size(group_size: object) -> None:
    """Refuse anything but a positive integer, ``-1`` and ``"tensor"``.

    Raises:
        ConfigError: another value.
    """
    is_int = isinstance(group_size, int) and not isinstance(group_size, bool)
    if group_size == "tensor" or (is_int and (group_size == -1 or group_size > 0)):  # type: ignore[operator]
        return
    raise ConfigError(
        f"`group_size` must be a positive integer, -1 (one group per output row) or 'tensor': "
        f"got group_size={group_size!r}. Use 64 or 128."
    )


def num_groups(in_features: int, group_size: int) -> int:
    """Count the groups of one output row.

    Raises:
        GroupSizeError: `group_size` does not divide `in_features`.
    """
    if group_size == -1:
        return 1
    if in_features % group_size:
        raise GroupSizeError(group_size, in_features)
    return in_features // group_size


def to_groups(weight: Tensor, group_size: GroupSize) -> Tensor:
    """View a weight as its groups.

    Args:
        weight: ``[..., out, in]``.
        group_size: weights per scale.

    Returns:
        ``[..., out, groups, group]``, or ``[..., 1, 1, out * in]`` for ``"tensor"``.

    Raises:
        GroupSizeError: `group_size` does not divide ``in``.
    """
    *batch, out_features, in_features = weight.shape
    if group_size == "tensor":
        return weight.reshape(*batch, 1, 1, out_features * in_features)
    groups = num_groups(in_features, group_size)
    return weight.reshape(*batch, out_features, groups, in_features // groups)
