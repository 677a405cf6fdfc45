"""A plain copy of a model that several processes hold in parts, without what is quantized: packing fills that in.

FSDP and ZeRO put their machinery into the modules and do not take it out again, so a packed model is built anew.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from bitdistiller_peft.errors import StateError
from bitdistiller_peft.layers import gathered, is_sharded, whole

_WRAPPERS = (".base_layer", "._checkpoint_wrapped_module", ".original_module")


def is_in_parts(model: nn.Module) -> bool:
    """Whether some process holds only a part of a parameter."""
    return any(is_sharded(parameter) for parameter in model.parameters())


@torch.no_grad()
def whole_copy(model: nn.Module, left_out: Collection[str], adapter_name: str) -> PreTrainedModel:
    """Build the base model anew, every parameter put together; collective.

    Args:
        model: the base model with overlays and trained copies.
        left_out: parameters that stay on the meta device, by their name in a model without overlays.
        adapter_name: whose trained copies (`modules_to_save`) are taken.

    Raises:
        StateError: it is no transformers model, or has parameters under names of its own.
    """
    plain_class: Any = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    if not issubclass(plain_class, PreTrainedModel):
        raise StateError(f"a sharded model must be a transformers model to be packed: got {plain_class.__name__}.")
    with torch.device("meta"):
        copy: PreTrainedModel = plain_class(model.config)
    tensors = dict(_plain_tensors(model, adapter_name))
    ours = chain(copy.named_parameters(remove_duplicate=False), copy.named_buffers(remove_duplicate=False))
    for name, slot in list(ours):
        if name in left_out:
            if isinstance(slot, nn.Parameter) and name in tensors:  # what is packed may ask for the dtype
                slot.data = slot.data.to(tensors[name].dtype)
            continue
        if name not in tensors:
            raise StateError(f"a sharded model must have the parameters of its class: {name!r} is missing.")
        _put(copy, name, tensors[name], is_parameter=isinstance(slot, nn.Parameter))
    copy.tie_weights()
    copy.generation_config = getattr(model, "generation_config", None)
    return copy.train(model.training)


def _plain_tensors(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by their names in a model without overlays; a trained copy comes after its original."""
    trained = f".modules_to_save.{adapter_name}"
    copies: list[tuple[str, Tensor]] = []
    named = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    for name, tensor in named:
        dotted = f".{name}"
        for part in _WRAPPERS:
            dotted = dotted.replace(f"{part}.", ".")
        if trained in dotted:
            copies.append((dotted.replace(trained, "")[1:], tensor))
        elif ".bitdistiller_" not in dotted and ".modules_to_save." not in dotted:
            yield dotted[1:], tensor
    yield from copies


def _put(model: nn.Module, name: str, tensor: Tensor, *, is_parameter: bool) -> None:
    path, _, own = name.rpartition(".")
    owner = model.get_submodule(path)
    with gathered([tensor]):
        values = whole(tensor.detach()).clone()
    if is_parameter:
        owner._parameters[own] = nn.Parameter(values, requires_grad=False)
    else:
        owner._buffers[own] = values
