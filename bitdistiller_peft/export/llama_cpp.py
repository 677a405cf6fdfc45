"""llama.cpp's own dequantization of a block, if its Python wheel (`xllamacpp`) is installed."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def dequantizer(carrier: str) -> Callable[[Array, int, int], Array] | None:
    """The function that turns bytes ``[rows, row_bytes]`` into fp32 values, or `None` without llama.cpp."""
    library = _library()
    function = None if library is None else getattr(library, f"dequantize_row_{carrier.lower()}", None)
    if function is None:
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    function.restype = None

    def dequantize(data: Array, block: int, num_bytes: int) -> Array:
        content = np.ascontiguousarray(data)
        values = np.empty((len(content), content.shape[1] // num_bytes * block), dtype=np.float32)
        function(content.ctypes.data, values.ctypes.data, values.size)
        return values

    return dequantize


@cache
def _library() -> ctypes.CDLL | None:
    spec = find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        return None
    found = sorted(Path(spec.origin).parent.glob("xllamacpp*.so"))
    return ctypes.CDLL(str(found[0])) if found else None
