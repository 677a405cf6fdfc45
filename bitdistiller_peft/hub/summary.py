"""What a model is made of: bits, groups, parts, and the true number of bits per weight, everything counted."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bitdistiller_peft.kernels import backend_info
from bitdistiller_peft.layers import (
    ZERO_POINT,
    PackedEmbedding,
    PackedExperts,
    PackedLinear,
    iter_quantized,
    packed_layout,
    whole_shape,
)
from bitdistiller_peft.quantizers import QuantSpec

CODES, SCALES, ZERO_POINTS, EMBEDDINGS, HEAD, NORMS, OTHER, PADDING, METADATA = PARTS = (
    "codes",
    "scales",
    "zero points",
    "embeddings",
    "head",
    "norms",
    "other",
    "padding",
    "metadata",
)


@dataclass(frozen=True)
class PartSize:
    """What one part of a packed model takes; the parts together are the file, to the last bit.

    Attributes:
        part: one of `PARTS`. Padding is what fills up the last word of rows of codes and zero points, metadata the
            header of the files; a quantized embedding or head counts as codes and scales, a tied head as embeddings.
        num_weights: weights of the model that it holds; 0 for what only serves others.
        stored_bits: its size.
    """

    part: str
    num_weights: int
    stored_bits: int


@dataclass(frozen=True)
class SummaryRow:
    """One kind of weights.

    Attributes:
        kind: the grid, or the dtype of unquantized weights.
        bits: code width, or bits of the dtype.
        group_size: weights per scale; empty for unquantized weights.
        state: ``"packed"``, ``"latent"`` (still trained) or ``"full precision"``.
        num_modules: number of parameters of this kind.
        num_weights: number of weights.
        stored_bits: bits that their packed form takes, scales, zero points and padding included.
    """

    kind: str
    bits: int
    group_size: str
    state: str
    num_modules: int
    num_weights: int
    stored_bits: int


@dataclass(frozen=True)
class QuantSummary:
    """All rows; `str()` draws the table.

    Attributes:
        rows: one for each kind of weights.
        device: type of the device that packed weights are on; empty where there are none.
        parts: the same bits by part, without the metadata of files; see `with_files`.
    """

    rows: tuple[SummaryRow, ...]
    device: str = field(default="", compare=False)
    parts: tuple[PartSize, ...] = ()

    @property
    def bits_per_weight(self) -> float:
        """True bits per weight of the whole model once packed."""
        return sum(row.stored_bits for row in self.rows) / max(1, sum(row.num_weights for row in self.rows))

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole model once packed."""
        return sum(row.stored_bits for row in self.rows) // 8

    def _cells(self) -> list[list[str]]:
        header = ["weights", "bits", "group", "state", "tensors", "parameters", "bits/weight"]
        lines = [
            [
                row.kind,
                str(row.bits),
                row.group_size,
                row.state,
                str(row.num_modules),
                f"{row.num_weights:,}",
                f"{row.stored_bits / row.num_weights:.3f}",
            ]
            for row in self.rows
        ]
        total = sum(row.num_weights for row in self.rows)
        modules = str(sum(row.num_modules for row in self.rows))
        return [header, *lines, ["total", "", "", "", modules, f"{total:,}", f"{self.bits_per_weight:.3f}"]]

    def with_files(self, folder: str | os.PathLike[str], pattern: str = "*.safetensors") -> QuantSummary:
        """The summary with what the files take beyond their tensors, as a part of its own.

        Args:
            folder: where the packed model was saved.
            pattern: of the weight files.
        """
        on_disk = 8 * sum(path.stat().st_size for path in Path(folder).glob(pattern))
        parts = [part for part in self.parts if part.part != METADATA]
        extra = on_disk - sum(part.stored_bits for part in parts)
        return replace(self, parts=(*parts, PartSize(METADATA, 0, extra)))

    def _part_cells(self) -> list[list[str]]:
        bits, weights = sum(p.stored_bits for p in self.parts), max(1, sum(p.num_weights for p in self.parts))
        lines = [
            [
                part.part,
                f"{part.num_weights:,}" if part.num_weights else "",
                f"{part.stored_bits / 8:,.10g}",
                f"{part.stored_bits / weights:.4f}",
            ]
            for part in self.parts
        ]
        header = ["part", "weights", "bytes", "bits per weight of the model"]
        return [header, *lines, ["total", f"{weights:,}", f"{bits / 8:,.10g}", f"{bits / weights:.4f}"]]

    def to_markdown(self) -> str:
        """The tables for a model card: by kind, then by part."""
        return f"{_markdown(self._cells())}\n\n{_markdown(self._part_cells())}"

    def __str__(self) -> str:
        lines = [*_aligned(self._cells()), "", *_aligned(self._part_cells()), ""]
        lines.append(f"packed size: {self.num_bytes / 2**20:,.1f} MiB")
        if self.device:
            lines.append(f"kernels on {self.device}: {backend_info(self.device)}")
        return "\n".join(lines)


def _markdown(cells: list[list[str]]) -> str:
    header, *lines = cells
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *lines))


def _aligned(cells: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def quant_summary(model: nn.Module) -> QuantSummary:
    """Count a model's weights by kind: a student in training, or a packed model.

    Args:
        model: any model; what is not quantized is counted as it is. Of several adapters, the active one counts.
    """
    quantized: dict[tuple[str, int, str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    parts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    counted: set[int] = set()
    device = ""
    for module_name, module, name, spec in iter_quantized(model):
        is_tied = id(getattr(module, name)) in counted  # a head with the table of the embedding
        counted |= {id(p) for key, p in module.named_parameters(recurse=False) if key.startswith(name)}
        if is_tied or _is_inactive(model, module_name):
            continue
        shape = _dense_shape(module, name)
        state = "packed" if isinstance(module, (PackedLinear, PackedExperts, PackedEmbedding)) else "latent"
        if state == "packed":
            device = getattr(module, name).device.type
        kind = (spec.grid.name, spec.grid.bits, str(spec.group_size), state)
        sizes = stored_sizes(spec, shape)
        _add(quantized[kind], _numel(shape), sum(sizes.values()))
        parts[CODES][0] += _numel(shape)
        for part, bits in sizes.items():
            parts[part][1] += bits
    tables = _tables(model)
    plain: dict[tuple[str, int, str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for full_name, parameter in model.named_parameters():  # tied parameters come once
        if id(parameter) not in counted and not _is_left_behind(model, full_name):
            width = parameter.element_size() * 8
            kind = (str(parameter.dtype).removeprefix("torch."), width, "", "full precision")
            count = _numel(whole_shape(parameter))
            _add(plain[kind], count, count * width)
            entry = parts[tables.get(id(parameter)) or plain_part(full_name)]
            entry[0], entry[1] = entry[0] + count, entry[1] + count * width
    merged = {**dict(sorted(quantized.items())), **dict(sorted(plain.items()))}
    found = tuple(PartSize(part, *parts[part]) for part in PARTS if part in parts and parts[part][1])
    return QuantSummary(tuple(SummaryRow(*kind, *counts) for kind, counts in merged.items()), device, found)


def print_quant_summary(model: nn.Module) -> None:
    """Print the table of `quant_summary`."""
    print(quant_summary(model))  # noqa: T201  (printing is what it is for)


def _add(counts: list[int], weights: int, bits: int) -> None:
    counts[0] += 1
    counts[1] += weights
    counts[2] += bits


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def stored_sizes(spec: QuantSpec, shape: tuple[int, ...]) -> dict[str, int]:
    """Bits that a quantized weight ``[..., out, in]`` takes, by part: codes, scales, zero points, padding."""
    sizes: dict[str, int] = defaultdict(int)
    for suffix, (size, dtype) in packed_layout(spec, shape).items():
        bits = _numel(size) * dtype.itemsize * 8
        if suffix not in ("", ZERO_POINT):
            sizes[SCALES] += bits
            continue
        if suffix == "" and spec.packing == "base3":  # five codes a byte; one that is begun counts whole
            used = _numel(shape[:-1]) * -(-shape[-1] // 5) * 8
        else:
            used = _numel(shape if suffix == "" else spec.param_shape(shape)) * spec.grid.bits
        sizes[CODES if suffix == "" else ZERO_POINTS] += used
        sizes[PADDING] += bits - used
    return sizes


def _tables(model: nn.Module) -> dict[int, str]:
    """Which parameters are the embeddings and the output head, by identity; tied ones are embeddings."""
    found: dict[int, str] = {}
    for getter, part in (("get_output_embeddings", HEAD), ("get_input_embeddings", EMBEDDINGS)):
        table: nn.Module | None = getattr(model, getter)() if callable(getattr(model, getter, None)) else None
        # all of it: a trained copy stands inside a wrapper of PEFT's
        found |= {} if table is None else {id(parameter): part for parameter in table.parameters()}
    return found


def plain_part(full_name: str) -> str:
    """The part that an unquantized tensor belongs to, by its name alone."""
    if re.search(r"(^|\.)(lm_head|embed_out)\.", full_name):
        return HEAD
    if re.search(r"embed|wte|wpe", full_name):
        return EMBEDDINGS
    return NORMS if re.search(r"norm|ln_|subln", full_name) else OTHER


def _dense_shape(module: nn.Module, name: str) -> tuple[int, ...]:
    weight: Tensor = getattr(module, name)
    if isinstance(module, PackedLinear):
        return (module.out_features, module.in_features)
    if isinstance(module, PackedEmbedding):
        table: Any = module
        return (table.num_embeddings, table.embedding_dim)
    if isinstance(module, PackedExperts):
        return (*weight.shape[:-1], module.in_features[name])
    return whole_shape(weight)


def _overlay(model: nn.Module, module_name: str) -> tuple[nn.Module | None, str]:
    """The overlay layer that a tensor's name leads through, and the rest of the name."""
    head, dot, rest = module_name.partition(".bitdistiller_")
    return (model.get_submodule(head), rest) if dot else (None, "")


def _is_inactive(model: nn.Module, module_name: str) -> bool:
    overlay, rest = _overlay(model, module_name)
    return overlay is not None and rest.partition(".")[2] not in getattr(overlay, "active_adapters", [])


def _is_left_behind(model: nn.Module, full_name: str) -> bool:
    """Whether a parameter serves the teacher or another adapter only, and will not be in the packed model."""
    head, dot, rest = full_name.partition(".base_layer.")
    if dot and rest in getattr(model.get_submodule(head), "parameter_names", ()):
        return True
    if _is_inactive(model, full_name.rpartition(".")[0]):  # the SubLN of another adapter
        return True
    # what PEFT's `modules_to_save` holds: the original and a copy for each adapter, of which one is in force
    head, _, rest = full_name.partition(".modules_to_save.")
    copy_of = rest.partition(".")[0]
    head = head.partition(".original_module.")[0]
    wrapper = model.get_submodule(head) if head != full_name else None
    active = [name for name in getattr(wrapper, "active_adapters", ()) if name in wrapper.modules_to_save]  # type: ignore[union-attr, operator]
    return wrapper is not None and ([copy_of] if copy_of else []) != active
