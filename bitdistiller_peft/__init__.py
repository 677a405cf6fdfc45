"""Quantization-aware self-distillation of causal language models to 2-4 bits, as a PEFT plug-in.

Importing the package plugs it into PEFT and transformers and imports nothing heavy; the public names load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bitdistiller_peft._plug import plug_in
from bitdistiller_peft._version import library_version

if TYPE_CHECKING:
    from bitdistiller_peft.grids import register_grid as register_grid
    from bitdistiller_peft.hub import BitDistillerQuantConfig as BitDistillerQuantConfig
    from bitdistiller_peft.hub import print_quant_summary as print_quant_summary
    from bitdistiller_peft.hub import quant_summary as quant_summary
    from bitdistiller_peft.kernels import use_backend as use_backend
    from bitdistiller_peft.tuner import BitDistillerConfig as BitDistillerConfig
    from bitdistiller_peft.tuner import BitDistillerModel as BitDistillerModel
    from bitdistiller_peft.tuner import get_bitdistiller_model as get_bitdistiller_model

_HOMES = {
    "BitDistillerConfig": "tuner",
    "BitDistillerModel": "tuner",
    "BitDistillerQuantConfig": "hub",
    "get_bitdistiller_model": "tuner",
    "print_quant_summary": "hub",
    "quant_summary": "hub",
    "register_grid": "grids",
    "use_backend": "kernels",
}

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return library_version()
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]


plug_in()
