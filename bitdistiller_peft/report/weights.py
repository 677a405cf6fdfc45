"""What became of the weights: error of every matrix, sizes by part, the histogram of one. One at a time is in memory.

Everything is read from the packed files and, where it is on this machine, the full-precision model they were made from.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from bitdistiller_peft.errors import BitDistillerError, UnknownNameError
from bitdistiller_peft.export import PackedSource, PackedWeight
from bitdistiller_peft.hub.files import weight_files
from bitdistiller_peft.hub.header import read_header
from bitdistiller_peft.hub.summary import CODES, METADATA, PARTS, PartSize, plain_part, stored_sizes
from bitdistiller_peft.quantizers import to_groups, zero_of

NUM_BINS = 96


@dataclass(frozen=True)
class MatrixError:
    """One quantized matrix against the full-precision one.

    Attributes:
        name: of the weight on disk.
        layer: number of its layer; -1 for a matrix outside of the layers.
        module: its place in a layer, numbers of experts left out.
        squared_error: sum of the squared differences.
        squared_norm: sum of the squares of the full-precision weight.
    """

    name: str
    layer: int
    module: str
    squared_error: float
    squared_norm: float

    @property
    def relative(self) -> float:
        """Norm of the difference over the norm of the weight; NaN for a weight of zeros."""
        return relative(self.squared_error, self.squared_norm)


@dataclass(frozen=True)
class WeightHistogram:
    """One matrix in steps of its own scales: so all groups have the same levels.

    Attributes:
        name: of the weight on disk.
        unit: what a step is.
        edges: of the bins.
        before: share of the full-precision weights in each bin; `None` where they are not known.
        after: share of the packed weights in each bin.
        levels: where each code lies, the median over all groups.
        shares: of the packed weights that each code holds.
        outside: share of the full-precision weights beyond the edges; they count in the outermost bins.
    """

    name: str
    unit: str
    edges: tuple[float, ...]
    before: tuple[float, ...] | None
    after: tuple[float, ...]
    levels: tuple[float, ...]
    shares: tuple[float, ...]
    outside: float


@dataclass(frozen=True)
class WeightReport:
    """All of it.

    Attributes:
        errors: one for each quantized matrix whose full-precision weight was found.
        histogram: of one weight; `None` where nothing is quantized.
        parts: sizes of the files by part, to the last bit.
        no_errors: why there are no errors; empty where there are.
    """

    errors: tuple[MatrixError, ...]
    histogram: WeightHistogram | None
    parts: tuple[PartSize, ...]
    no_errors: str


def relative(squared_error: float, squared_norm: float) -> float:
    """The root of a ratio of sums of squares; NaN where there is none."""
    return math.sqrt(squared_error / squared_norm) if squared_norm > 0 else math.nan


def measure_weights(
    packed: Path, base: Path | None, *, weight: str | None = None, show_progress: bool = True
) -> WeightReport:
    """Read a packed model, and the model that it was made from.

    Args:
        packed: folder of the packed model.
        base: folder of the full-precision model; `None` if it is not at hand.
        weight: the matrix to draw a histogram of; that with the largest error by default.
        show_progress: show a progress bar.

    Raises:
        CheckpointError: the packed model is damaged.
        UnknownNameError: no quantized matrix is called `weight`.
    """
    source = PackedSource(packed)
    if weight is not None and weight not in source.quantized_names:
        raise UnknownNameError("weight", weight, source.quantized_names)
    originals, reason = _open(base)
    sizes: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    errors = []
    names = source.quantized_names
    for name in tqdm(names, desc="Weights", unit="matrix", disable=not show_progress):
        found = source.weight(name)
        _add_sizes(sizes, found)
        original = None if originals is None else originals.like(found)
        if original is not None:
            errors.append(_error(found, original))
    if originals is not None and not errors:
        reason = f"No weight of the full-precision model in {base} has the name and shape of a quantized one."
    worst = max(errors, key=lambda error: _sortable(error.relative), default=None)
    chosen = weight or (worst.name if worst is not None else names[0])
    found = source.weight(chosen)
    original = None if originals is None else originals.like(found)
    return WeightReport(tuple(errors), histogram(found, original), _parts(source, packed, sizes), reason)


def _open(base: Path | None) -> tuple[Originals | None, str]:
    """The full-precision weights, or why they are not there."""
    if base is None:
        return None, "The full-precision model is not on this machine."
    try:
        return Originals(base), ""
    except BitDistillerError as error:
        return None, f"The full-precision model cannot be read: {error}"


class Originals:
    """The tensors of a full-precision model, by the names of the packed one.

    Args:
        folder: with safetensors in it.

    Raises:
        CheckpointError: there are none, or a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._files = {name: file for file in weight_files(folder) for name in read_header(file)[0]}

    def like(self, weight: PackedWeight) -> Tensor | None:
        """The full-precision weight ``[out, in]`` of a packed one, fp32; `None` if there is none of that shape."""
        name = self._name_of(weight.name)
        if name is None:
            return None
        with safe_open(self._files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        if not tensor.is_floating_point():
            return None
        tensor = tensor.T if weight.is_transposed else tensor
        return tensor.float() if tensor.shape == (weight.out_features, weight.in_features) else None

    def _name_of(self, name: str) -> str | None:
        """The same name, or the one name that differs in a prefix only, as of a model saved without its head."""
        if name in self._files:
            return name
        near = [other for other in self._files if other.endswith(f".{name}") or name.endswith(f".{other}")]
        return near[0] if len(near) == 1 else None


def histogram(weight: PackedWeight, original: Tensor | None, num_bins: int = NUM_BINS) -> WeightHistogram:
    """Count a weight in steps of its scales.

    Affine grids count from the zero point, so that codes are the levels; codebooks have a step for each sign.

    Args:
        weight: the packed one.
        original: the full-precision weight ``[out, in]``.
        num_bins: between the outermost levels and a step beyond.
    """
    codes = weight.codes
    after = _in_steps(weight.dense(), weight).flatten()
    kinds = range(weight.spec.grid.num_levels)
    levels = tuple(_level(after, codes.flatten(), code) for code in kinds)
    used = [level for level in levels if math.isfinite(level)]
    margin = max(1.0, (max(used) - min(used)) / max(1, len(used) - 1))
    low, high = min(used) - margin, max(used) + margin
    before, outside = None, 0.0
    if original is not None:
        steps = _in_steps(original, weight).flatten()
        low, high = _widened(low, high, steps)
        outside = float(((steps < low) | (steps > high)).double().mean())
        before = _shares(steps, low, high, num_bins)
    edges = tuple(torch.linspace(low, high, num_bins + 1, dtype=torch.float64).tolist())
    counts = torch.bincount(codes.flatten().long(), minlength=len(levels)).double()
    order = sorted(range(len(levels)), key=lambda code: _sortable(levels[code]))
    shares = (counts / counts.sum()).tolist()
    return WeightHistogram(
        weight.name,
        "steps of the group's scale" + (", from its zero point" if weight.params.zero_point is not None else ""),
        edges,
        before,
        _shares(after, low, high, num_bins),
        tuple(levels[code] for code in order),
        tuple(shares[code] for code in order),
        outside,
    )


def place_of(name: str) -> tuple[int, str]:
    """Layer and module of a weight's name: the first number is the layer's, others are left out.

    Args:
        name: e.g. ``"model.layers.3.mlp.experts.7.up_proj.weight"``.
    """
    words = name.removesuffix(".weight").split(".")
    at = next((at for at, word in enumerate(words) if word.isdecimal()), None)
    if at is None:
        return -1, ".".join(words)
    return int(words[at]), ".".join(word for word in words[at + 1 :] if not word.isdecimal())


def _in_steps(values: Tensor, weight: PackedWeight) -> Tensor:
    groups = to_groups(values, weight.spec.group_size)
    scale = weight.params.scale.float().unsqueeze(-1)
    if weight.params.scale_negative is not None:
        scale = torch.where(groups < 0, weight.params.scale_negative.float().unsqueeze(-1), scale)
    steps = torch.where(scale > 0, groups / scale, torch.zeros_like(groups))
    zero_point = weight.params.zero_point
    return steps if zero_point is None else steps + zero_of(zero_point, weight.spec.grid).unsqueeze(-1)


def _level(steps: Tensor, codes: Tensor, code: int) -> float:
    mine = steps[codes == code]
    return round(float(mine.median()), 4) if len(mine) else math.nan


def _widened(low: float, high: float, steps: Tensor) -> tuple[float, float]:
    """Room for all but a thousandth of the weights at either end, and for at most twice the span."""
    span, count = high - low, len(steps)
    first = float(steps.kthvalue(max(1, count // 1000)).values)
    last = float(steps.kthvalue(count - count // 1000).values)
    return max(min(low, first), low - span / 2), min(max(high, last), high + span / 2)


def _shares(steps: Tensor, low: float, high: float, num_bins: int) -> tuple[float, ...]:
    at = ((steps.double() - low) * (num_bins / (high - low))).floor().clamp(0, num_bins - 1).long()
    return tuple((torch.bincount(at, minlength=num_bins).double() / max(1, len(steps))).tolist())


def _error(weight: PackedWeight, original: Tensor) -> MatrixError:
    difference = weight.dense() - original
    layer, module = place_of(weight.name)
    return MatrixError(weight.name, layer, module, _squares(difference), _squares(original))


def _squares(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def _sortable(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


def _add_sizes(sizes: dict[str, list[int]], weight: PackedWeight) -> None:
    shape = (weight.out_features, weight.in_features)
    sizes[CODES][0] += math.prod(shape)
    for part, bits in stored_sizes(weight.spec, shape).items():
        sizes[part][1] += bits


def _parts(source: PackedSource, folder: Path, sizes: dict[str, list[int]]) -> tuple[PartSize, ...]:
    files = weight_files(folder)
    entries = {name: entry for file in files for name, entry in read_header(file)[0].items()}
    for name in source.plain_names:
        part, (begin, end) = sizes[plain_part(name)], entries[name]["data_offsets"]
        part[0], part[1] = part[0] + math.prod(entries[name]["shape"]), part[1] + 8 * (end - begin)
    known = sum(bits for _, bits in sizes.values())
    sizes[METADATA][1] = 8 * sum(file.stat().st_size for file in files) - known
    return tuple(PartSize(part, *sizes[part]) for part in PARTS if part in sizes and sizes[part][1])
