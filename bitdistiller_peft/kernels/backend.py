"""One declaration per operation, and the set of backends that implement it.

A backend is chosen by capability, best first, and can be forced with `use_backend`. The reference is always there and
defines the right answer; it is the only backend whose logits equal the training forward bit for bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from bitdistiller_peft.errors import ConfigError, UnknownNameError
from bitdistiller_peft.quantizers import QuantParams, QuantSpec


class Backend(ABC):
    """The operations on packed weights. Subclasses are final."""

    name: str

    @abstractmethod
    def is_available(self, device: torch.device) -> bool:
        """Whether this machine can run the backend for tensors on `device`."""

    @abstractmethod
    def dequantize(
        self, words: Tensor, params: QuantParams, spec: QuantSpec, in_features: int, dtype: torch.dtype
    ) -> Tensor:
        """Turn packed words ``[..., out, words]`` (zero points packed likewise) into a weight ``[..., out, in]``."""

    @abstractmethod
    def packed_linear(
        self, inputs: Tensor, words: Tensor, params: QuantParams, spec: QuantSpec, bias: Tensor | None
    ) -> Tensor:
        """Multiply ``[..., in]`` by a packed ``[out, in]`` weight: ``[..., out]`` in the dtype of the inputs."""


_BACKENDS: dict[str, Backend] = {}
_FORCED: ContextVar[str | None] = ContextVar("bitdistiller_backend", default=None)


def register_backend(backend: Backend) -> None:
    """Add a backend; later ones are preferred over earlier ones.

    Raises:
        ConfigError: the name is taken.
    """
    if backend.name in _BACKENDS:
        raise ConfigError(f"`name` must be new: got name={backend.name!r}. Registered backends: {backend_names()}.")
    _BACKENDS[backend.name] = backend


def backend_names() -> list[str]:
    """List the backends, the most preferred last."""
    return list(_BACKENDS)


def get_backend(device: torch.device) -> Backend:
    """Choose the forced backend, or the most preferred one that is available for `device`."""
    forced = _FORCED.get()
    if forced is not None:
        return _BACKENDS[forced]
    return next(backend for backend in reversed(_BACKENDS.values()) if backend.is_available(device))


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend inside a `with` block, in this thread.

    Args:
        name: one of `backend_names()`, e.g. ``"reference"``.

    Raises:
        UnknownNameError: no backend has this name.
    """
    if name not in _BACKENDS:
        raise UnknownNameError("backend", name, _BACKENDS)
    token = _FORCED.set(name)
    try:
        yield
    finally:
        _FORCED.reset(token)
