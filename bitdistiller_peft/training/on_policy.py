"""Training on what the student itself says: it completes the prompts, and the teacher judges every token of that.

Distillation on given texts shows the student only prefixes that it might never produce. Here the batches of some steps
are replaced: their prompts stay, the student (as quantized) samples the completion, and the same loss is taken on it.
Source: on-policy distillation, GKD (arXiv 2306.13649), algorithm 1, with our losses in place of its own. A second phase
on the student's own text is `on_policy_share=1.0, on_policy_after=0.9`, say.

Whether a step is one, and what is sampled, depends on the seed and the step alone: alike on every device for the first,
and after a resume for both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig
from trl.models import unwrap_model_for_generation

from bitdistiller_peft.calibration.slots import Display, find_student
from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.losses import IGNORE_INDEX
from bitdistiller_peft.training.teachers import labels_of
from bitdistiller_peft.tuner import borrowed


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])  # torch's generator looks at 32 bits alone


class OnPolicy:
    """Replaces the batches of some steps by the student's own text.

    Args:
        args: a `DistillConfig` with a positive `on_policy_share`.
        tokenizer: says what ends a text, and what fills up a batch.
        accelerator: of the run.

    Raises:
        ConfigError: the tokenizer has no end of text.
    """

    def __init__(self, args: Any, tokenizer: Any, accelerator: Accelerator) -> None:
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        if tokenizer.eos_token_id is None:
            raise ConfigError("`on_policy_share` must be 0.0 for a tokenizer without eos_token: completions never end.")
        self._args, self._accelerator = args, accelerator
        self._end = int(tokenizer.eos_token_id)
        self._pad = self._end if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        self._steps = self._own = 0

    def batches(self, model: nn.Module, given: list[Any], step: int, max_steps: int) -> list[Any]:
        """The batches of a step: those that were given, or as `complete` makes them.

        Args:
            model: the student, wrapped as it is trained.
            given: with `labels`.
            step: its number, from 0.
            max_steps: how many there will be.
        """
        is_due = self.is_due(step, max_steps)
        self._steps, self._own = self._steps + 1, self._own + is_due
        return self.complete(model, given, step) if is_due else given

    def drain(self) -> dict[str, float]:
        """Which share of the steps since the last call was on the student's own text."""
        share = self._own / max(1, self._steps)
        self._steps = self._own = 0
        return {"on_policy": share}

    def is_due(self, step: int, max_steps: int) -> bool:
        """Whether the step with this number (from 0) is one on the student's own text."""
        if step < self._args.on_policy_after * max_steps:
            return False
        chance = torch.Generator().manual_seed(_seed(self._args.seed, step))
        return bool(torch.rand((), generator=chance) < self._args.on_policy_share)

    def complete(self, model: nn.Module, batches: list[Any], step: int) -> list[Any]:
        """Replace the batches of a step.

        Args:
            model: the student, wrapped as it is trained.
            batches: with `labels`; the prompt of a text is what comes before its first target, or, where it has none,
                its first `on_policy_prompt_tokens` tokens.
            step: its number.
        """
        seed = _seed(self._args.seed, step, 1 + self._accelerator.process_index)
        with self._sampling(model) as student:
            torch.manual_seed(seed)
            return [self._completed(student, batch) for batch in batches]

    @contextmanager
    def _sampling(self, model: nn.Module) -> Iterator[Any]:
        """The student ready to generate, each weight quantized once; on leaving, all is as it was."""
        with unwrap_model_for_generation(model, self._accelerator) as student, borrowed(student), Display() as display:
            for slot in find_student(student)[1]:
                display.show(slot, slot.student())
            base = student.get_base_model()
            was_caching, base.config.use_cache = base.config.use_cache, True
            try:
                yield base
            finally:
                base.config.use_cache = was_caching

    def _completed(self, student: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        device = student.device
        prompts = [prompt.to(device) for prompt in self._prompts(batch)]
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self._pad, device=device)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # on the left: what is generated follows at once
            ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
        config = GenerationConfig(
            max_new_tokens=self._args.on_policy_max_new_tokens,
            do_sample=True,
            temperature=self._args.on_policy_temperature,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,  # what is left out, generate() takes from the model's own settings
            eos_token_id=self._end,
            pad_token_id=self._pad,
        )
        with self._accelerator.autocast():
            written = student.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        said = [self._until_end(row[width:]) for row in written]
        texts = [torch.cat(pair) for pair in zip(prompts, said, strict=True)]
        labels = [
            torch.cat((torch.full_like(prompt, IGNORE_INDEX), text)) for prompt, text in zip(prompts, said, strict=True)
        ]
        return {
            "input_ids": pad_sequence(texts, batch_first=True, padding_value=self._pad),
            "attention_mask": pad_sequence([torch.ones_like(text) for text in texts], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        }

    def _prompts(self, batch: Mapping[str, Any]) -> list[Tensor]:
        ids, labels = batch["input_ids"], labels_of(batch)
        mask = batch.get("attention_mask")
        prompts = []
        for row in range(len(ids)):
            real = torch.ones_like(ids[row], dtype=torch.bool) if mask is None else mask[row].bool()
            tokens, targets = ids[row][real], labels[row][real] != IGNORE_INDEX
            first = int(targets.to(torch.uint8).argmax()) if bool(targets.any()) else 0
            length = first if first > 1 else self._args.on_policy_prompt_tokens
            prompts.append(tokens[: max(1, length)])
        return prompts

    def _until_end(self, tokens: Tensor) -> Tensor:
        ends = (tokens == self._end).nonzero()
        return tokens[: int(ends[0]) + 1] if len(ends) else tokens


def on_policy_faults(config: Any) -> list[str]:
    """What in a `DistillConfig` does not go with its `on_policy_` settings."""
    share, after = config.on_policy_share, config.on_policy_after
    faults = []
    if not 0 <= share <= 1:
        faults.append(f"`on_policy_share` must lie in [0, 1]: got on_policy_share={share!r}. Use 0.0 for none.")
    if not 0 <= after < 1:
        faults.append(f"`on_policy_after` must lie in [0, 1): got on_policy_after={after!r}. Use 0.0.")
    if not config.on_policy_temperature > 0:
        faults.append(
            f"`on_policy_temperature` must be positive: got on_policy_temperature={config.on_policy_temperature!r}. "
            "Use 1.0."
        )
    for name in ("on_policy_max_new_tokens", "on_policy_prompt_tokens"):
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            faults.append(f"`{name}` must be a positive integer: got {name}={value!r}. Use 32.")
    if share:
        faults += _unfit(config)
    return faults


def _unfit(config: Any) -> list[str]:
    refused = {
        "packing": (config.packing, "Rows would hold several texts; set it to False."),
        "padding_free": (config.padding_free, "Rows would hold several texts; set it to False."),
        "teacher": (config.teacher == "cached", "It has not seen what the student will say; use 'self' or a model."),
        "arithmetic": (config.is_released, "The released code has no such phase; use 'default'."),
    }
    return [
        f"`{name}` must change for on_policy_share={config.on_policy_share!r}: got {getattr(config, name)!r}. {why}"
        for name, (is_set, why) in refused.items()
        if is_set
    ]
