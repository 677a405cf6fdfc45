"""The matrices of a layer that an engine has fused (q, k and v; gate and up), and this process's share of them.

An engine gives a fused layer one parameter per stored tensor, and may split the layer over devices: by its outputs
(rows) or by its inputs (columns). The parts of a fused layer keep their own settings here, also where widths of codes
differ, and a share of a matrix is again a packed matrix: rows are cut as they are, columns are unpacked, cut at whole
groups and packed again. No value changes.

Torch and our layers only; the engine's own classes are next door.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bitdistiller_peft.errors import CheckpointError, ConfigError
from bitdistiller_peft.layers import (
    INPUT_NORM,
    SUFFIXES,
    ZERO_POINT,
    InputSpec,
    PackedLinear,
    input_norm,
    packed_layout,
    register_packed,
)
from bitdistiller_peft.packing import pack_codes, pack_row, unpack_codes, unpack_row
from bitdistiller_peft.quantizers import QuantSpec

NORM = f".{INPUT_NORM}.weight"  # beside the suffixes of the packed tensors: the gains of a layer's SubLN
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Part:
    """This process's share of one matrix ``[out, in]``.

    Attributes:
        name: the layer's name in the checkpoint, for messages.
        spec: how the matrix is quantized.
        inputs: what happens to its inputs.
        rows: outputs of the share, padding included.
        width: inputs of the share.
        full_rows: outputs of the whole matrix.
        full_width: inputs of the whole matrix.
    """

    name: str
    spec: QuantSpec
    inputs: InputSpec
    rows: int
    width: int
    full_rows: int
    full_width: int

    def layout(self) -> Layout:
        """Shape and dtype of every stored tensor of the share, by suffix."""
        shapes = packed_layout(self.spec, (self.rows, self.width))
        if self.inputs.norm_eps is not None:
            shapes[NORM] = ((self.width,), torch.float32)
        return shapes


def check_parts(parts: Sequence[Part], num_devices: int) -> None:
    """Refuse shares that are no packed matrices.

    Args:
        parts: all parts of a layer.
        num_devices: over how many the layer is split.

    Raises:
        ConfigError: a group would be cut, or inputs are split that the layer must see whole; the layer is named.
    """
    for part in parts:
        if part.width == part.full_width:
            continue
        split = f"layer {part.name!r}, {part.full_width} inputs over tensor_parallel_size={num_devices}"
        size = part.spec.group_size
        if isinstance(size, int) and size > 0 and part.width % size:
            whole = [n for n in range(1, num_devices) if part.full_width % (n * size) == 0]
            raise ConfigError(
                f"`tensor_parallel_size` must leave whole groups of {size} inputs: got {split}, {part.width} each. "
                f"Use one of {whole}."
            )
        if part.inputs.activation_bits is not None or part.inputs.norm_eps is not None:
            what = "int8 activations" if part.inputs.activation_bits is not None else "a SubLN"
            raise ConfigError(
                f"`tensor_parallel_size` must be 1 for layers with {what}: got {split}; scale and norm are those of "
                "all inputs. Use pipeline_parallel_size or data_parallel_size instead."
            )


class FlatLayout:
    """Where the tensors of all parts lie in one flat parameter per suffix.

    Args:
        parts: of one layer, in the order of its outputs.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self._layouts = [part.layout() for part in self.parts]
        self.suffixes = [key for key in ("", *SUFFIXES, NORM) if any(key in layout for layout in self._layouts)]

    def empty(self, suffix: str) -> Tensor:
        """The flat tensor of a suffix, zeros; fp32 where the parts have different dtypes, which fp32 all holds."""
        entries = [layout[suffix] for layout in self._layouts if suffix in layout]
        dtypes = {dtype for _, dtype in entries}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        return torch.zeros(sum(math.prod(shape) for shape, _ in entries), dtype=dtype)

    def view(self, suffix: str, index: int, flat: Tensor) -> Tensor | None:
        """One part's tensor in the flat one, in the parameter's dtype, or `None` where the part has none."""
        if suffix not in self._layouts[index]:
            return None
        start = sum(math.prod(layout[suffix][0]) for layout in self._layouts[:index] if suffix in layout)
        shape = self._layouts[index][suffix][0]
        return flat[start : start + math.prod(shape)].view(shape)

    def load(self, suffix: str, index: int, flat: Tensor, loaded: Tensor, *, first_row: int, first_column: int) -> None:
        """Put this process's share of a stored tensor in its place.

        Args:
            suffix: which tensor.
            index: which part.
            flat: the flat tensor of the suffix.
            loaded: the whole matrix's tensor, as stored.
            first_row: where the share begins; rows beyond the matrix stay zero (an engine's padding).
            first_column: likewise among the inputs.

        Raises:
            CheckpointError: the checkpoint's tensor has another shape or dtype than the config says.
        """
        part, place = self.parts[index], self.view(suffix, index, flat)
        whole = replace(part, rows=part.full_rows, width=part.full_width).layout().get(suffix)
        if place is None or whole is None or (tuple(loaded.shape), loaded.dtype) != whole:
            raise CheckpointError(
                f"tensor {part.name + ('' if suffix == NORM else '.weight') + suffix!r} must be {whole}: got "
                f"{tuple(loaded.shape)}, {loaded.dtype}. config.json and weights do not belong together."
            )
        share = take(part, suffix, loaded.to(flat.device), first_row=first_row, first_column=first_column)
        place[: len(share)].copy_(share)

    def modules(self, flats: dict[str, Tensor]) -> list[PackedLinear]:
        """Packed layers over the flat tensors, in order; parts with the same settings become one."""
        merged = _mergeable(self.parts)
        chosen = FlatLayout([replace(self.parts[0], rows=sum(part.rows for part in self.parts))]) if merged else self
        return [chosen._module(index, flats) for index in range(len(chosen.parts))]

    def _module(self, index: int, flats: dict[str, Tensor]) -> PackedLinear:
        part, layout = self.parts[index], self._layouts[index]
        module = PackedLinear(part.width, part.rows, spec=part.spec, inputs=part.inputs, device="meta")
        found = {suffix: self.view(suffix, index, flats[suffix]) for suffix in layout}
        tensors = {suffix: view.to(layout[suffix][1]) for suffix, view in found.items() if view is not None}
        norm, gains = input_norm(module), tensors.pop(NORM, None)
        register_packed(module, "weight", part.spec, tensors)
        if norm is not None and gains is not None:
            norm.weight = nn.Parameter(gains, requires_grad=False)
        return module.eval()


def take(part: Part, suffix: str, whole: Tensor, *, first_row: int, first_column: int) -> Tensor:
    """Cut a part's share out of a whole matrix's stored tensor.

    Args:
        part: the share.
        suffix: which tensor.
        whole: as stored, rows first.
        first_row: first output of the share.
        first_column: first input of the share.
    """
    if suffix == NORM:
        return whole[first_column : first_column + part.width]
    spec = part.spec
    if suffix == "" or spec.group_size != "tensor":
        whole = whole[first_row : first_row + part.rows]
    if part.width == part.full_width:
        return whole
    if suffix == "":
        codes = unpack_row(whole, spec.grid.bits, part.full_width, spec.packing)
        return pack_row(codes[:, first_column : first_column + part.width], spec.grid.bits, spec.packing)
    if not isinstance(spec.group_size, int) or spec.group_size < 1:
        return whole  # one scale for all inputs is that of every share
    first, count = first_column // spec.group_size, part.width // spec.group_size
    if suffix != ZERO_POINT:
        return whole[:, first : first + count]
    zeros = unpack_codes(whole, spec.grid.bits, part.full_width // spec.group_size)
    return pack_codes(zeros[:, first : first + count], spec.grid.bits)


def _mergeable(parts: Sequence[Part]) -> bool:
    """Whether all parts can be multiplied as one matrix: equal settings, and nothing that each has once."""
    first = parts[0]
    alike = all((part.spec, part.inputs) == (first.spec, first.inputs) for part in parts)
    return len(parts) == 1 or (alike and first.spec.group_size != "tensor" and first.inputs.norm_eps is None)
