"""Parameters that several processes hold in parts: FSDP2's `DTensor`s and ZeRO-3's emptied parameters, made whole.

All of this is collective: every process must call it, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_ZERO_MARK = "ds_id"


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is held in parts, or was emptied because others hold it."""
    return isinstance(tensor, DTensor) or hasattr(tensor, _ZERO_MARK)


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape that a tensor has when it is whole."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def whole(tensor: Tensor) -> Tensor:
    """A `DTensor` put together, differentiable; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def gathered(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Fill what ZeRO-3 has emptied for the time being; nothing happens to other parameters, or to filled ones.

    Args:
        parameters: of one model. They must not be written.
    """
    emptied = [parameter for parameter in parameters if hasattr(parameter, _ZERO_MARK) and not parameter.numel()]
    if not emptied:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(emptied):
        yield


@contextmanager
def unsharded(*modules: nn.Module | None) -> Iterator[None]:
    """Let modules hold whole parameters for the time being; parameters of their own stay as they are.

    Args:
        modules: as small as possible, since every process holds them whole; None counts for nothing.
    """
    holders = [inner for module in modules if module is not None for inner in module.modules()]
    held = [(holder, name, p) for holder in holders for name, p in holder._parameters.items() if p is not None]
    with gathered([parameter for _, _, parameter in held]):
        parts = [(holder, name, p) for holder, name, p in held if isinstance(p, DTensor)]
        try:
            for holder, name, parameter in parts:
                together = whole(parameter.detach())
                holder._parameters[name] = nn.Parameter(together, requires_grad=parameter.requires_grad)
            yield
        finally:
            for holder, name, parameter in parts:
                holder._parameters[name] = parameter
