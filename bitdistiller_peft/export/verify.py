"""Compare a foreign file with the packed model: number by number, then by its logits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bitdistiller_peft.errors import BitDistillerError, ExportError
from bitdistiller_peft.export.affine import zero_points
from bitdistiller_peft.export.formats import ExportFormat, ForeignTensor, ForeignWeight, get_export_format
from bitdistiller_peft.export.logits import ENGINE_TOLERANCE, Engine, LogitsReport, compare_engine, compare_logits
from bitdistiller_peft.export.source import PackedSource, PackedWeight, open_source


@dataclass(frozen=True)
class VerifyReport:
    """What was compared, all of it equal; a difference is an error, never a report.

    Attributes:
        format: the format's name.
        reader: what read the foreign file, with its version.
        num_weights: quantized matrices.
        num_codes: codes compared one by one; 0 where the format stores no codes.
        num_scales: scales compared one by one, as often as the format stores them.
        num_values: dequantized values compared.
        num_plain: values of tensors that are not quantized.
        num_bytes: size of the weight files.
        logits: how far the logits are apart, by the foreign values and by an engine, where they were compared.
    """

    format: str
    reader: str
    num_weights: int
    num_codes: int
    num_scales: int
    num_values: int
    num_plain: int
    num_bytes: int
    logits: tuple[LogitsReport, ...] = field(default=(), compare=False)

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of the weight files: everything in them counts."""
        return 8 * self.num_bytes / max(1, self.num_values + self.num_plain)

    def __str__(self) -> str:
        return (
            f"{self.format}, read by {self.reader}: {self.num_weights} matrices, {self.num_codes:,} codes, "
            f"{self.num_scales:,} scales, {self.num_values:,} dequantized and {self.num_plain:,} other values equal; "
            f"{self.bits_per_weight:.3f} bits per weight{''.join(f'; {found}' for found in self.logits)}"
        )


def verify_export(
    model: nn.Module | str | os.PathLike[str],
    exported: str | os.PathLike[str],
    format: str,
    *,
    logits: bool = True,
    engine: Engine | None = None,
    engine_tolerance: float = ENGINE_TOLERANCE,
) -> VerifyReport:
    """Read an exported model with the foreign reader and compare every code, scale and value with the packed one.

    Then compare logits on a fixed prompt of 32 tokens, in fp32: those of the values that the foreign reader found with
    those of the packed model. They may differ by 8 roundings of the reader's dtype, relative to their root mean
    square: 1e-5 for fp32 values, 3.9e-3 for float16 ones, 3.1e-2 for bfloat16 ones; `bitdistiller_peft.export.logits`
    says why.

    Args:
        model: the packed model, or its folder.
        exported: folder that `export_model` wrote, or a copy of it.
        format: the format's name.
        logits: also compare logits, which takes the memory of the model in fp32.
        engine: also compare the logits of an engine: a function that takes the exported folder and ids ``[tokens]``
            and returns logits ``[tokens, vocab]``.
        engine_tolerance: how far the engine's logits may be away.

    Returns:
        What was compared.

    Raises:
        ExportError: something differs, is missing, or cannot be read; the tensor and the position are named.
        UnknownNameError: no format has this name.
        StateError, CheckpointError: the model is not packed, or damaged.
    """
    chosen = get_export_format(format)
    chosen.check_installed()
    folder = Path(exported)
    if not any(folder.glob(chosen.weight_files)):
        raise ExportError(
            f"{folder} must hold an export in the format {chosen.name!r}, {chosen.weight_files}: it holds none. Name "
            "the folder that the export was written to, and its own format."
        )
    with open_source(model) as source:
        report = compare(source, folder, chosen)
        found = [compare_logits(source, folder, chosen)] if logits else []
        if engine is not None:
            found.append(compare_engine(source, folder, engine, tolerance=engine_tolerance))
    return replace(report, logits=tuple(found))


def compare(source: PackedSource, folder: Path, chosen: ExportFormat) -> VerifyReport:
    """`verify_export` on an open source."""
    plain = set(source.plain_names)
    left = {*source.quantized_names, *plain}
    codes = scales = values = plain_values = 0
    for found in _guarded(source, folder, chosen):
        if found.name not in left:
            raise ExportError(f"the exported model must hold {found.name!r} once: it holds it twice, or by mistake.")
        left.remove(found.name)
        if isinstance(found, ForeignWeight):
            weight = source.weight(found.name)
            compare_weight(weight, found)
            codes += 0 if found.codes is None else found.codes.numel()
            scales += 0 if found.scale is None else found.scale.numel()
            values += found.dense.numel()
        else:
            _compare_plain(source, found)
            plain_values += found.tensor.numel()
    if left:
        raise ExportError(f"the exported model must hold {min(left)!r}: it is missing. {_AGAIN}")
    size = sum(path.stat().st_size for path in folder.glob(chosen.weight_files))
    weights = len(source.quantized_names)
    return VerifyReport(chosen.name, chosen.reader_name, weights, codes, scales, values, plain_values, size)


_AGAIN = "The file is damaged, or belongs to another model; export again."


def _guarded(source: PackedSource, folder: Path, chosen: ExportFormat) -> Iterator[ForeignWeight | ForeignTensor]:
    """Let a foreign reader's own failures come out as ours."""
    try:
        yield from chosen.read(source, folder)
    except BitDistillerError:
        raise
    except Exception as error:  # whatever a damaged file leads a foreign reader to
        reason = f"{type(error).__name__}: {str(error)[:300]}"
        raise ExportError(f"{chosen.reader_name} must be able to read {str(folder)!r}: {reason}. {_AGAIN}") from error


def compare_weight(weight: PackedWeight, found: ForeignWeight) -> None:
    """Compare one matrix.

    Raises:
        ExportError: the first code, scale or dequantized value that differs.
    """
    shape = (weight.out_features, weight.in_features)
    if tuple(found.dense.shape) != shape:
        raise ExportError(f"tensor {weight.name!r} must have shape {list(shape)}: got {list(found.dense.shape)}.")
    if found.codes is not None and found.scale is not None and found.zero_point is not None:
        _compare_codes(weight, found.codes, found.scale, found.zero_point)
    _same(weight.name, "dequantized value", weight.dense(found.dense.dtype), found.dense)


def _compare_codes(weight: PackedWeight, codes: Tensor, scale: Tensor, zero_point: Tensor) -> None:
    """Undo what the format does to codes (shift, turn round, split groups) and compare with ours."""
    repeat = scale.shape[1] // weight.params.scale.shape[1]
    width = weight.in_features // scale.shape[1]
    _same(weight.name, "scale", weight.row_scale.float().repeat_interleave(repeat, 1), scale.float().abs())
    steps = codes.to(torch.int32) - zero_point.to(torch.int32).repeat_interleave(width, 1)
    turned = scale.float().sign().to(torch.int32).repeat_interleave(width, 1)
    own = zero_points(weight).to(torch.int32).repeat_interleave(weight.group_width, 1)
    _same(weight.name, "code", weight.codes.to(torch.int32), steps * turned + own)


def _compare_plain(source: PackedSource, found: ForeignTensor) -> None:
    expected = source.tensor(found.name)
    if expected.shape != found.tensor.shape:
        raise ExportError(
            f"tensor {found.name!r} must have shape {list(expected.shape)}: got {list(found.tensor.shape)}. {_AGAIN}"
        )
    _same(found.name, "value", expected.double(), found.tensor.double())


def _same(name: str, what: str, expected: Tensor, found: Tensor) -> None:
    if torch.equal(expected, found):
        return
    row: list[int] = next(iter((expected != found).nonzero().tolist()), [])
    at = tuple(row)
    raise ExportError(
        f"every {what} of {name!r} must equal the packed model's: at {row} it is {found[at].item()}, packed is "
        f"{expected[at].item()}. {_AGAIN}"
    )
