"""The contract of a foreign format, and the registry. The set is open: `register_export_format` takes one more.

A format is plain functions: which weights it can hold, how to write them, and how to read them back. Reading must go
through other code than writing, best through the foreign project's own library: the comparison is worth what its
reader is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from bitdistiller_peft.errors import ConfigError, ExportError, UnknownNameError
from bitdistiller_peft.export.source import PackedSource, PackedWeight
from bitdistiller_peft.registry import add_new, look_up

Options = Mapping[str, Any]


@dataclass(frozen=True)
class ForeignWeight:
    """A quantized matrix as a foreign reader found it: ``scale * (codes - zero_point)``.

    Attributes:
        name: the weight's name in the packed checkpoint.
        dense: ``[out, in]``, dequantized by the reader, in the reader's dtype.
        codes: integers ``[out, in]``, if the reader shows them.
        scale: ``[out, groups]``; a negative one turns the codes round.
        zero_point: integers ``[out, groups]`` in steps of the foreign codes.
    """

    name: str
    dense: Tensor
    codes: Tensor | None = None
    scale: Tensor | None = None
    zero_point: Tensor | None = None


@dataclass(frozen=True)
class ForeignTensor:
    """A tensor that is not quantized, as a foreign reader found it.

    Attributes:
        name: the tensor's name in the packed checkpoint.
        tensor: its values; only values are compared, since a format may store another dtype that holds them all.
    """

    name: str
    tensor: Tensor


def no_refusal(source: PackedSource, options: Options) -> str | None:
    """Accept every model."""
    return None


@dataclass(frozen=True)
class ExportFormat:
    """One foreign format.

    Attributes:
        name: what `export_model(format=...)` takes.
        engines: who serves it, for people.
        refuse_weight: the reason why a weight cannot be held exactly, or `None`.
        write: write a model that was not refused into an empty folder.
        read: read it back; names are those of the packed checkpoint.
        refuse_model: the reason why a model as a whole cannot be held, or `None`.
        options: names of the options and their values, the default first; an empty tuple stands for any text.
        variants: combinations of options to try when looking for one that holds a model, best first.
        packages: what must be installed, by import name.
        reader: the package that reads back, or `None` for the independent reader of this library.
        activation_bits: the widths of activation codes that engines use with the format; `None` for none.
        weight_files: pattern of the files that hold the weights.
    """

    name: str
    engines: str
    refuse_weight: Callable[[PackedWeight, Options], str | None]
    write: Callable[[PackedSource, Path, Options], None]
    read: Callable[[PackedSource, Path], Iterator[ForeignWeight | ForeignTensor]]
    refuse_model: Callable[[PackedSource, Options], str | None] = no_refusal
    options: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    variants: tuple[Options, ...] = ({},)
    packages: tuple[str, ...] = ()
    reader: str | None = None
    activation_bits: tuple[int | None, ...] = (None,)
    weight_files: str = "*.safetensors"

    def resolve(self, given: Options) -> dict[str, Any]:
        """Fill in the defaults of the options.

        Raises:
            UnknownNameError: an option that the format does not have, or a value that it does not take.
        """
        for name, value in given.items():
            if name not in self.options:
                raise UnknownNameError(f"option of format {self.name!r}", name, self.options)
            allowed = self.options[name]
            if allowed and value not in allowed:
                raise ConfigError(
                    f"`{name}` must be one of {list(allowed)} for format {self.name!r}: got {name}={value!r}."
                )
        return {name: given.get(name, values[0] if values else None) for name, values in self.options.items()}

    def check_installed(self) -> None:
        """Refuse to go on without the packages that write or read the format.

        Raises:
            ExportError: a package is missing.
        """
        missing = [name for name in self.packages if find_spec(name) is None]
        if missing:
            raise ExportError(
                f"format {self.name!r} needs the package {missing[0]!r}: it is not installed. "
                "Run: pip install 'bitdistiller_peft[export]'"
            )

    @property
    def reader_name(self) -> str:
        """The reader and its version."""
        if self.reader is None:
            return "bitdistiller_peft's reader of the published layout"
        try:
            return f"{self.reader} {version(self.reader)}"
        except PackageNotFoundError:
            return self.reader


_FORMATS: dict[str, ExportFormat] = {}


def register_export_format(export_format: ExportFormat) -> None:
    """Add a format.

    Raises:
        ConfigError: the name is taken.
    """
    add_new(_FORMATS, "format", export_format.name, export_format)


def export_format_names() -> list[str]:
    """List the formats, the smallest files first."""
    return list(_FORMATS)


def get_export_format(name: str) -> ExportFormat:
    """Look up a format.

    Raises:
        UnknownNameError: no format has this name.
    """
    return look_up(_FORMATS, "format", name)
