"""Packed multiplication on CPUs: one C++ library, compiled on first use, its operators, and the backend."""

from bitdistiller_peft.kernels.cpu.backend import CpuBackend, release_streams
from bitdistiller_peft.kernels.cpu.library import best_isa
from bitdistiller_peft.kernels.cpu.tables import TableForm, register_table_form

__all__ = ["CpuBackend", "TableForm", "best_isa", "register_table_form", "release_streams"]
