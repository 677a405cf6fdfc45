"""What a model folder holds, read from its headers alone: no weight is loaded."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from bitdistiller_peft.cli.models import ADAPTER, model_folder
from bitdistiller_peft.errors import BitDistillerError, CheckpointError, add_location
from bitdistiller_peft.jsonfile import check_entries, read_object

_WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}
_STUDENT = re.compile(r"\.bitdistiller_\w+?\.")
_AGAIN = "Download or save the model again."
_KINDS = {
    "architectures?": (list, NoneType),
    "quantization_config?": (dict, NoneType),
    "overrides?": (dict, NoneType),
    "modules_to_not_convert?": (list, NoneType),
}
COMPANIONS = ("_scale", "_zero_point", "_scale_negative", "_scale_residual")


@dataclass(frozen=True)
class Tensor:
    """One tensor on disk.

    Attributes:
        name: as stored.
        dtype: as safetensors writes it.
        shape: as stored; packed weights are words.
        num_bytes: size.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True)
class Folder:
    """A model folder.

    Attributes:
        path: where it lies.
        kind: ``"packed"``, ``"latent"``, ``"adapter"`` or ``"full precision"``.
        config: config.json, or adapter_config.json for an adapter.
        tensors: all of them.
        files: the weight files.
    """

    path: Path
    kind: str
    config: dict[str, Any]
    tensors: tuple[Tensor, ...]
    files: tuple[Path, ...]

    @property
    def quantization(self) -> dict[str, Any]:
        """How it is quantized; empty for full precision."""
        return self.config if self.kind == "adapter" else dict(self.config.get("quantization_config") or {})


def read_folder(source: str) -> Folder:
    """Read config and headers.

    Args:
        source: a model folder, or the output folder of a command.

    Raises:
        CheckpointError: it is no model folder, or a file is damaged.
    """
    path = Path(model_folder(source))
    is_adapter = (path / ADAPTER).is_file()
    config = _read_config(path / (ADAPTER if is_adapter else "config.json"))
    files = tuple(sorted(path.glob("*.safetensors")))
    if not files:
        raise CheckpointError(f"{path} must hold weights as .safetensors: there are none. Save the model again.")
    from bitdistiller_peft.hub.config import BitDistillerQuantConfig  # after what can be refused without its imports
    from bitdistiller_peft.hub.header import read_header

    tensors = []
    for file in files:
        for name, entry in read_header(file)[0].items():
            begin, end = entry["data_offsets"]
            tensors.append(Tensor(name, str(entry["dtype"]), tuple(entry["shape"]), end - begin))
    section = config.get("quantization_config") or {}
    is_ours = section.get("quant_method") == "bitdistiller"
    if is_ours:
        try:
            BitDistillerQuantConfig.from_dict(section)
        except BitDistillerError as error:
            raise add_location(error, str(path / "config.json")) from None
    kind = "adapter" if is_adapter else str(section.get("state", "packed")) if is_ours else "full precision"
    return Folder(path, kind, config, tuple(tensors), files)


def parts(folder: Folder) -> list[dict[str, Any]]:
    """Bytes and weights by part: packed codes, scales, zero points, embeddings and head, the rest."""
    names = {tensor.name for tensor in folder.tensors}
    rows: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for tensor in folder.tensors:
        row = rows[_part(tensor.name, names)]
        row[0] += 1
        row[1] += _num_weights(tensor, folder, names)
        row[2] += tensor.num_bytes
    order = ("codes", "scales", "zero points", "master weights", "embeddings and head", "norms", "other")
    return [
        {"part": part, "tensors": rows[part][0], "weights": rows[part][1], "bytes": rows[part][2]}
        for part in order
        if part in rows and rows[part][2]  # a tied head of codes leaves an empty tensor
    ]


def bits_per_weight(folder: Folder) -> float:
    """Bits on disk per weight of the model, everything counted."""
    table = parts(folder)
    return 8 * sum(row["bytes"] for row in table) / max(1, sum(row["weights"] for row in table))


def _part(name: str, names: set[str]) -> str:
    if _STUDENT.search(name):
        is_scale = name.endswith(("scale", "scale_negative", "scale_residual"))
        return "scales" if is_scale else "zero points" if name.endswith("zero_point") else "master weights"
    for suffix in COMPANIONS:
        if name.endswith(suffix) and name.removesuffix(suffix) in names:
            return "zero points" if suffix == "_zero_point" else "scales"
    if f"{name}_scale" in names:
        return "codes"
    if re.search(r"embed|lm_head|wte|wpe", name):
        return "embeddings and head"
    return "norms" if re.search(r"norm|ln_", name) else "other"


def _num_weights(tensor: Tensor, folder: Folder, names: set[str]) -> int:
    part = _part(tensor.name, names)
    if part in ("scales", "zero points"):
        return 0
    if part != "codes" or folder.kind != "packed":
        return math.prod(tensor.shape)
    from bitdistiller_peft.hub.config import BitDistillerQuantConfig

    config: Any = BitDistillerQuantConfig.from_dict(folder.quantization)
    spec = config.spec(tensor.name.rpartition(".")[0])
    return _dense_size(tensor, spec, folder, names)


def _dense_size(tensor: Tensor, spec: Any, folder: Folder, names: set[str]) -> int:
    """Weights in a packed tensor: the row of words is at most a word longer than its codes."""
    *rows, words = tensor.shape or (1,)
    most = words * 32 // spec.grid.bits
    scale = next(t for t in folder.tensors if t.name == f"{tensor.name}_scale")
    if not scale.shape:
        raise CheckpointError(f"{folder.path} must hold scales in groups: {scale.name!r} is one number. {_AGAIN}")
    groups = scale.shape[-1]
    width = groups * spec.group_size if isinstance(spec.group_size, int) and spec.group_size > 0 else most
    return math.prod(rows) * min(most, width)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(
            f"{path.parent} must be a model folder with config.json or {ADAPTER}: there is none. Check the path."
        )
    config = read_object(path, _AGAIN)
    check_entries(config, _KINDS, path, _AGAIN)
    return config
