"""Packed multiplication on GPUs: Triton kernels over the portable layout, and the backend."""

from bitdistiller_peft.kernels.triton.backend import TritonBackend

__all__ = ["TritonBackend"]
