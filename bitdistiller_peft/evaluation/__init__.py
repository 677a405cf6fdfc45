"""Perplexity with a protocol id, divergence from the teacher, tasks, comparisons, a gallery of answers."""

from bitdistiller_peft.evaluation.collapse import Collapse, detect_collapse
from bitdistiller_peft.evaluation.comparison import Comparison, Paired, compare_results
from bitdistiller_peft.evaluation.divergence import DivergenceResult, evaluate_divergence
from bitdistiller_peft.evaluation.gallery import Gallery, GalleryEntry, Generation, generate_gallery
from bitdistiller_peft.evaluation.perplexity import PerplexityResult, evaluate_perplexity
from bitdistiller_peft.evaluation.sources import SourceDivergences, evaluate_sources
from bitdistiller_peft.evaluation.state import detect_state
from bitdistiller_peft.evaluation.task_results import TaskResults, TaskScore
from bitdistiller_peft.evaluation.tasks import evaluate_tasks

__all__ = [
    "evaluate_perplexity",
    "PerplexityResult",
    "evaluate_divergence",
    "evaluate_sources",
    "SourceDivergences",
    "DivergenceResult",
    "evaluate_tasks",
    "TaskResults",
    "TaskScore",
    "compare_results",
    "Comparison",
    "Paired",
    "generate_gallery",
    "Gallery",
    "GalleryEntry",
    "Generation",
    "detect_collapse",
    "Collapse",
    "detect_state",
]
