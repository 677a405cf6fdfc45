"""How a packed weight lies in memory, as plain values: what an operator can be called with, whatever the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bitdistiller_peft.errors import WeightError
from bitdistiller_peft.kernels.tables import TableForm, grid_key, table_form
from bitdistiller_peft.packing import row_words
from bitdistiller_peft.quantizers import QuantParams, QuantSpec

SCALE_TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
MAX_READINGS = 4096
PER_MATRIX = 0  # as a group size
Weight = tuple[Tensor, Tensor | None, str, int, int, str]
"""What an operator takes beside the words: scale, zero points or second scale, and the fields of a `Layout`."""
Reading = tuple[str | None, tuple[str, int, int, str]]
_readings: dict[int, tuple[QuantSpec, Reading | None]] = {}


class Layout(NamedTuple):
    """How to read a packed weight, as plain values: what an operator can be called with.

    Attributes:
        grid: registered name of the grid.
        bits: code width.
        group_size: weights per scale; -1 for one group per row, 0 for one per matrix.
        packing: layout of the codes, see `bitdistiller_peft.packing`.
    """

    grid: str
    bits: int
    group_size: int
    packing: str

    def num_groups(self, in_features: int) -> int:
        """Groups of one row."""
        return 1 if self.group_size <= 0 else in_features // self.group_size

    def form(self) -> TableForm:
        """What the codes stand for.

        Raises:
            WeightError: the kernels do not know this grid.
        """
        form = table_form(self.grid, self.bits)
        if form is None:
            raise WeightError(f"the kernels do not know grid={self.grid!r} at bits={self.bits}")
        return form


def check_weight(words: Tensor, scale: Tensor, second: Tensor | None, layout: Layout, in_features: int) -> None:
    """Refuse tensors that the kernels would read beyond their ends.

    Raises:
        WeightError: a shape or dtype that does not belong to a packed ``[out, in]`` weight.
    """
    rows, groups = (1 if layout.group_size == 0 else words.shape[0]), layout.num_groups(in_features)
    wanted = (words.shape[0], row_words(in_features, layout.bits, layout.packing))  # type: ignore[arg-type]
    fits = words.dtype == torch.int32 and tuple(words.shape) == wanted
    fits = fits and scale.dtype in SCALE_TYPES and tuple(scale.shape) == (rows, groups)
    if layout.form().second is not None:
        is_zero = layout.form().second == "zero_point"
        columns = row_words(groups, layout.bits, "bitstream") if is_zero else groups
        fits = fits and second is not None and tuple(second.shape) == (rows, columns)
        fits = fits and second is not None and second.dtype == (torch.int32 if is_zero else scale.dtype)
    if layout.group_size > 0 and in_features % layout.group_size:
        fits = False
    if not fits:
        shapes = [tuple(t.shape) for t in (words, scale, second) if t is not None]
        raise WeightError(
            f"a packed weight must have words {wanted} and parameters ({rows}, {groups}) for in_features="
            f"{in_features}: got {shapes}. Pass inputs of the layer's width, and tensors as `packed_tensors` makes."
        )


@torch.compiler.assume_constant_result
def reading_of(spec: QuantSpec) -> Reading | None:
    """Which of the parameters is the second one, and the plain values that an operator takes; `None`: not for us."""
    known = _readings.get(id(spec))  # hashing a spec takes longer than a small product
    if known is not None and known[0] is spec:
        return known[1]
    key = grid_key(spec.grid)
    form = None if key is None else table_form(key, spec.grid.bits)
    reading = None
    if key is not None and form is not None:
        group_size = PER_MATRIX if spec.group_size == "tensor" else int(spec.group_size)
        reading = form.second, (key, spec.grid.bits, group_size, spec.packing)
    if len(_readings) > MAX_READINGS:
        _readings.clear()
    _readings[id(spec)] = spec, reading
    return reading


def operator_weight(params: QuantParams, spec: QuantSpec) -> Weight:
    """What an operator takes beside the words: scale, zero points or second scale, and how to read them."""
    reading = reading_of(spec)
    if reading is None:
        raise WeightError(f"the kernels do not know grid={spec.grid.name!r}. Use use_backend('reference').")
    second, layout = reading
    return (params.scale, None if second is None else getattr(params, second), *layout)
