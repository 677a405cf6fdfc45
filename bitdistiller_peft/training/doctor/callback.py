"""The doctor at the bedside: measures when the trainer logs, speaks once of each finding, and writes a report."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from bitdistiller_peft._version import library_version
from bitdistiller_peft.errors import TrainingError, WeightError
from bitdistiller_peft.hub.atomic import write_text
from bitdistiller_peft.training.config import DistillConfig
from bitdistiller_peft.training.doctor.advice import Finding, diagnose, not_finite
from bitdistiller_peft.training.doctor.probes import Probes

logger = logging.getLogger(__name__)

REPORT_NAME = "doctor.json"


class Doctor(TrainerCallback):
    """Watches a run of `DistillTrainer`; does nothing with ``DistillConfig(doctor=False)``.

    ``doctor.json`` lies beside every ``trainer_state.json``, and in the output folder when the run ends, whatever ends
    it: findings as `Finding` has them, with the steps at which each was there first and last, and what the last look
    found in each layer.

    Args:
        args: of the trainer.
    """

    def __init__(self, args: DistillConfig) -> None:
        self._args = args
        self._probes: Probes | None = None
        self._model: nn.Module | None = None
        self._is_main = True
        self._step = 0
        self.findings: dict[str, Finding] = {}
        self._steps: dict[str, list[int]] = {}  # at which a finding was there first and last

    def start(self, model: nn.Module) -> None:
        """Keep what later looks compare with; called before the first step of a run.

        Args:
            model: the student, where it is trained.
        """
        if self._args.doctor:
            self._model, self.findings, self._steps = model, {}, {}
            self._probes = Probes(model, expects_scales=self._args.scale_learning_rate != 0.0)

    def measure(self) -> dict[str, float]:
        """Look at the weights; what there is to log."""
        return {} if self._probes is None else self._probes.look()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note which process writes."""
        self._is_main = state.is_world_process_zero

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Speak of what is found for the first time."""
        self._step = state.global_step
        if self._probes is None or "loss" not in (kwargs.get("logs") or {}):
            return
        for finding in diagnose(state.log_history, self._model):
            self._add(finding)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the report into the checkpoint that was just saved."""
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if self._probes is not None and state.is_world_process_zero and folder.is_dir():
            self._write(folder)

    @contextmanager
    def attending(self) -> Iterator[None]:
        """Sum up at the end of the run inside, also where it fails."""
        self._probes = None
        try:
            yield
        except (TrainingError, WeightError) as error:  # which says all this itself
            if self._probes is not None:
                self._add(not_finite(f"The run stopped: {error}"), is_said=True)
            raise
        finally:
            if self._probes is not None and self._is_main:
                self._sum_up()

    def _add(self, finding: Finding, *, is_said: bool = False) -> None:
        if finding.name not in self.findings and self._is_main and not is_said:
            logger.warning("Training doctor, step %d: %s", self._step, finding)
        first = self._steps.get(finding.name, [self._step])[0]
        self.findings[finding.name], self._steps[finding.name] = finding, [first, self._step]

    def _sum_up(self) -> None:
        folder = Path(self._args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._write(folder)
        if self.findings:
            names = ", ".join(name.replace("_", " ") for name in self.findings)
            logger.warning("Training doctor: %s. What was seen and what helps: %s", names, folder / REPORT_NAME)
        else:
            logger.info("Training doctor: nothing found.")

    def _write(self, folder: Path) -> None:
        layers = {} if self._probes is None else self._probes.by_layer
        content = {
            "format_version": 1,
            "written_by": f"bitdistiller_peft {library_version()}",
            "step": self._step,
            "findings": [
                finding.to_dict() | dict(zip(("first_step", "last_step"), self._steps[name], strict=True))
                for name, finding in self.findings.items()
            ],
            "layers": layers,
        }
        write_text(folder / REPORT_NAME, json.dumps(content, indent=1) + "\n")
