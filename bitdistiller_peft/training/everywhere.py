"""Divergences over prompts too, as in BitNet Distillation's released code, beside cross-entropy on the targets.

Used by `DistillConfig(divergence_tokens="all")` alone. The two parts are means over different tokens. The trainer
divides by the targets of a step, so the divergences are first multiplied by targets per token of the same step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from bitdistiller_peft.losses import IGNORE_INDEX
from bitdistiller_peft.training.forward import Everywhere
from bitdistiller_peft.training.released import released_targets
from bitdistiller_peft.training.teachers import labels_of, num_targets, num_tokens

ALL, TARGETS = "all", "targets"


def everywhere_faults(config: Any) -> list[str]:
    """What in a `DistillConfig` does not go with its `divergence_tokens`."""
    if config.divergence_tokens == TARGETS:
        return []
    if config.divergence_tokens != ALL:
        return [
            f"`divergence_tokens` must be 'targets' or 'all': got divergence_tokens={config.divergence_tokens!r}. "
            "Use 'targets'."
        ]
    faults, terms = [], config.objective(0.5).terms
    if not terms.get("ce") or len(terms) == 1:
        faults.append(
            "`divergence_tokens` must be 'targets' for a loss without both cross-entropy and a divergence: got "
            f"{terms}. Use ce_weight=1.0, or train on prompts and completions alike (completion_only_loss=False)."
        )
    if config.teacher == "cached" or config.is_released:
        faults.append(
            "`divergence_tokens` must be 'targets' with teacher='cached' or arithmetic='released': got 'all'. Use "
            "teacher='self' and arithmetic='default'."
        )
    return faults


class EveryToken:
    """Remembers how many targets and tokens a step has, over all its micro-batches and ranks."""

    def __init__(self) -> None:
        self._share = 0.0

    def note(self, num_targets: int, tokens: int) -> None:
        """Take in what was counted for the step that comes.

        Args:
            num_targets: target tokens.
            tokens: all tokens but padding.
        """
        self._share = num_targets / max(1, tokens)

    def of(self, inputs: Mapping[str, Any], *, is_whole: bool) -> Everywhere:
        """What the divergences of a batch are taken over.

        Every position that is no padding counts, each text's last one too.

        Args:
            inputs: a batch with `labels`.
            is_whole: whether the batch is a step of its own.
        """
        ids, labels = inputs["input_ids"], labels_of(inputs)
        mask = inputs.get("attention_mask")
        known = ids if mask is None or mask.ndim != 2 else torch.where(mask.bool(), ids, IGNORE_INDEX)
        share = num_targets(labels) / max(1, num_tokens(inputs)) if is_whole else self._share
        return Everywhere(released_targets(known), share)
