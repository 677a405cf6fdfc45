"""The contract of a format that models are imported from, and the registry. `register_import_format` takes one more.

A format is one function: it opens a folder or a file, refuses what none of our grids holds, and shows the rest as codes
and parameters of a grid. It shares no code with the exporter of the same name, so that a mistake in one of them shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitdistiller_peft.errors import ForeignModelError
from bitdistiller_peft.quantizers import QuantParams, QuantSpec, dequantize
from bitdistiller_peft.registry import add_new, look_up


@dataclass(frozen=True)
class ImportedWeight:
    """A foreign matrix in our terms.

    Attributes:
        spec: the grid, the group size and the dtype of the scales.
        codes: uint8 ``[out, in]``.
        params: scales and zero points ``[out, groups]``, as they are stored once packed.
    """

    spec: QuantSpec
    codes: Tensor
    params: QuantParams

    def dense(self) -> Tensor:
        """The weight ``[out, in]`` in fp32: what the foreign reader makes of it."""
        return dequantize(self.codes, self.params, self.spec)


@dataclass(frozen=True)
class ForeignModel:
    """An open checkpoint of another tool. Names are those of transformers.

    Attributes:
        format: the format's name.
        config: the model's config, without what is said about quantization.
        layers: names of the quantized layers.
        plain_names: names of all other tensors.
        read: a quantized layer, by its name and shape ``(out, in)``; refuses what no grid of ours holds.
        tensor: another tensor, by name.
        dense: the weight of a quantized layer in fp32, also where no grid of ours holds it.
    """

    format: str
    config: dict[str, Any]
    layers: tuple[str, ...]
    plain_names: tuple[str, ...]
    read: Callable[[str, tuple[int, int]], ImportedWeight]
    tensor: Callable[[str], Tensor]
    dense: Callable[[str, tuple[int, int]], Tensor]

    def plain(self) -> Iterator[tuple[str, Tensor]]:
        """What is not quantized, one tensor at a time.

        Raises:
            ForeignModelError: a value is not finite.
        """
        for name in self.plain_names:
            tensor = self.tensor(name)
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ForeignModelError(f"tensor {name!r} must be finite: got NaN or Inf in it. Download it again.")
            yield name, tensor


@dataclass(frozen=True)
class ImportFormat:
    """One foreign format.

    Attributes:
        name: what config.json calls it (`quant_method`), or the ending of its files.
        made_by: which tools write it, for people.
        open: opens a folder or a file.
        packages: what must be installed, by import name.
    """

    name: str
    made_by: str
    open: Callable[[Path], ForeignModel]
    packages: tuple[str, ...] = ()

    def check_installed(self) -> None:
        """Refuse to go on without the packages that the format needs.

        Raises:
            ForeignModelError: a package is missing.
        """
        missing = [name for name in self.packages if find_spec(name) is None]
        if missing:
            raise ForeignModelError(
                f"format {self.name!r} needs the package {missing[0]!r}: it is not installed. "
                f"Run: pip install {missing[0]}"
            )


_FORMATS: dict[str, ImportFormat] = {}


def register_import_format(import_format: ImportFormat) -> None:
    """Add a format.

    Raises:
        ConfigError: the name is taken.
    """
    add_new(_FORMATS, "format", import_format.name, import_format)


def import_format_names() -> list[str]:
    """List the formats."""
    return list(_FORMATS)


def get_import_format(name: str) -> ImportFormat:
    """Look up a format.

    Raises:
        UnknownNameError: no format has this name.
    """
    return look_up(_FORMATS, "format", name)
