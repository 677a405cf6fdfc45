"""ONNX with a key/value cache, for onnxruntime: codes, scales and zero points in ``com.microsoft.MatMulNBits``.

The graph comes from torch's exporter (`onnx_graph`) and computes in float32. Every tensor is stored as it was trained,
in ``model.onnx.data``; where its dtype is not float32, a Cast stands behind it, which onnxruntime folds while loading.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitdistiller_peft.errors import ExportError
from bitdistiller_peft.export.affine import fixed_zero_point, refuse_not_affine, zero_points
from bitdistiller_peft.export.files import write_config
from bitdistiller_peft.export.formats import ExportFormat, ForeignTensor, ForeignWeight, Options
from bitdistiller_peft.export.onnx_graph import BITS, float_graph, refuse_bits, refuse_model, stored_bits
from bitdistiller_peft.export.onnx_reader import read
from bitdistiller_peft.export.source import PackedSource, PackedWeight
from bitdistiller_peft.grids import FineGrid, ResidualGrid
from bitdistiller_peft.packing import pack_codes
from bitdistiller_peft.quantizers import zero_of

FILE_NAME, DATA_NAME = "model.onnx", "model.onnx.data"
DOMAIN = "com.microsoft"
BLOCK_SIZES = (256, 128, 64, 32, 16)  # what onnxruntime takes at every width
TIED_ZERO_POINT = 1.5  # of the tied residual grid, whose levels are -1.5, -0.5, 0.5 and 1.5 scales


def _refuse(weight: PackedWeight, options: Options) -> str | None:
    if (reason := refuse_bits(weight, options, "of MatMulNBits")) is not None:
        return reason
    if _block_size(weight) is None:
        return f"groups of {weight.group_width} weights are not made of blocks of {BLOCK_SIZES[-1]}"
    if not _has_float_zeros(weight):
        return refuse_not_affine(weight)
    return "onnxruntime has no zeros between the codes at 8 bits" if stored_bits(weight, options) == 8 else None


def _block_size(weight: PackedWeight) -> int | None:
    """The largest block that groups are made of; a row that is one short group is one padded block."""
    width = weight.group_width
    fits = [size for size in BLOCK_SIZES if width % size == 0]
    if not fits and width == weight.in_features:
        fits = [size for size in reversed(BLOCK_SIZES) if size >= width]
    return fits[0] if fits else None


def _has_float_zeros(weight: PackedWeight) -> bool:
    """Whether levels are evenly spaced about a zero between them, which onnxruntime takes as a float."""
    grid = weight.spec.grid
    return isinstance(grid, FineGrid) or (isinstance(grid, ResidualGrid) and grid.is_tied)


def _float_zeros(weight: PackedWeight) -> Tensor:
    """These zeros ``[out, groups]`` in the dtype of the scales, which holds eighths up to 4 bits' largest code."""
    scale, zero_point = weight.row_scale, weight.params.zero_point
    if zero_point is None:
        return torch.full(scale.shape, TIED_ZERO_POINT, dtype=scale.dtype)
    return zero_of(zero_point, weight.spec.grid).expand(scale.shape).to(scale.dtype)


def _write(source: PackedSource, folder: Path, options: Options) -> None:
    import onnx_ir
    from onnx_ir import external_data

    model: Any = onnx_ir.from_proto(float_graph(source))
    writer = _Writer(model.graph)
    for weight in source.weights():
        writer.quantize(weight, stored_bits(weight, options))
    for name, tensor in source.plain():
        writer.fill(name, tensor)
    model.opset_imports[DOMAIN] = 1
    stored = [value.const_value for value in writer.values]
    moved = external_data.convert_tensors_to_external(stored, folder, DATA_NAME)
    for value, tensor in zip(writer.values, moved, strict=True):
        value.const_value = tensor
    onnx_ir.save(model, folder / FILE_NAME)
    write_config(source, folder, {"dtype": "float32"})


class _Writer:
    """Puts the tensors of a checkpoint into a graph that has them as inputs."""

    def __init__(self, graph: Any) -> None:
        self._graph = graph
        self._inputs = {value.name: value for value in graph.inputs}
        self.values: list[Any] = []

    def fill(self, name: str, tensor: Tensor) -> None:
        """Make an input an initializer."""
        value = self._inputs[name]
        self._graph.inputs.remove(value)
        value.name = f"{name}.float32"  # the stored tensor takes the name
        value.replace_all_uses_with(self._store(name, tensor))

    def quantize(self, weight: PackedWeight, bits: int) -> None:
        """Put MatMulNBits in place of the float product with an input."""
        value = self._inputs[weight.name]
        product, bias = self._product(value)
        parts = [self._store(weight.name + suffix, tensor) for suffix, tensor in _tensors(weight, bits)]
        inputs = [product.inputs[0], *parts, *[None] * (5 - 1 - len(parts)), bias]
        self._replace(product, inputs, weight, bits)
        for node, _ in list(value.uses()):
            node.graph.remove(node, safe=True)
        self._graph.inputs.remove(value)

    def _product(self, value: Any) -> tuple[Any, Any]:
        """The node that multiplies by a weight, and its bias.

        Raises:
            ExportError: the weight is not used for just one product.
        """
        uses = list(value.uses())
        if len(uses) == 1 and uses[0][0].op_type == "Transpose":
            uses = list(uses[0][0].outputs[0].uses())
        if len(uses) != 1 or uses[0][1] != 1 or uses[0][0].op_type not in ("MatMul", "Gemm"):
            kinds = sorted({node.op_type for node, _ in uses})
            raise ExportError(f"tensor {value.name!r} must be multiplied by just once: the graph has {kinds} for it.")
        node = uses[0][0]
        return node, node.inputs[2] if len(node.inputs) > 2 else None

    def _replace(self, product: Any, inputs: list[Any], weight: PackedWeight, bits: int) -> None:
        import onnx_ir

        while inputs[-1] is None:
            inputs.pop()
        sizes = {"K": weight.in_features, "N": weight.out_features, "block_size": _block_size(weight), "bits": bits}
        old = product.outputs[0]
        node = onnx_ir.node("MatMulNBits", inputs, {**sizes, "accuracy_level": 0}, domain=DOMAIN, name=weight.layer)
        new = node.outputs[0]
        new.type, new.shape = old.type, old.shape
        self._graph.insert_after(product, node)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        new.name, old.name = old.name, None
        self._graph.remove(product, safe=True)

    def _store(self, name: str, tensor: Tensor) -> Any:
        """Add an initializer; return the value to compute with, float32 unless the tensor holds codes."""
        import onnx_ir
        from onnx_ir.tensor_adapters import TorchTensor

        value = onnx_ir.val(name, const_value=TorchTensor(tensor.contiguous(), name=name))
        self._graph.register_initializer(value)
        self.values.append(value)
        if tensor.dtype in (torch.uint8, torch.float32):
            return value
        cast = onnx_ir.node("Cast", [value], {"to": onnx_ir.DataType.FLOAT}, name=f"{name}.cast")
        cast.outputs[0].name = f"{name}.float32"
        self._graph.insert_before(self._graph[0], cast)
        return cast.outputs[0]


def _tensors(weight: PackedWeight, bits: int) -> Iterator[tuple[str, Tensor]]:
    """Codes ``[out, blocks, bytes]``, scales ``[out, blocks]`` and, unless they are the default, zero points."""
    size = _block_size(weight)
    if size is None:
        raise ExportError(f"layer {weight.layer!r} must have groups made of blocks of {BLOCK_SIZES[-1]}.")
    repeat = max(1, weight.group_width // size)
    blocks = weight.row_scale.shape[1] * repeat
    codes = torch.nn.functional.pad(weight.codes, (0, blocks * size - weight.in_features))
    yield "", pack_codes(codes, bits).view(torch.uint8).reshape(len(codes), blocks, -1)
    yield "_scale", weight.row_scale.repeat_interleave(repeat, 1)
    if _has_float_zeros(weight):
        yield "_zero_point", _float_zeros(weight).repeat_interleave(repeat, 1)
    elif fixed_zero_point(weight.spec.grid) != 1 << (bits - 1):
        packed = pack_codes(zero_points(weight).repeat_interleave(repeat, 1), bits).view(torch.uint8)
        yield "_zero_point", packed[:, : -(-blocks * bits // 8)]


def _read(source: PackedSource, folder: Path) -> Iterator[ForeignWeight | ForeignTensor]:
    yield from read(source, folder, FILE_NAME)


FORMAT = ExportFormat(
    name="onnx",
    engines="onnxruntime",
    refuse_weight=_refuse,
    refuse_model=refuse_model,
    write=_write,
    read=_read,
    options={"widen_to": (None, *BITS[1:])},
    variants=({}, {"widen_to": 4}, {"widen_to": 8}),
    packages=("onnx", "onnxscript"),
    reader="onnx",
    weight_files=f"{FILE_NAME}*",
)
