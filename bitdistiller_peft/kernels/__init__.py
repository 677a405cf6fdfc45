"""The operations of quantizers and packing, fast: one declaration each, the reference as one backend."""

from bitdistiller_peft.kernels.backend import Backend, backend_names, get_backend, register_backend, use_backend
from bitdistiller_peft.kernels.ops import dequantize_packed, fake_quantize, packed_linear, quantize
from bitdistiller_peft.kernels.reference import ReferenceBackend, compute_dtype

__all__ = [
    "Backend",
    "ReferenceBackend",
    "backend_names",
    "compute_dtype",
    "dequantize_packed",
    "fake_quantize",
    "get_backend",
    "packed_linear",
    "quantize",
    "register_backend",
    "use_backend",
]
