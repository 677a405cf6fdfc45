"""The float graph of a causal language model with its key/value cache, traced by torch's ONNX exporter.

No weight takes memory while tracing: parameters are views of one zero, and in the traced graph each tensor of the
checkpoint is an input of its own name. Writers put there what they want.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, DynamicCache

from bitdistiller_peft.errors import ExportError
from bitdistiller_peft.export.formats import Options
from bitdistiller_peft.export.source import PackedSource, PackedWeight
from bitdistiller_peft.recipes.targets import TARGETS

BITS = (2, 4, 8)  # widths of codes, in MatMulNBits and in OpenVINO
INPUTS = ("input_ids", "attention_mask", "position_ids")
# their graphs were compared with the packed model, logit by logit, with and without cache and padding
ARCHITECTURES = TARGETS["onnx"].architectures
_BATCH, _PAST, _TOKENS = 2, 5, 3  # what is traced; all different, and none is 0 or 1, which the tracer takes as fixed


def stored_bits(weight: PackedWeight, options: Options) -> int:
    """The width of the codes in the file."""
    return int(options["widen_to"] or weight.spec.grid.bits)


def refuse_bits(weight: PackedWeight, options: Options, what: str) -> str | None:
    """The reason why a matrix's codes cannot be swapped into the graph, or `None`.

    Args:
        weight: the matrix.
        options: options of the export.
        what: whose widths `BITS` are, for the message.
    """
    bits = weight.spec.grid.bits
    if ".experts." in weight.name:
        return "it is one expert of several, which the model keeps in one tensor"
    if stored_bits(weight, options) not in BITS:
        return f"{bits}-bit codes are none of the widths {what}, {BITS}"
    if stored_bits(weight, options) < bits:
        return f"{bits}-bit codes do not fit into {options['widen_to']} bits"
    return None


def refuse_model(source: PackedSource, options: Options) -> str | None:
    """The reason why a model's graph is not known to be right, or `None`."""
    if source.architecture not in ARCHITECTURES:
        return f"architecture {source.architecture!r} is not among {list(ARCHITECTURES)}, whose graphs are tested"
    rope = source.config.get("rope_parameters") or {}
    kinds = [entry.get("rope_type") for entry in (rope, *rope.values()) if isinstance(entry, dict)]
    changing = sorted({"dynamic", "longrope"}.intersection(kind for kind in kinds if kind))
    return f"rope_type={changing[0]!r} depends on the length, which a graph does not" if changing else None


def float_graph(source: PackedSource) -> Any:
    """Trace a packed model's architecture in float32.

    Inputs of the graph: ``input_ids [batch, sequence]``, ``attention_mask [batch, past + sequence]`` and
    ``position_ids [batch, sequence]``, int64; ``past_key_values.N.key`` and ``.value [batch, heads, past, width]``,
    float32; then one float32 input for every tensor of the checkpoint, by its name there and in the shape that the
    float model has. Outputs: ``logits [batch, sequence, vocabulary]`` and ``present.N.key`` and ``.value``, the cache
    with the new tokens. All sizes but heads, width and vocabulary are dynamic; ``past`` may be 0.

    Args:
        source: the packed checkpoint; only its config and the names of its tensors are read.

    Returns:
        An `onnx.ModelProto`, the caller's own; the last few traces are remembered.

    Raises:
        ExportError: the exporter cannot trace the architecture, or the graph lacks a tensor of the checkpoint.
    """
    import onnx

    names = (*source.quantized_names, *source.plain_names)
    return onnx.load_model_from_string(_traced(source.architecture, json.dumps(source.config), names))


@lru_cache(maxsize=4)
def _traced(architecture: str, config: str, names: tuple[str, ...]) -> bytes:
    """The graph as bytes: tracing takes a second or two per layer, and depends on nothing else."""
    import onnx_ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from onnxscript import optimizer

    model = _Cached(_hollow_model(architecture, json.loads(config))).eval()
    with _quiet():
        try:
            traced = _trace(model)
        except RuntimeError as error:  # all errors of the exporter are
            reason = next(iter(str(error).strip().splitlines()), "")
            raise ExportError(f"torch's exporter must trace {architecture!r}: it cannot, {reason}.") from error
        _name_weights(traced.graph, model.model, names)
        optimizer.optimize(traced)  # folds what is constant; the weights are inputs here, so they stay as they are
    ClearMetadataAndDocStringPass()(traced)  # the exporter notes the paths of source files
    content: bytes = onnx_ir.to_proto(traced).SerializeToString()
    return content


class _Cached(nn.Module):
    """A causal language model whose cache goes in and comes out as tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Any) -> Any:
        cache = DynamicCache(past)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits, [(layer.keys, layer.values) for layer in output.past_key_values.layers]


def _hollow_model(architecture: str, settings: dict[str, Any]) -> nn.Module:
    """The float model of a config: real buffers, and parameters that are views of one zero."""
    config = AutoConfig.for_model(**settings)
    owner: Any = getattr(transformers, architecture)
    with init_empty_weights(include_buffers=False):
        model: nn.Module = owner._from_config(config, dtype=torch.float32, attn_implementation="eager")
    zero = torch.zeros(())
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(zero.expand(parameter.shape), requires_grad=False))
    model.tie_weights()  # type: ignore[operator]
    return model


def _trace(model: _Cached) -> Any:
    """Trace behind a cache, all of whose sizes but the width of heads may vary."""
    shapes = _cache_shapes(model.model)
    names = [f"{index}.{part}" for index in range(len(shapes)) for part in ("key", "value")]
    ids = torch.zeros(_BATCH, _TOKENS, dtype=torch.int64)
    mask = torch.ones(_BATCH, _PAST + _TOKENS, dtype=torch.int64)
    past = [tuple(torch.zeros(_BATCH, heads, _PAST, width) for heads, width in layer) for layer in shapes]
    batch, sequence, length, total = map(torch.export.Dim, ("batch", "sequence", "past", "total"))
    token = {0: batch, 1: sequence}
    program: Any = torch.onnx.export(
        model,
        (ids, mask, torch.zeros_like(ids), past),
        input_names=[*INPUTS, *(f"past_key_values.{name}" for name in names)],
        output_names=["logits", *(f"present.{name}" for name in names)],
        dynamic_shapes=(token, {0: batch, 1: total}, token, [({0: batch, 2: length},) * 2 for _ in shapes]),
        dynamo=True,
        optimize=False,
        verbose=False,
    )
    return program.model


def _cache_shapes(model: nn.Module) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Heads and width of keys and of values, layer by layer, from the cache that the model itself makes."""
    with torch.no_grad():
        ids = torch.zeros(1, 1, dtype=torch.int64)
        layers = model(input_ids=ids, past_key_values=DynamicCache(), use_cache=True).past_key_values.layers
    return [
        ((layer.keys.shape[1], layer.keys.shape[3]), (layer.values.shape[1], layer.values.shape[3])) for layer in layers
    ]


def _name_weights(graph: Any, model: nn.Module, names: tuple[str, ...]) -> None:
    """Turn the parameters into inputs with the checkpoint's names; of tied ones, the name that it has."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    aliases: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        aliases.setdefault(id(parameter), []).append(name)
    for traced in list(graph.initializers):
        name = traced.removeprefix("model.")
        if name in parameters:
            value = graph.initializers.pop(traced)
            value.const_value = None
            value.name = next((alias for alias in aliases[id(parameters[name])] if alias in names), name)
            graph.inputs.append(value)
    lost = set(names) - {value.name for value in graph.inputs}
    if lost:
        raise ExportError(f"the traced graph must use every tensor of the model: {min(lost)!r} is not in it.")


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's remarks on packages and deprecations, which are about itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
