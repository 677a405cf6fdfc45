"""The training doctor: what a run does to its codes and scales, and plain advice where a known failure shows."""

from bitdistiller_peft.training.doctor.advice import Finding, diagnose
from bitdistiller_peft.training.doctor.callback import Doctor
from bitdistiller_peft.training.doctor.layerwise import divergence_by_layer
from bitdistiller_peft.training.doctor.probes import Probes

__all__ = ["Doctor", "Finding", "Probes", "diagnose", "divergence_by_layer"]
