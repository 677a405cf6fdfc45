"""The container of GGUF, read strictly: every count, length and offset is compared with the file before it is used.

The `gguf` package trusts what a file says of itself and does not know llama.cpp's newest type, so it reads no file
here; it only dequantizes data whose size has been checked. Layout: version 2 and 3 of ggml's `docs/gguf.md`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitdistiller_peft.errors import CheckpointError
from bitdistiller_peft.hub.header import AGAIN

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_TEXT, _ARRAY = 8, 9
_MAX_NAME = 1 << 16
_MAX_DIMENSIONS = 4
_LEAST_ENTRY = 24  # bytes that a tensor, or a key with its value, takes at least, roughly


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file.

    Attributes:
        type_id: its number in GGUF.
        shape: as torch writes it, ``[rows, columns]``.
        start: of its data, from the start of the file.
        num_bytes: of its data.
    """

    type_id: int
    shape: tuple[int, ...]
    start: int
    num_bytes: int


class GgufFile:
    """An open GGUF file: plain values by key, and tensors by name.

    Args:
        path: the file.
        sizes: weights and bytes of a block, by type.

    Raises:
        CheckpointError: it is no GGUF file, or claims something that it cannot hold.
    """

    def __init__(self, path: Path, sizes: Mapping[int, tuple[int, int]]) -> None:
        if not path.is_file() or path.stat().st_size < _LEAST_ENTRY:
            raise CheckpointError(f"{path.name} must be a GGUF file: there is none. Check the path.")
        self._data: np.ndarray[Any, Any] = np.memmap(path, dtype=np.uint8, mode="r")
        self._name, self._at = path.name, 0
        self.values: dict[str, Any] = {}
        if self._bytes(4) != b"GGUF" or self._number("<I") not in (2, 3):
            raise self._error("it must begin with 'GGUF' and version 2 or 3, in little-endian order")
        num_tensors, num_keys = self._count(), self._count()
        for _ in range(num_keys):
            key = self._text(_MAX_NAME)
            if key in self.values:
                raise self._error(f"key {key[:80]!r} comes twice")
            self.values[key] = self._value(self._number("<I"))
        self.tensors: dict[str, GgufTensor] = {}
        self._read_tensors(num_tensors, sizes)

    def data(self, name: str) -> Tensor:
        """The bytes of a tensor, uint8, one row for each of its rows; vectors have one."""
        found = self.tensors[name]
        content = np.array(self._data[found.start : found.start + found.num_bytes])
        return torch.from_numpy(content).reshape(math.prod(found.shape[:-1]), -1)

    def _read_tensors(self, count: int, sizes: Mapping[int, tuple[int, int]]) -> None:
        entries: dict[str, tuple[int, tuple[int, ...], int]] = {}
        for _ in range(count):
            name, dimensions = self._text(_MAX_NAME), self._number("<I")
            if name in entries or not 1 <= dimensions <= _MAX_DIMENSIONS:
                raise self._error(f"tensor {name[:80]!r} comes twice, or has {dimensions} dimensions")
            shape = tuple(self._number("<Q") for _ in range(dimensions))[::-1]
            entries[name] = (self._number("<I"), shape, self._number("<Q"))
        alignment = self.values.get("general.alignment", 32)
        if type(alignment) is not int or alignment not in [1 << n for n in range(17)]:
            raise self._error(f"'general.alignment' must be a power of two: got {str(alignment)[:40]!r}")
        start = -(-self._at // alignment) * alignment
        end = 0
        for name, (type_id, shape, offset) in sorted(entries.items(), key=lambda item: item[1][2]):
            block, num_bytes = sizes.get(type_id, (0, 0))
            if not block or 0 in shape or shape[-1] % block:
                raise self._error(f"tensor {name[:80]!r} is of type {type_id} and shape {shape}, which is not known")
            size = math.prod(shape) // block * num_bytes
            if offset % alignment or offset < end or start + offset + size > len(self._data):
                raise self._error(f"tensor {name[:80]!r} lies outside of the file, or over another one")
            end = offset + size
            self.tensors[name] = GgufTensor(type_id, shape, start + offset, size)

    def _value(self, kind: int) -> Any:
        """A value; an array is only skipped, and stands for itself with its length."""
        if kind == _TEXT:
            return self._text()
        if kind == _ARRAY:
            kind, count = self._number("<I"), self._number("<Q")
            skip: Callable[[], Any] = self._text
            if kind in _SCALARS:
                self._bytes(count * struct.calcsize(_SCALARS[kind]))
                return range(count)
            if kind != _TEXT or count * 8 > len(self._data) - self._at:
                raise self._error(f"an array of {count} values of type {kind} cannot be in it")
            for _ in range(count):
                skip()
            return range(count)
        if kind not in _SCALARS:
            raise self._error(f"a value of type {kind} is not known")
        return self._number(_SCALARS[kind])

    def _count(self) -> int:
        count = int(self._number("<Q"))
        if count * _LEAST_ENTRY > len(self._data):
            raise self._error(f"it is too small for {count} entries")
        return count

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._bytes(struct.calcsize(form)))[0]

    def _text(self, longest: int = 1 << 32) -> str:
        length = self._number("<Q")
        if length > longest:
            raise self._error(f"a name of {length} bytes is too long")
        try:
            return self._bytes(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self._error("a text in it is not UTF-8") from None

    def _bytes(self, count: int) -> bytes:
        if count > len(self._data) - self._at:
            raise self._error(f"it ends where {count} bytes should follow")
        self._at += count
        return self._data[self._at - count : self._at].tobytes()

    def _error(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self._name} must be a whole GGUF file: {reason}. {AGAIN}")
