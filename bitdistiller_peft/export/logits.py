"""The logits of an exported model, by its foreign values or by an engine, against those of the packed model.

Equal codes and scales prove what the file holds; logits prove that it stands in the right places of the architecture.
The foreign reader's dense values go into the architecture in place of our codes, and both models see one fixed prompt
in fp32 on the reference backend. What may differ is how the reader's dtype rounds a weight: by a unit `u` at most, each
by its own, so the errors of a product partly cancel and the relative error of the logits stays near `u`; 8 of them are
allowed, and 1e-5 where `u` is smaller than that, for sums in another order. Where the packed model quantizes
activations to int8, which the dense one does not, 8 times `2**-8` is added.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitdistiller_peft.errors import ExportError
from bitdistiller_peft.export.files import write_config, write_tensors
from bitdistiller_peft.export.formats import ExportFormat, ForeignTensor, ForeignWeight
from bitdistiller_peft.export.source import PackedSource
from bitdistiller_peft.kernels import use_backend

Engine = Callable[[Path, Tensor], Tensor]
"""Takes the exported folder and ids ``[tokens]``, returns logits ``[tokens, vocab]``, each for the next token."""

NUM_TOKENS = 32
ROUNDINGS = 8
FLOOR = 1e-5
ENGINE_TOLERANCE = 0.05
"""Engines compute in 16 bits or quantize activations to int8: kernels of both kinds were measured at 0.3 to 3 %."""


@dataclass(frozen=True)
class LogitsReport:
    """How far logits are apart on one fixed prompt.

    Attributes:
        difference: root mean square of the difference, divided by that of the packed model's logits.
        tolerance: the largest that passes.
        by: whose logits were compared: the foreign values in transformers, or an engine.
    """

    difference: float
    tolerance: float
    by: str

    def __str__(self) -> str:
        return f"logits by {self.by} differ by {self.difference:.1e} (at most {self.tolerance:.1e})"


def compare_logits(source: PackedSource, folder: Path, chosen: ExportFormat) -> LogitsReport:
    """Compare the logits of the values that a foreign reader finds with the packed model's.

    Args:
        source: the packed model.
        folder: the exported one.
        chosen: its format.

    Raises:
        ExportError: they differ by more than the tolerance.
    """
    with tempfile.TemporaryDirectory() as name:
        unit = _write_dense(source, folder, chosen, Path(name))
        theirs = _logits(Path(name), prompt(source))
    tolerance = max(FLOOR, ROUNDINGS * unit)
    if source.activation_bits is not None:
        tolerance += ROUNDINGS * 2.0 ** -int(source.activation_bits)
    return _report(source, theirs, tolerance, f"the values that {chosen.reader_name} found")


def compare_engine(
    source: PackedSource, folder: Path, engine: Engine, *, tolerance: float = ENGINE_TOLERANCE
) -> LogitsReport:
    """Compare an engine's own logits with the packed model's.

    Args:
        source: the packed model.
        folder: the exported one.
        engine: gets folder and ids, returns logits ``[tokens, vocab]``.
        tolerance: largest relative difference that passes.

    Raises:
        ExportError: they differ by more, or have another shape.
    """
    theirs = torch.as_tensor(engine(folder, prompt(source)))
    return _report(source, theirs, tolerance, getattr(engine, "__name__", type(engine).__name__))


def transformers_engine(folder: Path, ids: Tensor) -> Tensor:
    """An engine: transformers, for the formats that it loads by itself (compressed-tensors, bitnet, dequantized).

    Args:
        folder: the exported model.
        ids: ``[tokens]``.
    """
    return _logits(folder, ids)


def prompt(source: PackedSource) -> Tensor:
    """The fixed prompt: ids spread over the vocabulary, ``[tokens]``."""
    return (torch.arange(1, NUM_TOKENS + 1) ** 2 * 31) % int(source.config["vocab_size"])


def _report(source: PackedSource, theirs: Tensor, tolerance: float, by: str) -> LogitsReport:
    with use_backend("reference"):
        ours = _logits(source.folder, prompt(source)).double()
    if theirs.shape != ours.shape:
        raise ExportError(f"logits by {by} must have shape {list(ours.shape)}: got {list(theirs.shape)}.")
    difference = ((theirs.double() - ours).square().mean() / ours.square().mean()).sqrt().item()
    if not difference <= tolerance:  # NaN does not pass either
        raise ExportError(
            f"logits by {by} must differ from the packed model's by at most {tolerance:.1e}: they differ by "
            f"{difference:.1e}. The values are in the wrong places, or the architecture is read differently."
        )
    return LogitsReport(difference, tolerance, by)


def _write_dense(source: PackedSource, folder: Path, chosen: ExportFormat, target: Path) -> float:
    """Write the foreign values as a plain model; return the rounding unit of the coarsest dtype among the weights."""
    tensors: dict[str, Tensor] = {}
    unit = 0.0
    for found in chosen.read(source, folder):
        if isinstance(found, ForeignWeight):
            unit = max(unit, torch.finfo(found.dense.dtype).eps / 2)
            is_transposed = source.weight(found.name).is_transposed
            tensors[found.name] = (found.dense.T if is_transposed else found.dense).float()
        elif isinstance(found, ForeignTensor):
            tensors[found.name] = found.tensor.float() if found.tensor.is_floating_point() else found.tensor
    write_tensors(target, tensors)
    write_config(source, target, {"dtype": "float32"})
    return unit


@torch.no_grad()
def _logits(folder: Path, ids: Tensor) -> Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logits: Tensor = model(input_ids=ids.unsqueeze(0)).logits[0].float()
    return logits
