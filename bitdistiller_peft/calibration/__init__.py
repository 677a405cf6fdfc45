"""Look at a model before training: activation capture, clip search, GPTQ, AWQ, block-wise reconstruction."""

from bitdistiller_peft.calibration.allocation import BitAllocation, allocate_bits
from bitdistiller_peft.calibration.api import calibrate
from bitdistiller_peft.calibration.from_disk import pack_from_disk
from bitdistiller_peft.calibration.options import AwqOptions, BlockwiseOptions, ClipOptions, GptqOptions
from bitdistiller_peft.calibration.result import BlockReport, CalibrationResult, LayerReport
from bitdistiller_peft.calibration.sub_norms import fit_subln

__all__ = [
    "AwqOptions",
    "BitAllocation",
    "BlockReport",
    "BlockwiseOptions",
    "CalibrationResult",
    "ClipOptions",
    "GptqOptions",
    "LayerReport",
    "allocate_bits",
    "calibrate",
    "fit_subln",
    "pack_from_disk",
]
