"""Listen in on one attention layer: its queries, keys and values after rotary embedding, without a changed model file.

Every transformers attention module looks up the function that it calls with finished queries, keys and values, under
the name in its own `config`. While capturing, the one module that is listened to is shown a copy of its config with
another name; that function notes what it is given and calls the one that would have been called. Masks, which the
model builds from its own config, and all other layers do not notice.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bitdistiller_peft.errors import ConfigError

CAPTURE = "bitdistiller_capture"
States = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values, each ``[batch, heads, time, head_dim]``."""

_LATE = 22 / 28
"""The released code's choice: layer 22 of the 28 of Qwen3-0.6B."""


def attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """The self-attention modules of a decoder, by layer index.

    Raises:
        ConfigError: none can be told, or two have one index.
    """
    found: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        if type(index) is not int or not type(module).__name__.endswith("Attention") or not hasattr(module, "config"):
            continue
        if index in found:
            raise ConfigError(
                f"`attention_weight` must be 0 for models with several attention modules in a layer: layer {index} "
                f"has another one, {name!r}. Relations are defined for decoders."
            )
        found[index] = module
    if not found:
        raise ConfigError(
            f"`attention_weight` must be 0 for {type(model).__name__}: it has no attention modules with a layer index, "
            "so there is nothing to listen to."
        )
    return found


def resolve_layer(model: nn.Module, layer: int | None, name: str = "attention_layer") -> int:
    """The layer that is listened to.

    Args:
        model: a decoder.
        layer: its index, from the end if negative; `None` for a late one, at 22/28 of the depth, as in the released
            code.
        name: of the setting, for the message.

    Raises:
        ConfigError: the model has no such layer.
    """
    indices = sorted(attention_modules(model))
    if layer is None:
        return indices[int(_LATE * len(indices))]
    resolved = layer + len(indices) if layer < 0 else layer
    if resolved not in indices:
        raise ConfigError(
            f"`{name}` must be a layer with attention: got {name}={layer}, and the model has {len(indices)}, "
            f"{indices[0]} to {indices[-1]}. Use None for a late one."
        )
    return resolved


@contextmanager
def capture_attention(model: nn.Module, layer: int) -> Iterator[list[States]]:
    """Note the queries, keys and values of one layer while the model runs.

    Args:
        model: a decoder; the same module must not run in two threads at once.
        layer: an index, as from `resolve_layer`.

    Yields:
        A list to which every forward pass adds one entry; the states carry their graph.
    """
    module: Any = attention_modules(model)[layer]
    own, shown = module.config, copy.copy(module.config)
    shown._attn_implementation_internal = CAPTURE
    shown.bitdistiller_listener = listener = _Listener(own, _attention_function(module, own), [])
    module.config = shown
    try:
        yield listener.heard
    finally:
        module.config = own


@dataclass(frozen=True, eq=False)
class _Listener:
    """Where states go, and what would have been called with them."""

    config: Any
    attention: Callable[..., Any]
    heard: list[States]


def _listen(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    shown = module.config
    listener: _Listener = shown.bitdistiller_listener
    listener.heard.append((query, key, value))
    module.config = listener.config  # attention functions read it too
    try:
        return listener.attention(module, query, key, value, *args, **kwargs)
    finally:
        module.config = shown


ALL_ATTENTION_FUNCTIONS.register(CAPTURE, _listen)


def _attention_function(module: nn.Module, config: Any) -> Callable[..., Any]:
    """What the module would call: a registered function, or the plain one of its own modelling file."""
    plain = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function: Callable[..., Any] | None = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, plain)
    if function is None:
        raise ConfigError(
            f"`attention_weight` must be 0 for {type(module).__name__}: its attention cannot be listened to. Load the "
            "model with attn_implementation='sdpa'."
        )
    return function


def only_capture(captured: list[States], layer: int) -> States:
    """The one entry of a forward pass.

    Raises:
        ConfigError: the layer did not ask for its attention function, or asked twice.
    """
    if len(captured) != 1:
        raise ConfigError(
            f"`attention_weight` must be 0 for this model: attention layer {layer} was heard {len(captured)} times in "
            "one forward pass instead of once."
        )
    return captured[0]
