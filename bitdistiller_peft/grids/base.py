"""What a code stands for: the families of grids that a quantizer can place on a group of weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Grid:
    """A finite set of codes and what they mean. Subclasses say how a code becomes a real value.

    Attributes:
        name: the name under which the grid is registered and stored, e.g. ``"int"``.
        bits: bits that one stored code takes.
    """

    name: str
    bits: int

    @property
    def num_levels(self) -> int:
        """Number of codes in use; codes are ``0 .. num_levels - 1``."""
        return 1 << self.bits

    @property
    def reach(self) -> float:
        """Half the distance of the outermost levels, in scales: how far they move where a scale grows by 1.

        That of levels one scale apart, unless a subclass says otherwise.
        """
        return (self.num_levels - 1) / 2

    @property
    def has_zero_point(self) -> bool:
        """Whether every group stores a zero point of its own."""
        return False

    @property
    def zero_step(self) -> float:
        """Distance of neighbouring zero points, in code steps, where groups store them."""
        return 1.0

    @property
    def first_zero(self) -> float:
        """What a stored zero point of 0 stands for, in code steps."""
        return 0.0

    @property
    def has_negative_scale(self) -> bool:
        """Whether negative weights have a scale of their own."""
        return False

    @property
    def has_residual_scale(self) -> bool:
        """Whether every group stores a second scale, for what the first one leaves."""
        return False


@dataclass(frozen=True)
class AffineGrid(Grid):
    """Evenly spaced levels: ``weight = scale * (code - zero_point)``.

    Attributes:
        is_symmetric: the zero point is ``2**(bits - 1)`` for every group instead of one per group.
    """

    is_symmetric: bool = False

    @property
    def max_code(self) -> int:
        """Largest code, inclusive."""
        return self.num_levels - 1

    @property
    def fixed_zero_point(self) -> int | None:
        """The zero point shared by all groups, or `None` where each group has its own."""
        return 1 << (self.bits - 1) if self.is_symmetric else None

    @property
    def has_zero_point(self) -> bool:
        """Whether every group stores its own integer zero point."""
        return not self.is_symmetric


@dataclass(frozen=True)
class FineGrid(Grid):
    """Evenly spaced levels around zero points in quarter steps: ``weight = scale * (code - zero)``.

    A group stores one of ``2**bits`` zero points, ``zero = first_zero + zero_step * code``, about the middle of the
    codes: as many bits as an integer zero point takes.
    """

    @property
    def max_code(self) -> int:
        """Largest code, inclusive, of weights and of zero points."""
        return self.num_levels - 1

    @property
    def zero_step(self) -> float:
        """Distance of neighbouring zero points, in code steps."""
        return 0.25

    @property
    def first_zero(self) -> float:
        """The zero point of code 0, in code steps; a multiple of 1/8."""
        return self.max_code * (1 - self.zero_step) / 2

    @property
    def has_zero_point(self) -> bool:
        """Whether every group stores its own zero point."""
        return True


@dataclass(frozen=True)
class TernaryGrid(AffineGrid):
    """The levels -1, 0 and 1, under a scale that is the mean magnitude of the group. Two bits store a code; 3 is spare.

    Source: BitNet b1.58, as restated in BitNet Distillation (arXiv 2510.13998), equations 1 and 2.
    """

    @property
    def num_levels(self) -> int:
        """Number of codes in use; codes are ``0 .. num_levels - 1``."""
        return 3

    @property
    def fixed_zero_point(self) -> int:
        """The code whose level is zero, for all groups."""
        return 1

    @property
    def has_zero_point(self) -> bool:
        """Whether every group stores its own integer zero point."""
        return False


@dataclass(frozen=True)
class ResidualGrid(Grid):
    """Two signs with a scale each, the second for what the first leaves: ``weight = ±scale ± residual_scale``.

    Code ``2 * (first > 0) + (second > 0)``. There is no level zero unless both scales are equal.

    Attributes:
        is_tied: the residual scale is half the scale and not stored: the levels are evenly spaced, ``scale`` apart.
    """

    is_tied: bool = False

    @property
    def reach(self) -> float:
        """Half the distance of the outermost levels, in scales; a second scale moves them apart from the first."""
        return super().reach if self.is_tied else 1.0

    @property
    def has_residual_scale(self) -> bool:
        """Whether every group stores a second scale, for what the first one leaves."""
        return not self.is_tied


@dataclass(frozen=True)
class CodebookGrid(Grid):
    """Levels at will, in units of the scale: ``weight = scale * levels[code]``, one scale per sign unless symmetric.

    Attributes:
        levels: strictly increasing values, zero among them.
        is_symmetric: positive and negative weights share one scale.
    """

    levels: tuple[float, ...] = ()
    is_symmetric: bool = False

    @property
    def reach(self) -> float:
        """Half the distance of the outermost levels, in scales."""
        return (self.levels[-1] - self.levels[0]) / 2

    @property
    def num_levels(self) -> int:
        """Number of codes in use; codes are ``0 .. num_levels - 1``."""
        return len(self.levels)

    @property
    def has_negative_scale(self) -> bool:
        """Whether negative weights have a scale of their own."""
        return not self.is_symmetric

    @cached_property
    def zero_code(self) -> int:
        """The code whose level is zero."""
        return self.levels.index(0.0)

    @cached_property
    def midpoints(self) -> tuple[float, ...]:
        """The values half-way between neighbouring levels, where the nearest level changes."""
        return tuple((low + high) / 2 for low, high in zip(self.levels, self.levels[1:], strict=False))
