"""Other people's products of one token with a weight in few bits, as far as they are installed.

torch's int4 operator and bitsandbytes' NF4 (on CPUs its fast kernel comes from the package `kernels`) are always there;
pip install xllamacpp onnxruntime onnx
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks._llama_cpp import open_library

GGML_TYPES = {"Q2_K": 10, "TQ2_0": 35}
GGML_F32 = 0
BLOCK = 128  # of onnxruntime's weights
# onnxruntime's `accuracy_level`: products of 8-bit integers, its fastest, and of floats, as ours are
ACCURACY_LEVELS = {"onnxruntime int2": 4, "onnxruntime int2, float inputs": 1}


class Peer(NamedTuple):
    """A product with copies of a weight, each with its own memory.

    Attributes:
        num_bytes: of one copy.
        calls: one per copy.
        keep: what must live as long.
    """

    num_bytes: int
    calls: list[Callable[[], object]]
    keep: Any


def peers(rows: int, cols: int, cold_bytes: int) -> dict[str, Peer]:
    """The products that can be measured here, by name.

    Args:
        rows: outputs.
        cols: inputs.
        cold_bytes: what all copies of a weight together must exceed.
    """
    found = {"torch int4": _torch(rows, cols, cold_bytes), "bitsandbytes nf4": _bitsandbytes(rows, cols, cold_bytes)}
    if find_spec("xllamacpp"):
        found |= {f"llama.cpp {name}": _ggml(kind, rows, cols, cold_bytes) for name, kind in GGML_TYPES.items()}
    if find_spec("onnxruntime") and find_spec("onnx"):
        found |= {name: _onnxruntime(level, rows, cols, cold_bytes) for name, level in ACCURACY_LEVELS.items()}
    return found


def _torch(rows: int, cols: int, cold_bytes: int) -> Peer:
    codes = torch.randint(0, 16, (rows, cols), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    params = torch.rand(cols // BLOCK, rows, 2).bfloat16()
    inputs, size = torch.randn(1, cols).bfloat16(), packed.nbytes + params.nbytes
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    copies = [packed.clone() for _ in range(-(-cold_bytes // size))]
    return Peer(size, [lambda w=copy: multiply(inputs, w, BLOCK, params) for copy in copies], copies)  # type: ignore[misc]


def _bitsandbytes(rows: int, cols: int, cold_bytes: int) -> Peer:
    import bitsandbytes

    packed, state = bitsandbytes.functional.quantize_4bit(torch.randn(rows, cols).bfloat16(), quant_type="nf4")
    inputs, size = torch.randn(1, cols).bfloat16(), packed.nbytes + state.absmax.nbytes
    copies = [packed.clone() for _ in range(-(-cold_bytes // size))]
    calls = [lambda w=copy: bitsandbytes.matmul_4bit(inputs, w.t(), state) for copy in copies]  # type: ignore[misc]
    return Peer(size, calls, copies)


class Init(ctypes.Structure):
    """`ggml_init_params`."""

    _fields_ = (("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class Plan(ctypes.Structure):
    """`ggml_cplan`, and room behind it."""

    _fields_ = (("work_size", ctypes.c_size_t), ("work", ctypes.c_void_p), ("rest", ctypes.c_uint8 * 1008))


_POINTER, _INT = ctypes.c_void_p, ctypes.c_int32
GGML: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_cpu_init": (None, ()),
    "ggml_init": (_POINTER, (Init,)),
    "ggml_new_tensor_2d": (_POINTER, (_POINTER, _INT, ctypes.c_int64, ctypes.c_int64)),
    "ggml_get_data": (_POINTER, (_POINTER,)),
    "ggml_nbytes": (ctypes.c_size_t, (_POINTER,)),
    "ggml_mul_mat": (_POINTER, (_POINTER, _POINTER, _POINTER)),
    "ggml_new_graph": (_POINTER, (_POINTER,)),
    "ggml_build_forward_expand": (None, (_POINTER, _POINTER)),
    "ggml_quantize_chunk": (
        ctypes.c_size_t,
        (_INT, _POINTER, _POINTER, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, _POINTER),
    ),
    "ggml_graph_plan": (Plan, (_POINTER, _INT, _POINTER)),
    "ggml_graph_compute": (_INT, (_POINTER, ctypes.POINTER(Plan))),
}


def _ggml(kind: int, rows: int, cols: int, cold_bytes: int) -> Peer:
    library = open_library(GGML)
    library.ggml_cpu_init()
    least = rows * cols // 4
    context = library.ggml_init(Init(cold_bytes + 3 * least + (64 << 20), None, False))
    inputs = library.ggml_new_tensor_2d(context, GGML_F32, cols, 1)
    ctypes.memmove(library.ggml_get_data(inputs), torch.randn(cols).data_ptr(), 4 * cols)
    weights: list[int] = []
    size = 0
    while size * len(weights) < cold_bytes:
        weight = library.ggml_new_tensor_2d(context, kind, cols, rows)
        size = library.ggml_nbytes(weight)
        if weights:
            ctypes.memmove(library.ggml_get_data(weight), library.ggml_get_data(weights[0]), size)
        else:
            values = torch.randn(rows, cols)
            library.ggml_quantize_chunk(kind, values.data_ptr(), library.ggml_get_data(weight), 0, rows, cols, None)
        weights.append(weight)
    made = [_ggml_product(library, context, weight, inputs) for weight in weights]
    return Peer(size, [call for call, _ in made], [library, made])


def _ggml_product(library: Any, context: int, weight: int, inputs: int) -> tuple[Callable[[], object], Any]:
    graph = library.ggml_new_graph(context)
    library.ggml_build_forward_expand(graph, library.ggml_mul_mat(context, weight, inputs))
    plan = library.ggml_graph_plan(graph, torch.get_num_threads(), None)
    work = ctypes.create_string_buffer(plan.work_size + 64)
    plan.work = ctypes.addressof(work)
    return lambda: library.ggml_graph_compute(graph, ctypes.byref(plan)), (plan, work)


def _onnxruntime(level: int, rows: int, cols: int, cold_bytes: int) -> Peer:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    size = rows * cols // 4 + rows * cols // BLOCK * 4
    generator = np.random.default_rng(0)
    feed = {"inputs": generator.standard_normal((1, cols), np.float32)}
    sessions = [
        onnxruntime.InferenceSession(_matmul(level, rows, cols, generator), options, providers=["CPUExecutionProvider"])
        for _ in range(-(-cold_bytes // size))
    ]
    return Peer(size, [lambda s=session: s.run(None, feed) for session in sessions], sessions)  # type: ignore[misc]


def _matmul(level: int, rows: int, cols: int, generator: np.random.Generator) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    blocks = cols // BLOCK
    codes = generator.integers(0, 256, (rows, blocks, BLOCK // 4), np.uint8)
    scales = generator.uniform(0.01, 0.02, rows * blocks).astype(np.float32)
    node = helper.make_node(
        "MatMulNBits", ["inputs", "codes", "scales"], ["outputs"], domain="com.microsoft", K=cols, N=rows, bits=2,
        block_size=BLOCK, accuracy_level=level,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("inputs", TensorProto.FLOAT, [1, cols])],
        [helper.make_tensor_value_info("outputs", TensorProto.FLOAT, [1, rows])],
        [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scales, "scales")],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString())
