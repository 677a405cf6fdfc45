"""What a run reports: sums over tokens, added up over micro-batches and ranks, divided once; and how codes move."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from bitdistiller_peft.layers import FakeQuantWeight, companion, is_sharded, quant_specs, quantized
from bitdistiller_peft.quantizers import QuantSpec
from bitdistiller_peft.tuner import BitDistillerLayer

_SHORT = {"cross_entropy": "ce", "student_entropy": "entropy"}


class Meter:
    """Adds up the sums of a loss, on the device, until they are wanted."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._targets = 0

    def add(self, sums: Mapping[str, Tensor], num_targets: int) -> None:
        """Take in one micro-batch.

        Args:
            sums: statistic to its sum over the target tokens, detached.
            num_targets: how many those were.
        """
        for name, value in sums.items():
            # fp64: a long evaluation adds up more tokens than fp32 can count
            wide = value.double() if value.device.type != "mps" else value
            self._sums[name] = self._sums[name] + wide if name in self._sums else wide
        self._targets += num_targets

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """Average per target token over all ranks, and start again; empty if there was none anywhere.

        A collective call: every rank must have measured the same statistics.
        """
        if not self._sums:
            return {}
        stacked = torch.stack([*self._sums.values(), next(iter(self._sums.values())).new_tensor(self._targets)])
        *sums, count = accelerator.reduce(stacked, reduction="sum").tolist()
        names = [_SHORT.get(name, name) for name in self._sums]
        self.__init__()  # type: ignore[misc]
        return {name: value / count for name, value in zip(names, sums, strict=True)} if count else {}


class Stopwatch:
    """Counts tokens against the time that training, not evaluation, takes."""

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._paused = 0.0
        self._tokens = 0

    def restart(self, tokens: int) -> float:
        """Tokens per second since the last call.

        Args:
            tokens: all tokens that were seen so far.
        """
        now = time.perf_counter()
        rate = (tokens - self._tokens) / max(now - self._since - self._paused, 1e-9)
        self._since, self._paused, self._tokens = now, 0.0, tokens
        return rate

    def skip(self, seconds: float) -> None:
        """Leave out time that went elsewhere."""
        self._paused += seconds


class RunMemory(TrainerCallback, ExportableState):
    """What a checkpoint must know beside weights and optimizer: kept in ``trainer_state.json``."""

    def __init__(self) -> None:
        self.gamma: float | None = None
        self.num_tokens = 0

    def state(self) -> dict[str, dict[str, float | int | None]]:
        """Export, in the form that transformers reads."""
        return {"args": {}, "attributes": {"gamma": self.gamma, "num_tokens": int(self.num_tokens)}}

    def recall(self, stored: Mapping[str, object]) -> None:
        """Take over what a checkpoint knows; nothing if it was written by another trainer.

        Args:
            stored: `TrainerState.stateful_callbacks` as loaded.
        """
        entry = stored.get(type(self).__name__)
        attributes = entry.get("attributes", {}) if isinstance(entry, dict) else {}
        gamma, num_tokens = attributes.get("gamma"), attributes.get("num_tokens")
        self.gamma = float(gamma) if gamma is not None else self.gamma
        self.num_tokens = int(num_tokens) if num_tokens is not None else self.num_tokens


class FlipCounter:
    """Measures the share of codes that changed since it last looked.

    Args:
        model: the student.
        num_weights: how many quantized weights to look at, evenly spread over the model; -1 for all.
    """

    def __init__(self, model: nn.Module, num_weights: int) -> None:
        weights = trained_weights(model)
        step = 1.0 if num_weights == -1 else max(1.0, len(weights) / num_weights)
        # one out of every `step`, each time at another place: else, of 7 kinds of layers, always the same might come
        chosen = [weights[int(i * step) + i % int(step)] for i in range(int(len(weights) / step))]
        self._weights = [entry for entry in chosen if not is_sharded(getattr(entry[0], entry[1]))]
        self._codes = self._now()

    def _now(self) -> list[Tensor]:
        with torch.no_grad():
            return [quantized(module, name)[0] for module, name, _ in self._weights]

    def rate(self) -> float | None:
        """The share, in [0, 1]; None where nothing can be looked at."""
        before, self._codes = self._codes, self._now()
        total = sum(codes.numel() for codes in before)
        flipped = sum(int((old != new).sum()) for old, new in zip(before, self._codes, strict=True))
        return flipped / total if total else None


def trained_weights(model: nn.Module) -> list[tuple[nn.Module, str, QuantSpec]]:
    """The fake-quantized weights in force: module that holds it, parameter name, spec."""
    found: list[tuple[nn.Module, str, QuantSpec]] = []
    for module in model.modules():
        if isinstance(module, BitDistillerLayer):
            students = (module.active_student(name) for name in module.parameter_names)
            found += [(s, "weight", quant_specs(s)["weight"]) for s in students if s is not None]
        elif not isinstance(module, FakeQuantWeight):
            specs = quant_specs(module).items()
            found += [(module, name, spec) for name, spec in specs if getattr(module, name).is_floating_point()]
    return found


def learned_parameters(model: nn.Module, suffixes: tuple[str, ...]) -> list[nn.Parameter]:
    """The trained companions of quantized weights with one of these suffixes, e.g. `(SCALE, SCALE_NEGATIVE)`."""
    return [tensor for tensor, _ in learned_companions(model, suffixes)]


def learned_companions(model: nn.Module, suffixes: tuple[str, ...]) -> list[tuple[nn.Parameter, QuantSpec]]:
    """The same, each with the spec of the weight that it belongs to."""
    companions = [
        (companion(module, name, suffix), spec) for module, name, spec in trained_weights(model) for suffix in suffixes
    ]
    return [(tensor, spec) for tensor, spec in companions if isinstance(tensor, nn.Parameter) and tensor.requires_grad]
