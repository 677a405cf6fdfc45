"""Quantization-aware self-distillation of causal language models to 2-4 bits, as a PEFT plug-in.

Importing the package plugs it into PEFT and transformers and imports nothing heavy; the public names load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bitdistiller_peft._plug import plug_in
from bitdistiller_peft._version import library_version

if TYPE_CHECKING:
    from bitdistiller_peft.calibration import CalibrationResult as CalibrationResult
    from bitdistiller_peft.calibration import allocate_bits as allocate_bits
    from bitdistiller_peft.calibration import calibrate as calibrate
    from bitdistiller_peft.calibration import fit_subln as fit_subln
    from bitdistiller_peft.evaluation import compare_results as compare_results
    from bitdistiller_peft.evaluation import detect_collapse as detect_collapse
    from bitdistiller_peft.evaluation import evaluate_divergence as evaluate_divergence
    from bitdistiller_peft.evaluation import evaluate_perplexity as evaluate_perplexity
    from bitdistiller_peft.evaluation import evaluate_sources as evaluate_sources
    from bitdistiller_peft.evaluation import evaluate_tasks as evaluate_tasks
    from bitdistiller_peft.evaluation import generate_gallery as generate_gallery
    from bitdistiller_peft.export import export_model as export_model
    from bitdistiller_peft.export import verify_export as verify_export
    from bitdistiller_peft.grids import register_grid as register_grid
    from bitdistiller_peft.hub import BitDistillerQuantConfig as BitDistillerQuantConfig
    from bitdistiller_peft.hub import pack_latent as pack_latent
    from bitdistiller_peft.hub import print_quant_summary as print_quant_summary
    from bitdistiller_peft.hub import quant_summary as quant_summary
    from bitdistiller_peft.importing import import_model as import_model
    from bitdistiller_peft.kernels import use_backend as use_backend
    from bitdistiller_peft.recipes import get_recipe as get_recipe
    from bitdistiller_peft.recipes import register_recipe as register_recipe
    from bitdistiller_peft.training import DistillConfig as DistillConfig
    from bitdistiller_peft.training import DistillTrainer as DistillTrainer
    from bitdistiller_peft.training import generate_teacher_data as generate_teacher_data
    from bitdistiller_peft.training import load_teacher_data as load_teacher_data
    from bitdistiller_peft.training import mix_data as mix_data
    from bitdistiller_peft.tuner import BitDistillerConfig as BitDistillerConfig
    from bitdistiller_peft.tuner import BitDistillerModel as BitDistillerModel
    from bitdistiller_peft.tuner import get_bitdistiller_model as get_bitdistiller_model

_HOMES = {
    "BitDistillerConfig": "tuner",
    "BitDistillerModel": "tuner",
    "BitDistillerQuantConfig": "hub",
    "CalibrationResult": "calibration",
    "DistillConfig": "training",
    "DistillTrainer": "training",
    "allocate_bits": "calibration",
    "calibrate": "calibration",
    "compare_results": "evaluation",
    "detect_collapse": "evaluation",
    "evaluate_divergence": "evaluation",
    "evaluate_perplexity": "evaluation",
    "evaluate_sources": "evaluation",
    "evaluate_tasks": "evaluation",
    "export_model": "export",
    "fit_subln": "calibration",
    "generate_gallery": "evaluation",
    "generate_teacher_data": "training",
    "get_bitdistiller_model": "tuner",
    "get_recipe": "recipes",
    "import_model": "importing",
    "load_teacher_data": "training",
    "mix_data": "training",
    "pack_latent": "hub",
    "print_quant_summary": "hub",
    "quant_summary": "hub",
    "register_grid": "grids",
    "register_recipe": "recipes",
    "use_backend": "kernels",
    "verify_export": "export",
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
