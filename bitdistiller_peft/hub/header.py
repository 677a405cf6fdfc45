"""Reading untrusted bytes: JSON of a checkpoint, and the header of a safetensors file checked to the letter.

Nothing here allocates more than the file has bytes: every length is compared with the file's size before it is used.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

from bitdistiller_peft.errors import CheckpointError
from bitdistiller_peft.jsonfile import MAX_JSON, read_object, strict_json

AGAIN = "The file is damaged; download or save it again."
_PREFIX = 8
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}

Entry = dict[str, Any]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that must hold an object.

    Raises:
        CheckpointError: it is missing, too large, not strict JSON, or no object.
    """
    return read_object(path, AGAIN)


def read_header(path: Path) -> tuple[dict[str, Entry], int]:
    """Read the header of a safetensors file and check everything that it claims against the file's size.

    Returns:
        Entries ``{name: {"dtype", "shape", "data_offsets"}}`` and the offset in bytes where the data starts.

    Raises:
        CheckpointError: there is no such file, or it is not what safetensors writes; file and tensor are named.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.name} must be a file: there is none in {path.parent}. Download the model again.")
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(_PREFIX)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == _PREFIX else -1
        if not 2 <= length <= min(MAX_JSON, size - _PREFIX):
            raise CheckpointError(f"{path.name} must be a safetensors file: got a header of {length} bytes. {AGAIN}")
        text = file.read(length)
    try:
        header = strict_json(text)
        if not text.startswith(b"{"):
            raise ValueError("it must be an object")
        entries = _entries(header)
        end = _check_layout(entries)
    except ValueError as error:
        raise CheckpointError(f"{path.name} must have a readable header: {error}. {AGAIN}") from None
    start = _PREFIX + length
    if start + end != size:
        raise CheckpointError(f"{path.name} must be {start + end} bytes long: got {size}. {AGAIN}")
    return entries, start


def _entries(header: dict[str, Any]) -> dict[str, Entry]:
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("`__metadata__` must map names to text")
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    for name, entry in entries.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"tensor {name[:200]!r} must have dtype, shape and data_offsets, and nothing else")
        _check_entry(name[:200], entry)
    return entries


def _check_entry(name: str, entry: Entry) -> None:
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"tensor {name!r} must have a dtype of {sorted(_BITS)}: got {str(dtype)[:40]!r}")
    for key, values in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(values, list) or not all(type(value) is int and value >= 0 for value in values):
            raise ValueError(f"tensor {name!r} must have whole numbers from 0 as its {key}: got {str(values)[:80]}")
    if len(offsets) != 2:
        raise ValueError(f"tensor {name!r} must have two data_offsets: got {len(offsets)}")
    bits = math.prod(shape) * _BITS[dtype]  # Python's integers do not overflow
    if bits != 8 * (offsets[1] - offsets[0]):
        raise ValueError(
            f"tensor {name!r} must take {str(bits)[:30]} bits, by its dtype {dtype} and shape {str(shape)[:80]}: got "
            f"data_offsets {str(offsets)[:80]}"
        )


def _check_layout(entries: dict[str, Entry]) -> int:
    """Refuse holes and overlaps; return where the data ends."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["data_offsets"][0] != end:
            raise ValueError(f"tensor {name[:200]!r} must begin at byte {end}: got {entry['data_offsets'][0]}")
        end = entry["data_offsets"][1]
    return end
