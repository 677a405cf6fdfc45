"""Fake-quantized values that are computed once and used again until a weight changes.

Micro-batches that share an optimizer step, and gradient checkpointing, which runs each forward pass twice, ask for the
same values again and again. While they are kept, a module quantizes once, and hands out the same memory to every graph.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

KEPT = "_kept_values"  # in a module's own dictionary, out of sight of state dicts
State = tuple[object, ...]


class KeptValues:
    """Keeps the values of some modules from `start` to `stop`.

    Writing into a tensor in place is noticed by its version counter. What writes past it, as some optimizers do, must
    be followed by `forget`.

    Args:
        modules: with quantized parameters.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(modules)

    def start(self) -> None:
        """Keep values from now on."""
        for module in self._modules:
            module.__dict__[KEPT] = {}

    def forget(self) -> None:
        """Free all values; the next call of each module quantizes again."""
        for module in self._modules:
            module.__dict__.get(KEPT, {}).clear()

    def stop(self) -> None:
        """Free all values and keep no more."""
        for module in self._modules:
            module.__dict__.pop(KEPT, None)


def find_kept(module: nn.Module, name: str, dtype: torch.dtype, sources: Iterable[Tensor | None]) -> Tensor | None:
    """The values of a parameter, if they are kept and nothing has changed.

    Args:
        module: holds the parameter.
        name: its name.
        dtype: of the values.
        sources: every tensor that they are computed from.
    """
    entry = module.__dict__.get(KEPT, {}).get((name, dtype))
    return entry[1] if entry is not None and entry[0] == _state(sources) else None


def keep(module: nn.Module, name: str, values: Tensor, sources: Iterable[Tensor | None]) -> None:
    """Keep values that were just computed, if the module keeps any.

    Args:
        module: holds the parameter.
        name: its name.
        values: of it.
        sources: every tensor that they were computed from.
    """
    kept = module.__dict__.get(KEPT)
    if kept is not None:
        kept[name, values.dtype] = (_state(sources), values.detach())


def _state(sources: Iterable[Tensor | None]) -> State:
    return tuple(None if t is None else (t.data_ptr(), t.dtype, 0 if t.is_inference() else t._version) for t in sources)
