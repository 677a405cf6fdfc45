"""Perplexity with a protocol id, divergence from the teacher; every score says in which state the model was."""

from bitdistiller_peft.evaluation.divergence import DivergenceResult, evaluate_divergence
from bitdistiller_peft.evaluation.perplexity import PerplexityResult, evaluate_perplexity
from bitdistiller_peft.evaluation.state import detect_state

__all__ = [
    "evaluate_perplexity",
    "PerplexityResult",
    "evaluate_divergence",
    "DivergenceResult",
    "detect_state",
]
