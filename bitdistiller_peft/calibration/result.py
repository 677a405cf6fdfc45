"""What a calibration found: a table to read, and a file to apply to another copy of the model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from bitdistiller_peft._version import library_version
from bitdistiller_peft.calibration.slots import Slot, find_student
from bitdistiller_peft.errors import CheckpointError, StateError
from bitdistiller_peft.hub.atomic import write_tensors
from bitdistiller_peft.jsonfile import is_of_kind, strict_json

Report = TypeVar("Report")

FORMAT = "bitdistiller_calibration"
FORMAT_VERSION = 1
LOW, HIGH = ".clip_min", ".clip_max"
_AGAIN = "Delete it and calibrate again."
_KINDS = {"method": str, "layers": list, "specs": dict, "data": dict, "blocks": list, "clip_weights": bool}


@dataclass(frozen=True)
class LayerReport:
    """One line of the table: a quantized parameter.

    Attributes:
        name: the parameter, e.g. ``"model.layers.0.mlp.up_proj.weight"``.
        error_before: output error of min-max relative to the output; of a clip search, summed group by group.
        error_after: the same after calibration; of AWQ, after the scaling and before the clip search.
        shrink_low: mean factor on the groups' minimum.
        shrink_high: mean factor on the groups' maximum.
        seconds: time of the search.
        note: what else is to be said, e.g. ``"skipped"``.
    """

    name: str
    error_before: float
    error_after: float
    shrink_low: float
    shrink_high: float
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class BlockReport:
    """One line of the table of a block-wise reconstruction.

    Attributes:
        name: the block, e.g. ``"model.layers.0"``.
        error_before: squared error of the block's output relative to the full-precision block's, as it came.
        error_clipped: the same after the clip search.
        error_after: the same after training.
        seconds: time of both.
    """

    name: str
    error_before: float
    error_clipped: float
    error_after: float
    seconds: float


@dataclass(frozen=True)
class CalibrationResult:
    """What `calibrate` returns; `print(result)` shows it.

    Attributes:
        method: ``"clip"``, ``"gptq"``, ``"awq"`` or ``"blockwise"``.
        layers: one report for each quantized parameter, in the order of the search.
        ranges: the chosen ends ``(clip_min, clip_max)`` by parameter, each ``[..., out, groups]``.
        specs: how each parameter is quantized, as plain values.
        data: number of samples, their length, and ``tokens_sha256``.
        blocks: one report for each block, where blocks were trained.
        clip_weights: whether master weights are clamped too where scales are learned.
    """

    method: str
    layers: list[LayerReport]
    ranges: Mapping[str, tuple[Tensor, Tensor]]
    specs: Mapping[str, dict[str, Any]]
    data: Mapping[str, Any]
    blocks: list[BlockReport] = field(default_factory=list)
    clip_weights: bool = False

    def __str__(self) -> str:
        """The result as a table."""
        return "\n".join((self._title(), *self._block_lines(), *self._layer_lines()))

    def __repr__(self) -> str:
        """The first line of the table."""
        return f"<CalibrationResult: {self._title()}>"

    def _title(self) -> str:
        seen = f"{self.data.get('num_samples', 0)} samples of {self.data.get('seq_len', 0)} tokens"
        return f"method={self.method}, {len(self.ranges)} of {len(self.layers)} parameters, {seen}"

    def _block_lines(self) -> list[str]:
        if not self.blocks:
            return []
        rows: list[tuple[str, ...]] = [
            (b.name, _number(b.error_before), _number(b.error_clipped), _number(b.error_after), f"{b.seconds:.1f}")
            for b in self.blocks
        ]
        return [*_table(("block", "error before", "clipped", "after", "seconds"), rows), ""]

    def _layer_lines(self) -> list[str]:
        rows: list[tuple[str, ...]] = [
            (
                r.name,
                _number(r.error_before),
                _number(r.error_after),
                f"{r.shrink_low:.2f}",
                f"{r.shrink_high:.2f}",
                f"{r.seconds:.2f}",
                r.note,
            )
            for r in self.layers
        ]
        return _table(("parameter", "error before", "after", "min x", "max x", "seconds", ""), rows)

    def save(self, path: str | Path) -> Path:
        """Write ranges and reports to one safetensors file, which is whole or not there.

        Args:
            path: the file; its folder must exist.

        Returns:
            The path.
        """
        tensors = {}
        for name, (low, high) in self.ranges.items():
            tensors[name + LOW], tensors[name + HIGH] = (end.detach().float().cpu().contiguous() for end in (low, high))
        about = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "library_version": library_version(),
            "method": self.method,
            "clip_weights": self.clip_weights,
            "data": dict(self.data),
            "specs": dict(self.specs),
            "layers": [without_nan(asdict(report)) for report in self.layers],
            "blocks": [without_nan(asdict(report)) for report in self.blocks],
        }
        write_tensors(Path(path), tensors, {FORMAT: json.dumps(about, allow_nan=False, sort_keys=True)})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> CalibrationResult:
        """Read a file written by `save`.

        Raises:
            CheckpointError: the file is damaged, or not of this format.
            FileNotFoundError: it does not exist.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no calibration file at {str(path)!r}. `calibrate(output_path=...)` writes one.")
        try:
            with safe_open(path, framework="pt") as file:
                about = strict_json((file.metadata() or {}).get(FORMAT, "null").encode())
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
        except (SafetensorError, ValueError) as error:
            raise CheckpointError(f"the calibration file {str(path)!r} cannot be read: {error}. {_AGAIN}") from None
        if not isinstance(about, dict) or about.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"the file must be a calibration of format version {FORMAT_VERSION}: {str(path)!r} is not. "
                "Write it with CalibrationResult.save()."
            )
        try:
            return cls._from_file(about, tensors)
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"the calibration file {str(path)!r} is incomplete: {error!r}. {_AGAIN}") from None

    @classmethod
    def _from_file(cls, about: dict[str, Any], tensors: dict[str, Tensor]) -> CalibrationResult:
        if wrong := [key for key, kind in _KINDS.items() if not is_of_kind(about[key], kind)]:
            raise TypeError(f"`{wrong[0]}` is of another kind")
        names = [key.removesuffix(LOW) for key in tensors if key.endswith(LOW)]
        return cls(
            about["method"],
            [report_from(LayerReport, report) for report in about["layers"]],
            {name: (tensors[name + LOW], tensors[name + HIGH]) for name in names},
            about["specs"],
            about["data"],
            [report_from(BlockReport, report) for report in about["blocks"]],
            about["clip_weights"],
        )

    def apply(self, model: nn.Module) -> None:
        """Set the ranges in a model that is quantized alike.

        Args:
            model: a `PeftModel` from `get_bitdistiller_model`.

        Raises:
            StateError: the model is no such model, or the result is of a method that changes the weights.
            CheckpointError: a parameter is missing, or is quantized otherwise or of another shape; it is named, and
                the model is as it was.
        """
        if self.method != "clip":
            raise StateError(
                f"only a clip search can be applied: got method={self.method!r}, which changed the weights. Keep them "
                "with model.save_pretrained(), and load that."
            )
        _, slots = find_student(model)
        by_name = {slot.name: slot for slot in slots}
        for name, ends in self.ranges.items():
            self._check(name, ends, by_name.get(name))
        for name, (low, high) in self.ranges.items():
            slot = by_name[name]
            device = slot.weight.device
            slot.set_range(low.to(device), high.to(device), clip_weight=self.clip_weights)

    def _check(self, name: str, ends: tuple[Tensor, Tensor], slot: Slot | None) -> None:
        if slot is None:
            raise CheckpointError(f"the model must have the calibrated parameter {name!r}: it has none of this name.")
        slot.check_searchable()
        spec = slot.spec.to_dict()
        if self.specs.get(name) != spec:
            raise CheckpointError(
                f"{name!r} must be quantized as it was calibrated: got {spec}, calibrated {self.specs.get(name)}."
            )
        expected = slot.spec.param_shape(slot.weight.shape)
        for end in ends:
            if tuple(end.shape) != tuple(expected) or end.dtype != torch.float32:
                raise CheckpointError(
                    f"the range of {name!r} must be float32 of shape {tuple(expected)}: got {end.dtype}, "
                    f"{tuple(end.shape)}."
                )
        low, high = ends
        if not bool((torch.isfinite(low) & torch.isfinite(high) & (low <= 0) & (high >= 0)).all()):
            raise CheckpointError(f"the range of {name!r} must be finite and contain zero: it does not.")


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Align columns: the first one and a nameless last one to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    signs = ["<" if column == 0 or not title else ">" for column, title in enumerate(header)]
    ruler = tuple("-" * width for width in widths)
    cells = [
        [f"{cell:{sign}{width}}" for cell, sign, width in zip(row, signs, widths, strict=True)]
        for row in (header, ruler, *rows)
    ]
    return ["  ".join(row).rstrip() for row in cells]


def without_nan(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: what was not measured is null."""
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}


def report_from(kind: type[Report], values: Mapping[str, Any], **more: Any) -> Report:
    """Undo `without_nan`.

    Args:
        kind: the class of a report.
        values: its plain values, as they were read.
        more: what was kept elsewhere.

    Raises:
        TypeError, AttributeError: a value is missing, unknown, or of another kind.
    """
    for key, value in values.items():
        if not is_of_kind(value, str if key in ("name", "note") else (float, NoneType)):
            raise TypeError(f"`{key}` is of another kind")
    return kind(**{key: math.nan if value is None else value for key, value in values.items()}, **more)
