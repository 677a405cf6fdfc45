"""The operations of quantizers and packing, fast: one declaration each, the reference as one backend."""

from bitdistiller_peft.kernels.backend import (
    Backend,
    backend_info,
    backend_names,
    get_backend,
    register_backend,
    select_backend,
    set_backend,
    use_backend,
)
from bitdistiller_peft.kernels.cpu import CpuBackend, release_streams
from bitdistiller_peft.kernels.int8 import is_exact_product, ternary_int8_linear, ternary_int8_reference
from bitdistiller_peft.kernels.ops import (
    dequantize_packed,
    fake_quantize,
    packed_embedding,
    packed_linear,
    packed_ternary_int8_linear,
    quantize,
)
from bitdistiller_peft.kernels.precision import LOAD_IN_FP32, multiplies_bf16, warn_of_slow_bf16
from bitdistiller_peft.kernels.reference import ReferenceBackend, compute_dtype
from bitdistiller_peft.kernels.triton import TritonBackend

__all__ = [
    "LOAD_IN_FP32",
    "Backend",
    "CpuBackend",
    "ReferenceBackend",
    "TritonBackend",
    "backend_info",
    "backend_names",
    "compute_dtype",
    "dequantize_packed",
    "fake_quantize",
    "get_backend",
    "is_exact_product",
    "multiplies_bf16",
    "packed_embedding",
    "packed_linear",
    "packed_ternary_int8_linear",
    "quantize",
    "register_backend",
    "release_streams",
    "select_backend",
    "set_backend",
    "ternary_int8_linear",
    "ternary_int8_reference",
    "use_backend",
    "warn_of_slow_bf16",
]
