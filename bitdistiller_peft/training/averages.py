"""An exponential moving average of what is trained: steadier than the last step, above all where codes still swing.

The average is what is evaluated, and what the model holds once training ends, so it is what is packed. The optimizer
goes on from the weights themselves, which is what checkpoints hold; the average lies beside them, in a file of its own.

Its decay rises with the steps, ``min(decay, (1 + step) / (10 + step))``, so that short runs do not average their start
(the rule of TensorFlow's `ExponentialMovingAverage` with `num_updates`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from bitdistiller_peft.errors import CheckpointError

AVERAGES_NAME = "bitdistiller-averages.safetensors"


def averages_faults(config: Any) -> list[str]:
    """What is wrong with the `ema_decay` of a `DistillConfig`."""
    decay = config.ema_decay
    if decay is None or 0 < decay < 1:
        return []
    return [f"`ema_decay` must lie in (0, 1), or be None for none: got ema_decay={decay!r}. Use 0.99."]


class WeightAverages(TrainerCallback):
    """Keeps the average of every trained parameter, in fp32; does nothing without a decay.

    Args:
        decay: how much of the average each step keeps.
    """

    def __init__(self, decay: float | None) -> None:
        self.decay = decay
        self.resume_from: str | None = None
        self._trained: dict[str, nn.Parameter] = {}
        self._averages: dict[str, Tensor] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start from the weights, or from the checkpoint that the run goes on from."""
        if self.decay is None:
            return
        self._trained = {name: p for name, p in kwargs["model"].named_parameters() if p.requires_grad}
        if self.resume_from is not None:
            self._averages = self._read(Path(self.resume_from))
        else:
            self._averages = {name: p.detach().float().clone() for name, p in self._trained.items()}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take in the weights after a step."""
        if self.decay is None:
            return
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        current = [parameter.detach().float() for parameter in self._trained.values()]
        update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        update(list(self._averages.values()), current, state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the average into the checkpoint that was just saved."""
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if self._averages and state.is_world_process_zero and folder.is_dir():
            save_file({name: average.cpu() for name, average in self._averages.items()}, folder / AVERAGES_NAME)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the average in the model: that of the best checkpoint, where that one was loaded."""
        if not self._averages:
            return
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._averages = self._read(Path(state.best_model_checkpoint))
        self._write(self._averages)
        self._trained, self._averages = {}, {}

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Evaluate with the average; on leaving, the weights are as they were."""
        own = {name: parameter.detach().clone() for name, parameter in self._trained.items()}
        self._write(self._averages)
        try:
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self._trained[name].copy_(value)

    def _read(self, folder: Path) -> dict[str, Tensor]:
        advice = "It was saved without ema_decay: set ema_decay=None to go on from it, or start anew."
        try:
            found = load_file(folder / AVERAGES_NAME)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder} must hold {AVERAGES_NAME}: {error}. {advice}") from None
        kinds = {name: (tuple(p.shape), torch.float32) for name, p in self._trained.items()}
        if {name: (tuple(average.shape), average.dtype) for name, average in found.items()} != kinds:
            raise CheckpointError(f"{folder / AVERAGES_NAME} must be of this model: got other tensors. {advice}")
        return {name: found[name].to(parameter.device) for name, parameter in self._trained.items()}
