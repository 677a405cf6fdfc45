"""SIGTERM and Ctrl-C end a run well: the step is finished, a checkpoint saved, and only then the process stopped."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
INTERRUPTED = 130  # a process's status after either: stopped, and all saved


class GracefulStop(TrainerCallback):
    """Listens while a run trains. The second signal is not waited for: it does what it always does.

    Only the main thread can listen, and signals that are ignored stay so.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals over; on leaving, they are given back."""
        self.received = None
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.getsignal(number) for number in SIGNALS}
            self._previous = {n: handler for n, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
            for number in self._previous:
                signal.signal(number, self._receive)
        try:
            yield
        finally:
            self._give_back()

    def leave(self) -> None:
        """End the process if a signal asked for it: call it when everything is saved.

        Raises:
            SystemExit: after SIGTERM, with status 130.
            KeyboardInterrupt: after Ctrl-C; uncaught, the status is 130 too.
        """
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is not None:
            raise SystemExit(INTERRUPTED)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop if a signal came, to this rank or to another."""
        self.received = self._agreed(args.device)
        if self.received is not None:
            name = signal.Signals(self.received).name
            logger.warning("%s: saving step %d. Go on with resume_from_checkpoint='auto'.", name, state.global_step)
            control.should_save = control.should_training_stop = True

    def _agreed(self, device: torch.device) -> int | None:
        if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
            return self.received
        number = torch.tensor(self.received or 0, device=device)
        distributed.all_reduce(number, distributed.ReduceOp.MAX)  # all ranks stop after the same step
        return int(number) or None

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            self._give_back()
            os.kill(os.getpid(), number)
            return
        self.received = number
        logger.warning("%s: this step is finished first; again to stop at once.", signal.Signals(number).name)

    def _give_back(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
