"""Reads an exported ONNX model with the `onnx` package, along the graph as an engine does, and checks its products.

Nothing here is shared with the writer, which uses `onnx_ir`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitdistiller_peft.errors import ExportError
from bitdistiller_peft.export.formats import ForeignTensor, ForeignWeight
from bitdistiller_peft.export.source import PackedSource


def read(source: PackedSource, folder: Path, file_name: str) -> Iterator[ForeignWeight | ForeignTensor]:
    """Read every product with low-bit weights, and every other tensor that the packed model has.

    Args:
        source: the packed model; only its names are used.
        folder: the exported model.
        file_name: the graph's file in it.

    Raises:
        ExportError: a product is not one that the packed model has, or does not fit its tensors.
    """
    import onnx

    model = onnx.load(folder / file_name, load_external_data=False)
    stored = _Stored(model.graph, folder)
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            yield _weight(node, stored)
    for name in source.plain_names:
        if name in stored.tensors:
            yield ForeignTensor(name, torch.from_numpy(stored.array(name).astype(np.float32)))


class _Stored:
    """The stored tensors of a graph, read one by one."""

    def __init__(self, graph: Any, folder: Path) -> None:
        self.tensors = {tensor.name: tensor for tensor in graph.initializer}
        self._casts = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Cast"}
        self._folder = folder

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """Read a tensor, or the one that is cast to it."""
        from onnx import numpy_helper

        return numpy_helper.to_array(self.tensors[self._casts.get(name, name)], str(self._folder))


def _weight(node: Any, stored: _Stored) -> ForeignWeight:
    from onnx import helper

    sizes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    rows, columns, bits, block = (int(sizes[key]) for key in ("N", "K", "bits", "block_size"))
    blocks = -(-columns // block)
    packed = stored.array(node.input[1])
    scale = stored.array(node.input[2]).astype(np.float32)
    if packed.shape != (rows, blocks, block * bits // 8) or scale.shape != (rows, blocks) or any(node.input[4:5]):
        raise ExportError(f"node {node.name!r} must have codes and scales of its sizes, in order: it does not.")
    codes = _unpack(packed.reshape(rows, -1), bits, columns)
    zero_point = np.full((rows, blocks), 1 << (bits - 1), dtype=np.uint8)
    if len(node.input) > 3 and node.input[3]:
        zero_point = stored.array(node.input[3])
        if zero_point.dtype == np.uint8:
            zero_point = _unpack(zero_point, bits, blocks)
    steps = codes.astype(np.float32) - _spread(zero_point.astype(np.float32), block, columns)
    dense = torch.from_numpy(steps * _spread(scale, block, columns))
    if zero_point.dtype != np.uint8:  # levels between the integers have no integer zero point to be compared with
        return ForeignWeight(node.input[1], dense)
    parts = (torch.from_numpy(part.astype(dtype)) for part, dtype in ((codes, "i2"), (scale, "f4"), (zero_point, "i2")))
    return ForeignWeight(node.input[1], dense, *parts)


def _unpack(packed: np.ndarray[Any, Any], bits: int, width: int) -> np.ndarray[Any, Any]:
    """Unpack bytes ``[rows, bytes]`` to codes ``[rows, width]``; the first code of a byte lies in its lowest bits.

    Raises:
        ExportError: what is left over at the end of a row is not zero, as it was written.
    """
    codes = np.empty((len(packed), packed.shape[1], 8 // bits), dtype=np.uint8)
    for index in range(8 // bits):
        codes[:, :, index] = (packed >> (bits * index)) & ((1 << bits) - 1)
    codes = codes.reshape(len(packed), -1)
    if codes[:, width:].any():
        raise ExportError(f"rows of {width} codes must end in zeros: they do not. The file is damaged; export again.")
    return codes[:, :width]


def _spread(values: np.ndarray[Any, Any], block: int, columns: int) -> np.ndarray[Any, Any]:
    """Repeat values ``[rows, blocks]`` for every column."""
    return np.repeat(values, block, axis=1)[:, :columns]
