"""OpenVINO IR with a key/value cache: codes and zero points as u2, u4 or u8 constants, scales as they were trained.

The graph is the float graph of `onnx_graph`, whose weights are inputs. In place of a quantized one stands OpenVINO's
own pattern for compressed weights, Constant -> Convert -> Subtract(zero point) -> Multiply(scale) -> Reshape, which its
CPU plug-in runs without unpacking the matrix. All of it is in float32, so the values are exact; scales and unquantized
tensors are stored in their own dtype behind a Convert.
"""

from __future__ import annotations

import math
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
from bitdistiller_peft.export.source import PackedSource, PackedWeight
from bitdistiller_peft.packing import pack_codes

FILE_NAME = "openvino_model.xml"


def _refuse(weight: PackedWeight, options: Options) -> str | None:
    return refuse_bits(weight, options, "that OpenVINO stores and runs") or refuse_not_affine(weight)


def _write(source: PackedSource, folder: Path, options: Options) -> None:
    import openvino
    from openvino import opset13 as ops

    graph = float_graph(source).SerializeToString()  # kept: the model's own constants stay in it
    model = openvino.Core().read_model(model=graph)
    inputs = {node.get_friendly_name(): node for node in model.get_parameters()}
    for weight in source.weights():
        value = _compressed(weight, stored_bits(weight, options))
        _put(model, inputs[weight.name], ops.transpose(value, [1, 0]) if weight.is_transposed else value)
    for name, tensor in source.plain():
        _put(model, inputs[name], _as_float(_constant(name, tensor, tuple(tensor.shape))))
    model.validate_nodes_and_infer_types()
    _name_by_place(model)
    openvino.serialize(model, folder / FILE_NAME)
    write_config(source, folder, {"dtype": "float32"})


def _put(model: Any, parameter: Any, value: Any) -> None:
    """Put a value in place of an input; a transposition in front of a product becomes a flag of the product."""
    from openvino import opset13 as ops

    for place in parameter.output(0).get_target_inputs():
        user = place.get_node()
        products = [use.get_node() for use in user.output(0).get_target_inputs()]
        if user.get_type_name() == "Transpose" and all(node.get_type_name() == "MatMul" for node in products):
            for product in products:
                new = ops.matmul(product.input_value(0), value, False, True, name=product.get_friendly_name())
                product.output(0).replace(new.output(0))
        else:
            place.replace_source_output(value.output(0))
    model.remove_parameter(parameter)


def _name_by_place(model: Any) -> None:
    """Name what has no name of its own; OpenVINO would take a number that counts all nodes of the process."""
    for place, node in enumerate(model.get_ordered_ops()):
        if node.get_friendly_name() == node.get_name():
            node.set_friendly_name(f"{node.get_type_name()}.{place}")


def _compressed(weight: PackedWeight, bits: int) -> Any:
    """The node whose value is the weight, float32 ``[out, in]``."""
    from openvino import opset13 as ops

    rows, groups = weight.row_scale.shape
    name, is_grouped = weight.name, groups > 1
    shape = (rows, groups, weight.group_width) if is_grouped else (rows, weight.in_features)
    each = (rows, groups, 1) if is_grouped else (rows, 1)
    fixed = fixed_zero_point(weight.spec.grid)
    zero_point = zero_points(weight) if fixed is None else torch.tensor([fixed])
    codes = _as_float(_integers(name, weight.codes, shape, bits))
    zeros = _as_float(_integers(f"{name}_zero_point", zero_point, each if fixed is None else (1,) * len(each), bits))
    scale = _as_float(_constant(f"{name}_scale", weight.row_scale, each))
    dense = ops.multiply(ops.subtract(codes, zeros), scale)
    return ops.reshape(dense, [rows, weight.in_features], special_zero=False) if is_grouped else dense


def _integers(name: str, values: Tensor, shape: tuple[int, ...], bits: int) -> Any:
    """A constant of unsigned integers, packed densely with the first in the lowest bits."""
    import openvino

    words = pack_codes(values.reshape(1, -1), bits).contiguous().view(torch.uint8)
    packed = words.flatten()[: -(-values.numel() * bits // 8)].numpy()
    tensor = openvino.Tensor(packed, openvino.Shape(shape), getattr(openvino.Type, f"u{bits}"))
    return _named(openvino.op.Constant(tensor, shared_memory=False), name)


def _constant(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Any:
    """A constant of floats in their own dtype."""
    import openvino

    kinds = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}
    if tensor.dtype not in kinds:
        raise ExportError(f"tensor {name!r} must hold floats of 16 or 32 bits: got {tensor.dtype}.")
    content = tensor.contiguous().view(torch.uint8).flatten().numpy()
    found = openvino.Tensor(content, openvino.Shape(shape), getattr(openvino.Type, kinds[tensor.dtype]))
    return _named(openvino.op.Constant(found, shared_memory=False), name)


def _named(node: Any, name: str) -> Any:
    node.set_friendly_name(name)
    return node


def _as_float(node: Any) -> Any:
    from openvino import opset13 as ops

    return node if node.get_element_type().get_type_name() == "f32" else ops.convert(node, "f32")


def _read(source: PackedSource, folder: Path) -> Iterator[ForeignWeight | ForeignTensor]:
    """Let OpenVINO compute what stands in front of the products, from the constants up."""
    import openvino

    model = openvino.Core().read_model(folder / FILE_NAME)
    quantized, plain = set(source.quantized_names), set(source.plain_names)
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Constant":
            continue
        name = node.get_friendly_name()
        if name in quantized:
            yield _weight(name, node)
        elif name in plain:
            yield ForeignTensor(name, _value(_after(node, "Convert")))


def _weight(name: str, constant: Any) -> ForeignWeight:
    codes = _after(constant, "Convert", needed=True)
    steps = _after(codes, "Subtract", needed=True)
    product = _after(steps, "Multiply", needed=True)
    zero_point, scale = steps.input_value(1).get_node(), product.input_value(1).get_node()
    for integers in (constant, zero_point.input_value(0).get_node()):
        _check_padding(integers)
    dense = _value(_after(product, "Reshape"))
    parts = (_value(codes), _value(scale), _value(zero_point))
    rows = len(dense)
    zeros = parts[2].expand(parts[1].shape).reshape(rows, -1).to(torch.int16)
    return ForeignWeight(name, dense, parts[0].reshape(rows, -1).to(torch.int16), parts[1].reshape(rows, -1), zeros)


def _check_padding(constant: Any) -> None:
    """Refuse bits behind the last integer that are not 0, which no engine would ever read."""
    used = math.prod(constant.get_output_shape(0)) * constant.get_element_type().bitwidth % 8
    if used and int(constant.data.reshape(-1).view("uint8")[-1]) >> used:
        raise ExportError(f"the padding of {constant.get_friendly_name()!r} must be 0: it is not. Export again.")


def _after(node: Any, kind: str, *, needed: bool = False) -> Any:
    """The node of a kind that follows, or the node itself.

    Raises:
        ExportError: it is needed, and another follows.
    """
    users = [place.get_node() for place in node.output(0).get_target_inputs()]
    found = [user for user in users if user.get_type_name() == kind]
    if len(users) != 1 or not found:
        if needed:
            kinds = [user.get_type_name() for user in users]
            raise ExportError(f"node {node.get_friendly_name()!r} must be followed by a {kind}: it is by {kinds}.")
        return node
    return found[0]


def _value(node: Any) -> Tensor:
    """What OpenVINO computes for a node that depends on constants only, float32."""
    import openvino

    output = node.output(0)
    result = openvino.Tensor(openvino.Type.f32, output.get_shape())
    if not openvino.Model([output], []).evaluate([result], []):
        raise ExportError(f"node {node.get_friendly_name()!r} must be made of constants: OpenVINO cannot compute it.")
    return torch.from_numpy(result.data.copy())


FORMAT = ExportFormat(
    name="openvino",
    engines="OpenVINO",
    refuse_weight=_refuse,
    refuse_model=refuse_model,
    write=_write,
    read=_read,
    options={"widen_to": (None, *BITS[1:])},
    variants=({}, {"widen_to": 4}, {"widen_to": 8}),
    packages=("openvino", "onnx", "onnxscript"),
    reader="openvino",
    weight_files="openvino_model.*",
)
