"""What a model is made of: bits, groups, and the true number of bits per weight, everything counted."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from torch import Tensor, nn

from bitdistiller_peft.kernels import backend_info
from bitdistiller_peft.layers import PackedExperts, PackedLinear, iter_quantized, packed_layout
from bitdistiller_peft.quantizers import QuantSpec


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
    """

    rows: tuple[SummaryRow, ...]
    device: str = field(default="", compare=False)

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

    def to_markdown(self) -> str:
        """The table for a model card."""
        header, *lines = self._cells()
        rows = [header, ["---"] * len(header), *lines]
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)

    def __str__(self) -> str:
        cells = self._cells()
        widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
        ]
        lines.insert(1, "-" * max(map(len, lines)))
        lines.append(f"packed size: {self.num_bytes / 2**20:,.1f} MiB")
        if self.device:
            lines.append(f"kernels on {self.device}: {backend_info(self.device)}")
        return "\n".join(lines)


def quant_summary(model: nn.Module) -> QuantSummary:
    """Count a model's weights by kind: a student in training, or a packed model.

    Args:
        model: any model; what is not quantized is counted as it is. Of several adapters, the active one counts.
    """
    quantized: dict[tuple[str, int, str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    counted: set[int] = set()
    device = ""
    for module_name, module, name, spec in iter_quantized(model):
        counted |= {id(p) for key, p in module.named_parameters(recurse=False) if key.startswith(name)}
        if _is_inactive(model, module_name):
            continue
        shape = _dense_shape(module, name)
        state = "packed" if isinstance(module, (PackedLinear, PackedExperts)) else "latent"
        if state == "packed":
            device = getattr(module, name).device.type
        kind = (spec.grid.name, spec.grid.bits, str(spec.group_size), state)
        _add(quantized[kind], _numel(shape), _stored_bits(spec, shape))
    plain: dict[tuple[str, int, str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for full_name, parameter in model.named_parameters():  # tied parameters come once
        if id(parameter) not in counted and not _is_left_behind(model, full_name):
            width = parameter.element_size() * 8
            kind = (str(parameter.dtype).removeprefix("torch."), width, "", "full precision")
            _add(plain[kind], parameter.numel(), parameter.numel() * width)
    merged = {**dict(sorted(quantized.items())), **dict(sorted(plain.items()))}
    return QuantSummary(tuple(SummaryRow(*kind, *counts) for kind, counts in merged.items()), device)


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


def _stored_bits(spec: QuantSpec, shape: tuple[int, ...]) -> int:
    return sum(_numel(size) * dtype.itemsize * 8 for size, dtype in packed_layout(spec, shape).values())


def _dense_shape(module: nn.Module, name: str) -> tuple[int, ...]:
    weight: Tensor = getattr(module, name)
    if isinstance(module, PackedLinear):
        return (module.out_features, module.in_features)
    if isinstance(module, PackedExperts):
        return (*weight.shape[:-1], module.in_features[name])
    return tuple(weight.shape)


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
