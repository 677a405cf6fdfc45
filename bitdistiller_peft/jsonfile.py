"""JSON files of which nothing is believed: they may be cut off, damaged, of another program, or hostile.

Whoever reads one says what the remedy is; the error names the file, so that nobody has to guess which one it was.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitdistiller_peft.errors import BitDistillerError, CheckpointError

MAX_JSON = 100_000_000  # bytes; also what safetensors allows a header
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

_LARGEST = (1 << 63) - 1  # larger numbers count nothing, and overflow wherever they are used

Kinds = type | tuple[type, ...]


def strict_json(content: bytes, *, allow_nan: bool = False, allow_halves: bool = False) -> Any:
    """Parse JSON that leaves nothing open: UTF-8, no repeated key, no NaN, no depth that exhausts the stack.

    Args:
        content: the bytes.
        allow_nan: take NaN and infinities, which stand in the results of runs that went wrong.
        allow_halves: take the halves of characters (surrogates), which cannot be written as UTF-8.

    Raises:
        ValueError: the text is none of that.
    """
    constants: dict[str, Any] = {} if allow_nan else {"parse_constant": _no_constant, "parse_float": _finite}
    try:
        found = json.loads(content.decode("utf-8"), object_pairs_hook=_once, **constants)
        if not allow_halves and _SURROGATE.search(content):
            json.dumps(found, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return found


def read_object(
    path: Path, remedy: str, *, error: type[BitDistillerError] = CheckpointError, allow_nan: bool = False
) -> dict[str, Any]:
    """Read a JSON file that must hold an object.

    Args:
        path: the file; it is named in every message as it stands here.
        remedy: what to do where it cannot be read, a sentence or two.
        error: what to raise.
        allow_nan: see `strict_json`.

    Raises:
        BitDistillerError: of the class `error`: it is missing, too large, no strict JSON, or no object.
    """
    try:
        if not path.is_file():
            raise error(f"{path} must be a file: there is none. {remedy}")
        if (size := path.stat().st_size) > MAX_JSON:
            raise error(f"{path} must be at most {MAX_JSON:,} bytes long: got {size:,}. {remedy}")
        found = strict_json(path.read_bytes(), allow_nan=allow_nan)
    except BitDistillerError:
        raise
    except (OSError, ValueError) as reason:
        raise error(f"{path} must be readable JSON: {reason}. {remedy}") from None
    if not isinstance(found, dict):
        raise error(f"{path} must hold a JSON object: got {type(found).__name__}. {remedy}")
    return found


def check_entries(
    content: Any,
    kinds: Mapping[str, Kinds],
    where: Path | str,
    remedy: str,
    *,
    error: type[BitDistillerError] = CheckpointError,
) -> None:
    """Refuse an object that lacks an entry, or has one of another kind.

    Args:
        content: what was read.
        kinds: type, or types, by name; ``"layout.width"`` is inside of `layout`, and ``"note?"`` may be missing. A
            whole number is also a `float`; truth values are no numbers.
        where: the file.
        remedy: what to do.
        error: what to raise.

    Raises:
        BitDistillerError: of the class `error`; the entry is named.
    """
    for name, kind in kinds.items():
        is_optional, name = name.endswith("?"), name.removesuffix("?")
        value = content
        if is_optional and isinstance(content, Mapping) and name not in content:
            continue
        for key in name.split("."):
            if not isinstance(value, Mapping) or key not in value:
                raise error(f"{where} must hold `{name}`: it does not. {remedy}")
            value = value[key]
        if not is_of_kind(value, kind):
            wanted = " or ".join(each.__name__ for each in _tuple(kind)).replace("NoneType", "null")
            raise error(f"{where} must hold `{name}` as {wanted}: got {_short(value)}. {remedy}")


def is_of_kind(value: Any, kind: Kinds) -> bool:
    """Whether a value is of a kind, as `check_entries` says."""
    kinds = _tuple(kind)
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int) and not -_LARGEST <= value <= _LARGEST:
        return False
    return isinstance(value, kinds) or (isinstance(value, int) and float in kinds)


def _tuple(kind: Kinds) -> tuple[type, ...]:
    return kind if isinstance(kind, tuple) else (kind,)


def _short(value: Any) -> str:
    """A value for a message; a large or deep one by its type alone."""
    return repr(value)[:80] if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)[:80]!r} comes twice")
    return result


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is too large a number")
    return number


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
