"""Every exception of the house, drawn as a tree; each is also the built-in that a caller would catch.

BitDistillerError
├── ConfigError (ValueError)             a setting that cannot work
│   ├── UnknownNameError                 a name that no registry holds
│   ├── DoesNotFitError                  a run that this machine's memory or disk cannot hold
│   └── GroupSizeError                   a group size that does not divide the input width
├── TargetError (ValueError)             a module that cannot be quantized as asked
├── WeightError (ValueError)             a weight that no code can stand for: NaN, Inf, wrong dtype
│   └── ScaleRangeError                  a scale that its storage dtype cannot hold
├── StateError (RuntimeError)            a call that does not fit the model's state (latent, packed, merged)
├── CheckpointError (ValueError)         files that are damaged, incomplete or not ours
│   └── ChecksumError                    bytes that differ from the ones written
├── ExportError (ValueError)             a model that a foreign format cannot hold, or a foreign file that differs
├── ForeignModelError (ValueError)       a model of another tool that no grid of ours holds exactly
├── DataError (ValueError)               text, prompts or labels that cannot be used
├── HubError (RuntimeError)              an upload that the Hub refuses or does not answer
└── TrainingError (RuntimeError)         a run that cannot go on, for example a loss that is not finite
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BitDistillerError(Exception):
    """The root: `except BitDistillerError` catches whatever the house raises on purpose."""


class ConfigError(BitDistillerError, ValueError):
    """A setting that cannot work, refused before anything is touched."""


class UnknownNameError(ConfigError):
    """A name that the registry does not hold; the message lists those it does and the nearest one."""

    def __init__(self, kind: str, name: object, known: Iterable[str]) -> None:
        names = sorted(known)
        close = difflib.get_close_matches(str(name), names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        super().__init__(f"`{kind}` must be one of {names}: got {kind}={name!r}.{hint}")


class GroupSizeError(ConfigError):
    """A group size that does not divide the input width of a layer."""

    def __init__(self, group_size: object, in_features: int) -> None:
        divisors = [d for d in range(8, in_features + 1) if in_features % d == 0 and d <= 512]
        super().__init__(
            f"`group_size` must divide the input width: got group_size={group_size!r}, in_features={in_features}. "
            f"Use one of {divisors or [in_features]}, or group_size=-1 for one group per output row."
        )


class DoesNotFitError(ConfigError):
    """A run that the memory or the disk of this machine cannot hold; the message names the setting that would."""


class TargetError(BitDistillerError, ValueError):
    """A module that cannot be quantized as asked; the message names it."""


class WeightError(BitDistillerError, ValueError):
    """A weight that no code can stand for, such as one with NaN or Inf."""


class ScaleRangeError(WeightError):
    """A scale that overflows, or is subnormal, in the dtype it would be stored in."""


class StateError(BitDistillerError, RuntimeError):
    """A call that does not fit the state the model is in."""


class CheckpointError(BitDistillerError, ValueError):
    """Files that are damaged, incomplete, or not written by this library."""


class ChecksumError(CheckpointError):
    """Bytes on disk that differ from those that were written."""


class ExportError(BitDistillerError, ValueError):
    """A model that a foreign format cannot hold exactly, or a foreign file that differs from the model."""


class ForeignModelError(BitDistillerError, ValueError):
    """A model of another tool that no grid of ours holds exactly, or whose format is not known."""


class DataError(BitDistillerError, ValueError):
    """Text, prompts or labels that cannot be used."""


class HubError(BitDistillerError, RuntimeError):
    """An upload that the Hub refuses or does not answer; nothing was changed there or here."""


class TrainingError(BitDistillerError, RuntimeError):
    """A training run that cannot go on."""


def add_location(error: BitDistillerError, location: str) -> BitDistillerError:
    """Return the same kind of error with the place in front, for example ``layer 'model.layers.0.mlp.down_proj'``."""
    moved = error.__class__.__new__(error.__class__)
    Exception.__init__(moved, f"In {location}: {error}")
    return moved
