"""Folders of safetensors files that other tools wrote: nothing in them is believed before it is checked.

Config, index and headers go through the strict readers that our own checkpoints go through (`hub.files`,
`hub.header`). Pickles (.bin, .pt) are never opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from bitdistiller_peft.errors import BitDistillerError, CheckpointError, ForeignModelError, add_location
from bitdistiller_peft.hub.files import check_folder, check_place, weight_files
from bitdistiller_peft.hub.header import Entry, read_header, read_json
from bitdistiller_peft.importing.formats import ForeignModel, ImportedWeight

# where older releases of AutoGPTQ and AutoAWQ wrote what config.json says today
_OLD_SECTIONS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_DTYPES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def read_section(folder: Path) -> dict[str, Any]:
    """What a folder says about its quantization; empty for a full-precision model.

    Raises:
        CheckpointError: config.json is missing, damaged or elsewhere.
    """
    section = read_json(check_place(folder / "config.json", folder)).get("quantization_config")
    if isinstance(section, dict):
        return section
    for name, method in _OLD_SECTIONS.items():
        if (folder / name).is_file():
            return {"quant_method": method} | read_json(check_place(folder / name, folder))
    return {}


def choice(section: Mapping[str, Any], key: str, allowed: tuple[Any, ...], *, advice: str = "") -> Any:
    """An entry of a quantization config that must be one of a few values; the first where it is missing.

    Raises:
        ForeignModelError: it is another.
    """
    value = section.get(key, allowed[0])
    if not any(type(value) is type(known) and value == known for known in allowed):
        raise ForeignModelError(
            f"`{key}` of the checkpoint must be one of {list(allowed)}: got {key}={repr(value)[:100]}. "
            f"{advice or 'Nothing else can be taken over exactly.'}"
        )
    return value


def refuse_entries(section: Mapping[str, Any], reasons: Mapping[str, str]) -> None:
    """Refuse entries of a quantization config that say that the model does more than multiply by its weights.

    Raises:
        ForeignModelError: one is set.
    """
    for key, reason in reasons.items():
        if section.get(key):
            raise ForeignModelError(
                f"`{key}` of the checkpoint must be off: got {key}={repr(section[key])[:100]}. {reason}"
            )


class TensorFolder:
    """A folder with config.json and safetensors files, whose headers have been compared with everything else.

    Args:
        path: the folder.

    Raises:
        CheckpointError: something is missing, damaged, elsewhere, or larger than the files can be.
    """

    def __init__(self, path: Path) -> None:
        check_folder(path)
        self.config = read_json(path / "config.json")
        self.section = read_section(path)
        self.config.pop("quantization_config", None)
        self._entries: dict[str, tuple[Path, Entry]] = {}
        for file in weight_files(path):
            self._entries |= {name: (file, entry) for name, entry in read_header(file)[0].items()}

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._entries)

    def shape(self, name: str, dimensions: int | None = None) -> tuple[int, ...]:
        """The shape of a tensor, from the header.

        Raises:
            CheckpointError: it is not there, or has another number of dimensions.
        """
        if name not in self._entries:
            raise CheckpointError(f"the checkpoint must hold tensor {name!r}: it is missing. Download it again.")
        shape = tuple(self._entries[name][1]["shape"])
        if dimensions not in (None, len(shape)):
            raise CheckpointError(f"tensor {name!r} must have {dimensions} dimensions: got shape {list(shape)}.")
        return shape

    def get(self, name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> Tensor:
        """Read a tensor whose shape and dtype are known.

        Raises:
            CheckpointError: it is not there, or it is another one; nothing is read then.
        """
        found, (file, entry) = self.shape(name), self._entries[name]
        dtype = _DTYPES.get(entry["dtype"])
        if found != shape or dtype not in dtypes:
            raise CheckpointError(
                f"tensor {name!r} in {file.name} must have shape {list(shape)} and dtype "
                f"{' or '.join(map(str, dtypes))}: got {list(found)} and {dtype or entry['dtype']}. config.json and "
                "weights do not belong together, or the layout is one that is not read here."
            )
        return self.tensor(name)

    def tensor(self, name: str) -> Tensor:
        """Read a tensor as it is stored."""
        with safe_open(self._entries[name][0], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def model(
        self,
        format: str,
        layers: Iterable[str],
        suffixes: tuple[str, ...],
        read: Callable[[str, tuple[int, int]], ImportedWeight],
    ) -> ForeignModel:
        """The open model: what belongs to quantized layers, and the rest.

        Args:
            format: the format's name.
            layers: names of the quantized layers.
            suffixes: what follows such a name in the names of its tensors, its bias not among them.
            read: reads one layer.

        Raises:
            ForeignModelError: nothing is quantized.
        """
        layers = tuple(sorted(layers))
        if not layers:
            raise ForeignModelError(
                f"the checkpoint must hold layers quantized as {format!r}: got none. For a full-precision model, use "
                "get_bitdistiller_model()."
            )
        owned = {layer + suffix for layer in layers for suffix in suffixes}

        def read_layer(layer: str, shape: tuple[int, int]) -> ImportedWeight:
            try:
                return read(layer, shape)
            except BitDistillerError as error:
                raise add_location(error, f"layer {layer!r}") from None

        return ForeignModel(
            format,
            self.config,
            layers,
            tuple(sorted(self.names - owned)),
            read_layer,
            self.tensor,
            lambda layer, shape: read_layer(layer, shape).dense(),
        )
