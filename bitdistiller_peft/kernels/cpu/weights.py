"""Packed tensors as the kernels take them: descriptions of the portable layout, and streams, made once per weight.

A stream holds the same codes and scales in the order in which a multiplication reads them. It is kept beside the
weight, not in it: the weight's own bytes, its `state_dict()`, copies and pickles are those of the portable layout, and
a stream is gone with its weight. Whatever changes the weight (loading, moving, writing in place) makes a new one.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from ctypes import byref
from functools import lru_cache

import torch
from torch import Tensor

from bitdistiller_peft.errors import WeightError
from bitdistiller_peft.kernels.cpu.library import StreamStruct, WeightStruct, load
from bitdistiller_peft.kernels.layout import SCALE_TYPES, Layout, check_weight
from bitdistiller_peft.kernels.tables import TABLE_SIZE, TableForm
from bitdistiller_peft.packing import pack_codes, unpack_row

UNIT = 32  # weights that one register looks up at once
UNITS_PER_PACK = {2: 8, 3: 16, 4: 4}
ALIGNMENT = 64


@lru_cache(maxsize=4096)
def units_per_group(layout: Layout, in_features: int) -> int:
    """Units that share parameters in a stream; 0 where the groups do not fit into one."""
    largest = UNITS_PER_PACK.get(layout.bits, 0)
    if largest == 0 or layout.num_groups(in_features) == 1:
        return largest
    sizes = [size for size in (1, 2, 4, largest) if size <= largest and layout.group_size % (size * UNIT) == 0]
    return max(sizes, default=0)


def describe(
    words: Tensor, scale: Tensor, second: Tensor | None, layout: Layout, in_features: int
) -> tuple[WeightStruct, list[Tensor]]:
    """The C description of a portable weight, and the tensors that must live as long as it is used."""
    check_weight(words, scale, second, layout, in_features)
    if layout.packing != "bitstream":
        words = pack_codes(unpack_row(words, layout.bits, in_features, layout.packing), layout.bits)  # type: ignore[arg-type]
    form, groups = layout.form(), layout.num_groups(in_features)
    words, scale = words.detach().contiguous(), scale.detach().contiguous()
    second = None if second is None else second.detach().contiguous()
    is_zero = form.second == "zero_point"
    struct = WeightStruct(
        words=words.data_ptr(),
        scale=scale.data_ptr(),
        rows=words.shape[0],
        cols=in_features,
        groups=groups,
        group_size=in_features if layout.group_size <= 0 else layout.group_size,
        words_per_row=words.shape[1],
        zero_words=second.shape[1] if second is not None and is_zero else 0,
        bits=layout.bits,
        scale_type=SCALE_TYPES[scale.dtype],
        per_matrix=int(layout.group_size == 0),
    )
    if second is not None and form.second is not None:
        setattr(struct, "zero" if is_zero else "second", second.data_ptr())
    _fill(struct, form)
    return struct, [words, scale, *([] if second is None else [second])]


class Stream:
    """A packed weight laid out for reading; `None` of its tensors is the weight's own.

    Attributes:
        struct: its C description.
        data: the bytes, uint8, aligned to `ALIGNMENT`.
        address: where they begin.
    """

    def __init__(self, words: Tensor, scale: Tensor, second: Tensor | None, layout: Layout, in_features: int) -> None:
        weight, keep = describe(words, scale, second, layout, in_features)
        self.struct = StreamStruct(
            bits=layout.bits, scale_type=weight.scale_type, units_per_group=units_per_group(layout, in_features)
        )
        _fill(self.struct, layout.form())
        library = load()
        if library is None:
            raise WeightError("the CPU kernels are not available on this machine. Use use_backend('reference').")
        size = library.bd_stream_layout(byref(self.struct), words.shape[0], in_features)
        buffer = torch.zeros(size + ALIGNMENT, dtype=torch.uint8)
        self.data = buffer[-buffer.data_ptr() % ALIGNMENT :][:size]
        self.address = self.data.data_ptr()
        library.bd_write_stream(byref(weight), byref(self.struct), self.address, torch.get_num_threads())
        self.pointer = ctypes.addressof(self.struct)
        del keep


class StreamCache:
    """Streams by weight; an entry lives as long as its weight's tensor, and only while nothing has changed."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Tensor], tuple[object, ...], Stream]] = {}
        self._lock = threading.Lock()
        self.num_made = 0

    def get(self, words: Tensor, scale: Tensor, second: Tensor | None, layout: Layout, in_features: int) -> Stream:
        """The stream of a weight, made on first use and after every change."""
        state = (_state(words), _state(scale), None if second is None else _state(second), layout, in_features)
        entry = self._entries.get(id(words))
        if entry is not None and entry[0]() is words and entry[1] == state:
            return entry[2]
        with self._lock:
            entry = self._entries.get(id(words))
            if entry is not None and entry[0]() is words and entry[1] == state:
                return entry[2]  # another thread was faster
            stream = Stream(words, scale, second, layout, in_features)
            key = id(words)
            self._entries[key] = (weakref.ref(words, lambda ref: self._forget(key, ref)), state, stream)
            self.num_made += 1
            return stream

    def num_bytes(self) -> int:
        """Bytes that all streams take."""
        return sum(stream.data.nbytes for _, _, stream in list(self._entries.values()))

    def clear(self) -> None:
        """Forget all streams; they are made again when they are needed."""
        self._entries.clear()

    def _forget(self, key: int, ref: weakref.ref[Tensor]) -> None:
        entry = self._entries.get(key)
        if entry is not None and entry[0] is ref:
            del self._entries[key]


STREAMS = StreamCache()


def _state(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _fill(struct: WeightStruct | StreamStruct, form: TableForm) -> None:
    struct.c = form.c
    struct.a[: min(len(form.a), TABLE_SIZE)] = form.a[:TABLE_SIZE]
    struct.b[: min(len(form.b), TABLE_SIZE)] = form.b[:TABLE_SIZE]
