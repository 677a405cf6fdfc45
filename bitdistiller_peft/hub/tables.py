"""Embeddings and the output head as quantized tables, and the tie between the two."""

from __future__ import annotations

import torch
from torch import nn

from bitdistiller_peft.errors import BitDistillerError, TargetError, add_location
from bitdistiller_peft.hub.config import BitDistillerQuantConfig
from bitdistiller_peft.layers import (
    NO_CHANGE,
    SUFFIXES,
    PackedLinear,
    attach_inputs,
    companion,
    packed_layout,
    quant_specs,
    to_packed_embedding,
)


def tied_head(model: nn.Module, embedding: str) -> str | None:
    """The name of the output head that shares the table of an embedding, or `None`.

    Args:
        model: a transformers model; its own list of tied weights says what shares what.
        embedding: name of the embedding.

    Raises:
        TargetError: something else shares the table, e.g. the embedding of an encoder.
    """
    pairs: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    weight = f"{embedding}.weight"
    others = {key for pair in pairs.items() if weight in pair for key in pair} - {weight}
    if not others:
        return None
    name = others.pop().removesuffix(".weight")
    get_head = getattr(model, "get_output_embeddings", None)
    if others or get_head is None or model.get_submodule(name) is not get_head():
        raise TargetError(
            f"a quantized embedding may share its table with the output head alone: got {embedding!r}, tied to "
            f"{sorted({name, *others})}. Leave it as it is: embedding_bits=None."
        )
    return name


def find_embeddings(model: nn.Module, config: BitDistillerQuantConfig) -> dict[str, nn.Embedding]:
    """The embeddings that a config names, by their names in the model, which may lack its head and with it a prefix.

    Raises:
        TargetError: a name that is no embedding's.
    """
    found: dict[str, nn.Embedding] = {}
    tables = {name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    for key in config.embeddings:
        name = next((name for name in tables if f".{key}".endswith(f".{name}") or name.endswith(f".{key}")), None)
        if name is None or name in found:
            raise TargetError(
                f"`embeddings` must name embeddings, each once: got {key!r}, and the model has {sorted(tables)}."
            )
        found[name] = tables[name]
    return found


def tied_heads(model: nn.Module, config: BitDistillerQuantConfig) -> set[str]:
    """Names of the heads that share the table of an embedding that the config names."""
    return {head for name in find_embeddings(model, config) if (head := tied_head(model, name)) is not None}


def convert_embeddings(model: nn.Module, config: BitDistillerQuantConfig) -> list[str]:
    """Replace the embeddings of a model on the meta device, and heads tied to them, by packed ones.

    Returns:
        Their names, without those of tied heads.

    Raises:
        TargetError: a name that is no embedding's.
        GroupSizeError: the group size does not divide the width; the layer is named.
    """
    found = find_embeddings(model, config)
    for key, (name, module) in zip(config.embeddings, found.items(), strict=True):
        spec = config.spec(key)
        try:
            layout = packed_layout(spec, (module.num_embeddings, module.embedding_dim))
        except BitDistillerError as error:
            raise add_location(error, f"layer {name!r}") from None
        empty = {suffix: torch.empty(size, dtype=dtype, device="meta") for suffix, (size, dtype) in layout.items()}
        to_packed_embedding(module, spec, empty, module.weight.dtype)
        if (head := tied_head(model, name)) is not None:
            tie_packed_head(model, name, head)
    return list(found)


def tie_packed_head(model: nn.Module, embedding: str, head: str) -> None:
    """Let the output head multiply by the packed table of an embedding; both hold the very same tensors.

    Args:
        model: holds both; what it knows to be tied is brought up to date, so that it is saved once and tied on loading.
        embedding: name of the packed embedding.
        head: name of the head.
    """
    table, old = model.get_submodule(embedding), model.get_submodule(head)
    spec = quant_specs(table)["weight"]
    new = PackedLinear(table.embedding_dim, table.num_embeddings, spec=spec, device="meta")  # type: ignore[arg-type]
    tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    for suffix in ("", *SUFFIXES):
        if (tensor := companion(table, "weight", suffix)) is not None:
            setattr(new, "weight" + suffix, tensor)
            tied[f"{head}.weight{suffix}"] = f"{embedding}.weight{suffix}"
    attach_inputs(new, NO_CHANGE)
    new.bias = old.bias  # type: ignore[assignment]
    new.train(old.training)
    model.set_submodule(head, new)
    model.all_tied_weights_keys = tied  # type: ignore[assignment]
