"""Embedding and output head as trained low-bit tables."""

from __future__ import annotations

from typing import Any

from torch import nn

from bitdistiller_peft.errors import ConfigError, TargetError
from bitdistiller_peft.hub.modules import is_linear
from bitdistiller_peft.hub.tables import tied_head
from bitdistiller_peft.tuner.config import BitDistillerConfig
from bitdistiller_peft.tuner.layer import BitDistillerLayer
from bitdistiller_peft.tuner.overlays import BitDistillerEmbedding, BitDistillerTiedHead


def resolve_tables(config: BitDistillerConfig, model: nn.Module) -> None:
    """Note in a config which modules its `embedding_bits` and `head_bits` mean.

    Raises:
        TargetError: the model has no such module, or it is of a kind that cannot be quantized.
        ConfigError: embedding and head are tied and shall have different widths, or the head is for an engine.
    """
    config.table_bits = {}
    if config.embedding_bits is None and config.head_bits is None:
        return
    embedding, head = (_name_of(model, f"get_{kind}_embeddings") for kind in ("input", "output"))
    tied = None if embedding is None else tied_head(model, embedding)
    wanted = [(embedding, config.embedding_bits), (head, config.head_bits)]
    if tied is not None:
        wanted = [(embedding, _tied_bits(config, str(embedding)))]
    for name, width in wanted:
        if width is None:
            continue
        if name is None:
            raise TargetError(
                f"the model must have an embedding and a head to quantize: {type(model).__name__} names none. Use "
                "embedding_bits=None and head_bits=None."
            )
        _check_kind(model, name, nn.Embedding if name == embedding else None)
        config.table_bits[name] = width
    if config.target is not None and head in config.table_bits and head != embedding:
        raise ConfigError(
            f"`head_bits` must be None with target={config.target!r} where the head is not tied: got head_bits="
            f"{config.head_bits!r}. A packed embedding is exported as float rows, a packed head has no such place."
        )


def tie_head(model: nn.Module, name: str, overlay: BitDistillerLayer) -> None:
    """Let a head that is tied to an embedding speak with the embedding's student.

    Args:
        model: the base model.
        name: name of the embedding.
        overlay: the embedding's overlay.
    """
    head = tied_head(model, name) if isinstance(overlay, BitDistillerEmbedding) else None
    if head is not None and not isinstance(old := model.get_submodule(head), BitDistillerTiedHead):
        model.set_submodule(head, BitDistillerTiedHead(old, overlay))


def _tied_bits(config: BitDistillerConfig, name: str) -> int:
    given = {bits for bits in (config.embedding_bits, config.head_bits) if bits is not None}
    if len(given) > 1:
        raise ConfigError(
            f"`head_bits` must equal `embedding_bits` where both are one table ({name!r}): got embedding_bits="
            f"{config.embedding_bits}, head_bits={config.head_bits}. Give one of them."
        )
    return given.pop()


def _check_kind(model: nn.Module, name: str, kind: type[nn.Module] | None) -> None:
    module: Any = model.get_submodule(name)
    base = module.base_layer if isinstance(module, BitDistillerLayer) else module
    if isinstance(base, kind) if kind else is_linear(base):
        return
    option = "embedding_bits" if kind else "head_bits"
    raise TargetError(
        f"`{option}` must be None where layer {name!r} is a {type(base).__name__}: only an nn.Embedding and a linear "
        "head can be quantized. Take it out of modules_to_save if it stands there."
    )


def _name_of(model: nn.Module, getter: str) -> str | None:
    get = getattr(model, getter, None)
    try:
        wanted = None if get is None else get()
    except NotImplementedError:
        wanted = None
    return next((name for name, module in model.named_modules() if module is wanted), None)
