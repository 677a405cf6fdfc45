"""llama.cpp's C library, as the wheel `xllamacpp` carries it: logits after every token of a text."""

from __future__ import annotations

import ctypes
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

CONTEXT = 1024


class Opaque(ctypes.Structure):
    """A struct of settings, larger than the library's: it is returned through memory and passed on the stack."""

    _fields_ = (("numbers", ctypes.c_uint32 * 3), ("rest", ctypes.c_uint8 * 1012))


class Batch(ctypes.Structure):
    """`llama_batch`."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.c_void_p),
        ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


QUIET = ctypes.CFUNCTYPE(None, ctypes.c_int32, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, data: None)
SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_log_set": (None, (ctypes.c_void_p, ctypes.c_void_p)),
    "llama_model_default_params": (Opaque, ()),
    "llama_context_default_params": (Opaque, ()),
    "llama_model_load_from_file": (ctypes.c_void_p, (ctypes.c_char_p, Opaque)),
    "llama_init_from_model": (ctypes.c_void_p, (ctypes.c_void_p, Opaque)),
    "llama_set_n_threads": (None, (ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32)),
    "llama_decode": (ctypes.c_int32, (ctypes.c_void_p, Batch)),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), (ctypes.c_void_p,)),
    "llama_get_memory": (ctypes.c_void_p, (ctypes.c_void_p,)),
    "llama_memory_clear": (None, (ctypes.c_void_p, ctypes.c_bool)),
    "llama_model_get_vocab": (ctypes.c_void_p, (ctypes.c_void_p,)),
    "llama_vocab_n_tokens": (ctypes.c_int32, (ctypes.c_void_p,)),
}


def open_library(signatures: dict[str, tuple[Any, tuple[Any, ...]]]) -> ctypes.CDLL:
    """The C library, with the functions of some signatures ready to be called.

    Raises:
        ModuleNotFoundError: the wheel is not installed.
    """
    spec = find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("xllamacpp")
    library = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("xllamacpp*.so"))))
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class Scorer:
    """A GGUF file loaded by llama.cpp's own C library."""

    def __init__(self, path: Path) -> None:
        library = self._library = open_library(SIGNATURES)
        library.llama_log_set(QUIET, None)
        settings = library.llama_context_default_params()
        settings.numbers[:] = (CONTEXT, CONTEXT, CONTEXT)  # n_ctx, n_batch, n_ubatch
        model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
        self._context = library.llama_init_from_model(model, settings)
        library.llama_set_n_threads(self._context, torch.get_num_threads(), torch.get_num_threads())
        self._vocab_size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))

    def logits(self, ids: list[int]) -> Tensor:
        """Logits after every token: fp32 ``[tokens, vocabulary]``."""
        self._forget()
        return torch.from_numpy(self._decode(ids, 0, [1] * len(ids)).copy())

    def generate(self, prompt: list[int], num_tokens: int) -> list[int]:
        """Take the best token again and again, each step behind the cache of the last."""
        self._forget()
        found: list[int] = []
        step, past = prompt, 0
        while len(found) < num_tokens:
            logits = self._decode(step, past, [0] * (len(step) - 1) + [1])
            past += len(step)
            step = [int(logits[-1].argmax())]
            found += step
        return found

    def _forget(self) -> None:
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)

    def _decode(self, ids: list[int], past: int, wanted: list[int]) -> np.ndarray[Any, Any]:
        count = len(ids)
        token = (ctypes.c_int32 * count)(*ids)
        position = (ctypes.c_int32 * count)(*range(past, past + count))
        batch = Batch(n_tokens=count, token=token, pos=position, logits=(ctypes.c_int8 * count)(*wanted))
        if self._library.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        return np.ctypeslib.as_array(self._library.llama_get_logits(self._context), (sum(wanted), self._vocab_size))
