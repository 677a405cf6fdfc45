"""One declaration per operation, and the set of backends that implement it.

A backend is chosen by capability, best first. `use_backend` forces one in a `with` block, `set_backend` in the process,
the environment variable ``BITDISTILLER_BACKEND`` from outside. The reference is always there and defines the right
answer; it is the only backend whose logits equal the training forward bit for bit.
"""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

import torch
from torch import Tensor

from bitdistiller_peft.errors import ConfigError, UnknownNameError
from bitdistiller_peft.quantizers import REFERENCE_SWEEPS, QuantParams, QuantSpec, Sweeps

logger = logging.getLogger(__name__)

BACKEND_VARIABLE = "BITDISTILLER_BACKEND"
AUTO = "auto"
MAX_SELECTED = 4096


class Backend(ABC):
    """The operations on packed weights, and fake quantization. Subclasses are final."""

    name: str
    sweeps: Sweeps = REFERENCE_SWEEPS
    """How weights are fake-quantized in training."""

    @abstractmethod
    def is_available(self, device: torch.device) -> bool:
        """Whether this machine can run the backend for tensors on `device`."""

    def supports(self, spec: QuantSpec, dtype: torch.dtype) -> bool:
        """Whether the backend can multiply such a weight in such a compute dtype; others go to the next backend."""
        return spec.packing == "bitstream"

    def details(self) -> str:
        """What a summary says beside the name, such as an instruction set."""
        return ""

    @abstractmethod
    def dequantize(
        self, words: Tensor, params: QuantParams, spec: QuantSpec, in_features: int, dtype: torch.dtype
    ) -> Tensor:
        """Turn packed words ``[..., out, words]`` (zero points packed likewise) into a weight ``[..., out, in]``."""

    def packed_embedding(
        self, ids: Tensor, words: Tensor, params: QuantParams, spec: QuantSpec, in_features: int, dtype: torch.dtype
    ) -> Tensor:
        """Look up rows of a packed ``[rows, in]`` weight: ``[..., in]``. Only the rows asked for are unpacked."""
        flat = ids.reshape(-1)
        if spec.group_size != "tensor":
            params = QuantParams(*(None if t is None else t.index_select(0, flat) for t in params))  # type: ignore[arg-type]
        rows = self.dequantize(words.index_select(0, flat), params, spec, in_features, dtype)
        return rows.reshape(*ids.shape, in_features)

    @abstractmethod
    def packed_linear(
        self, inputs: Tensor, words: Tensor, params: QuantParams, spec: QuantSpec, bias: Tensor | None
    ) -> Tensor:
        """Multiply ``[..., in]`` by a packed ``[out, in]`` weight: ``[..., out]`` in the dtype of the inputs."""

    def ternary_int8_linear(
        self, inputs: Tensor, words: Tensor, params: QuantParams, spec: QuantSpec, bias: Tensor | None
    ) -> Tensor | None:
        """Multiply int8-quantized activations by a packed ternary weight, exactly; no gradient.

        Returns:
            ``[..., out]`` as `kernels.ternary_int8_linear` gives it, or `None` for a product with the dense weight.
        """
        return None


def needs_gradient(inputs: Tensor, bias: Tensor | None) -> bool:
    """Whether autograd will ask for what a product with a packed weight depends on."""
    return torch.is_grad_enabled() and (inputs.requires_grad or (bias is not None and bias.requires_grad))


def dequantize_stack(
    backend: Backend, words: Tensor, params: QuantParams, spec: QuantSpec, in_features: int, dtype: torch.dtype
) -> Tensor:
    """`Backend.dequantize` of a stack ``[..., out, words]``, one matrix after the other."""
    matrices = []
    for index in range(len(words)):
        own = QuantParams(*(None if tensor is None else tensor[index] for tensor in params))  # type: ignore[arg-type]
        matrices.append(backend.dequantize(words[index], own, spec, in_features, dtype))
    return torch.stack(matrices)


_BACKENDS: dict[str, Backend] = {}
_FORCED: ContextVar[str | None] = ContextVar("bitdistiller_backend", default=None)
_selected: dict[tuple[object, ...], tuple[QuantSpec, str]] = {}
_default: list[str] = [os.environ.get(BACKEND_VARIABLE) or AUTO]


def register_backend(backend: Backend) -> None:
    """Add a backend; later ones are preferred over earlier ones.

    Raises:
        ConfigError: the name is taken.
    """
    if backend.name in _BACKENDS:
        raise ConfigError(f"`name` must be new: got name={backend.name!r}. Registered backends: {backend_names()}.")
    _BACKENDS[backend.name] = backend
    _selected.clear()


def backend_names() -> list[str]:
    """List the backends, the most preferred last."""
    return list(_BACKENDS)


def get_backend(device: torch.device) -> Backend:
    """Choose the forced backend, or the most preferred one that is available for `device`."""
    forced = _FORCED.get() or _default[0]
    if forced != AUTO:
        return _named(forced)
    return next(backend for backend in reversed(_BACKENDS.values()) if backend.is_available(device))


def select_backend(device: torch.device, spec: QuantSpec, dtype: torch.dtype) -> Backend:
    """Choose the backend for one weight: as `get_backend`, among those that can take the weight and the dtype.

    A forced backend that cannot take them is left with one notice. A compiled program keeps what was chosen for it.
    """
    return _BACKENDS[_select_name(device, spec, dtype)]


@torch.compiler.assume_constant_result
def _select_name(device: torch.device, spec: QuantSpec, dtype: torch.dtype) -> str:
    forced = _FORCED.get() or _default[0]
    key = (id(spec), device, dtype, forced)
    known = _selected.get(key)  # every product asks
    if known is not None and known[0] is spec:
        return known[1]
    chosen = get_backend(device)
    if not chosen.supports(spec, dtype):
        if forced != AUTO:
            _notice(chosen.name, spec.grid.name, spec.grid.bits, dtype)
        others = (backend for backend in reversed(_BACKENDS.values()) if backend.supports(spec, dtype))
        chosen = next(backend for backend in others if backend.is_available(device))
    if len(_selected) > MAX_SELECTED:
        _selected.clear()
    _selected[key] = spec, chosen.name
    return chosen.name


def backend_info(device: torch.device | str = "cpu") -> str:
    """The backend that packed layers use on a device by default, with its details: ``"cpu (avx512_bf16)"``."""
    backend = get_backend(torch.device(device))
    details = backend.details()
    return f"{backend.name} ({details})" if details else backend.name


def set_backend(name: str) -> None:
    """Force one backend in this process, or go back to choosing by capability with ``"auto"``.

    Raises:
        UnknownNameError: no backend has this name.
    """
    if name != AUTO:
        _named(name)
    _default[0] = name


def _named(name: str) -> Backend:
    if name not in _BACKENDS:
        raise UnknownNameError("backend", name, _BACKENDS)
    return _BACKENDS[name]


@lru_cache(maxsize=64)
def _notice(name: str, grid: str, bits: int, dtype: torch.dtype) -> None:
    logger.warning("backend %r cannot multiply grid=%r, bits=%s in %s: another one does", name, grid, bits, dtype)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend inside a `with` block, in this thread.

    Args:
        name: one of `backend_names()`, e.g. ``"reference"``.

    Raises:
        UnknownNameError: no backend has this name.
    """
    _named(name)
    token = _FORCED.set(name)
    try:
        yield
    finally:
        _FORCED.reset(token)
