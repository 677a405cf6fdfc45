"""The compiled kernels as Python sees them: structures, signatures, and which instruction set is in use."""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from ctypes import POINTER, c_float, c_int32, c_int64, c_uint64, c_void_p
from functools import lru_cache

from bitdistiller_peft.errors import UnknownNameError
from bitdistiller_peft.kernels.cpu.build import BuildError, library_path

logger = logging.getLogger(__name__)

VERSION = 3
ISA_VARIABLE = "BITDISTILLER_CPU_ISA"
ISAS = ("portable", "avx2", "avx512", "avx512_bf16")


class WeightStruct(ctypes.Structure):
    """`BdWeight` of csrc/layout.h: a packed weight in its portable layout."""

    _fields_ = (
        *((name, c_void_p) for name in ("words", "scale", "second", "zero")),
        *((name, c_int64) for name in ("rows", "cols", "groups", "group_size", "words_per_row", "zero_words")),
        *((name, c_int32) for name in ("bits", "scale_type", "per_matrix")),
        ("c", c_float),
        ("a", c_float * 16),
        ("b", c_float * 16),
    )


class StreamStruct(ctypes.Structure):
    """`BdStream` of csrc/layout.h: a packed weight laid out for reading from one end to the other."""

    _fields_ = (
        *((name, c_int64) for name in ("rows", "cols", "units", "groups", "param_bytes", "strip_bytes")),
        *((name, c_int32) for name in ("bits", "scale_type", "units_per_group")),
        ("c", c_float),
        ("a", c_float * 16),
        ("b", c_float * 16),
    )


class FakeStruct(ctypes.Structure):
    """`BdFake` of csrc/fake.h: a float weight in runs, and the parameters of its groups."""

    _fields_ = (
        *((name, c_void_p) for name in ("weight", "grad", "scale", "second", "out", "to_scale", "to_second")),
        *((name, c_int64) for name in ("runs", "size", "runs_per_group")),
        *((name, c_int32) for name in ("family", "num_levels")),
        *((name, c_float) for name in ("max_code", "zero_point", "lowest", "highest")),
        ("levels", c_float * 16),
        ("midpoints", c_float * 16),
    )


_SIGNATURES = {
    "bd_version": (c_int32, ()),
    "bd_best_isa": (c_int32, ()),
    "bd_uses_openmp": (c_int32, ()),
    "bd_read": (c_uint64, (c_void_p, c_int64, c_int32)),
    "bd_stream_layout": (c_int64, (POINTER(StreamStruct), c_int64, c_int64)),
    "bd_write_stream": (None, (POINTER(WeightStruct), POINTER(StreamStruct), c_void_p, c_int32)),
    "bd_linear": (
        c_int32,
        (c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int32, c_int32, c_int32),
    ),
    "bd_ternary_int8": (
        c_int32,
        (*(c_void_p,) * 3, c_int64, c_void_p, c_int32, c_int32, c_void_p, c_void_p, c_int32, c_int32, c_int32),
    ),
    "bd_fake_quantize": (None, (POINTER(FakeStruct), c_int32, c_int32)),
    "bd_fake_quantize_backward": (None, (POINTER(FakeStruct), c_int32, c_int32)),
    "bd_ends": (None, (c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int32, c_int32)),
    "bd_magnitudes": (None, (c_void_p, c_int64, c_int64, c_void_p, c_int32, c_int32)),
    "bd_places": (None, (c_void_p, c_int64, c_int64, *(c_void_p,) * 4, c_int32)),
    "bd_dequantize": (None, (POINTER(WeightStruct), c_int64, c_int64, c_void_p, c_int32, c_int32, c_int32)),
}

_lock = threading.Lock()


def load() -> ctypes.CDLL | None:
    """The library, compiled and loaded on the first call; `None`, after one notice, where that is impossible."""
    if _load.cache_info().currsize:  # every product asks
        return _load()
    with _lock:
        return _load()


@lru_cache(maxsize=1)
def _load() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(library_path()))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        if library.bd_version() != VERSION:
            raise BuildError(f"the kernels must be of version {VERSION}: got {library.bd_version()}")
    except (BuildError, OSError) as error:
        logger.warning("packed layers run on the reference backend, slowly but correctly: %s", error)
        return None
    return library


def best_isa() -> str:
    """The best instruction set of this machine; `"portable"` where nothing could be compiled."""
    library = load()
    return ISAS[library.bd_best_isa()] if library is not None else ISAS[0]


@lru_cache(maxsize=1)
def isa() -> int:
    """The instruction set in use, as an index of `ISAS`: the best, or a lower one named by ``BITDISTILLER_CPU_ISA``.

    Raises:
        UnknownNameError: the variable names no instruction set.
    """
    best, wanted = ISAS.index(best_isa()), os.environ.get(ISA_VARIABLE)
    if not wanted:
        return best
    if wanted not in ISAS:
        raise UnknownNameError(ISA_VARIABLE, wanted, ISAS)
    if ISAS.index(wanted) > best:
        logger.warning("%s=%s is not available on this machine: using %s", ISA_VARIABLE, wanted, ISAS[best])
    return min(best, ISAS.index(wanted))
