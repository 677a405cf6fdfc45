"""Packed multiplication on CPUs: one C++ library, compiled on first use, its operators, and the backend."""

from bitdistiller_peft.kernels.cpu.backend import CpuBackend, release_streams
from bitdistiller_peft.kernels.cpu.library import best_isa

__all__ = ["CpuBackend", "best_isa", "release_streams"]
