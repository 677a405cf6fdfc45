"""One page about a run: scores, curves, weights, sizes, answers, provenance, as HTML that needs nothing else."""

from bitdistiller_peft.report.api import ReportFiles, write_report
from bitdistiller_peft.report.weights import WeightReport, measure_weights

__all__ = ["ReportFiles", "WeightReport", "measure_weights", "write_report"]
