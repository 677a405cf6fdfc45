"""Look at a model before training: activation capture, clip search, block-wise reconstruction."""

from bitdistiller_peft.calibration.api import calibrate
from bitdistiller_peft.calibration.options import BlockwiseOptions, ClipOptions
from bitdistiller_peft.calibration.result import BlockReport, CalibrationResult, LayerReport

__all__ = [
    "BlockReport",
    "BlockwiseOptions",
    "CalibrationResult",
    "ClipOptions",
    "LayerReport",
    "calibrate",
]
