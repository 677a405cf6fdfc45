"""Answers sampled from a teacher, each with a random stream of its own.

`generate()` samples a whole batch from one global stream, so an answer would depend on its neighbours and on how often
they were drawn before. Here decoding is greedy over scores with Gumbel noise added, and the argmax of
`log p_i + gumbel_i` is a sample from p (Gumbel-max). The noise of a row comes from that row's generator, on the CPU,
whatever the device. Two runs whose logits differ a little, as logits of one prompt do between batches, then mostly
choose the same tokens, because they add the same noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from bitdistiller_peft.errors import ConfigError, TrainingError
from bitdistiller_peft.hub.generation import cut_at_stop, without_generation_defaults
from bitdistiller_peft.training.teacher_data_prompts import Prompt


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled; see `generate_teacher_data` for the meaning.

    Raises:
        ConfigError: settings that cannot work, all at once.
    """

    max_new_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    batch_size: int = 8
    seed: int = 0
    chat_template: str | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        whole = {"max_new_tokens": 1, "batch_size": 1, "top_k": 0, "seed": 0}
        faults = [
            f"`{name}` must be a whole number of at least {least}: got {name}={getattr(self, name)!r}."
            for name, least in whole.items()
            if not _is_whole(getattr(self, name)) or getattr(self, name) < least
        ]
        if not _is_number(self.temperature) or self.temperature < 0:
            faults.append(
                f"`temperature` must be a number of at least 0: got temperature={self.temperature!r}. "
                "Use 0.7, or 0 for the likeliest token."
            )
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            faults.append(f"`top_p` must lie in (0, 1]: got top_p={self.top_p!r}. Use 1.0 for no limit.")
        if faults:
            raise ConfigError("\n".join(faults))


@dataclass(frozen=True)
class Answer:
    """What the teacher said to a prompt.

    Attributes:
        ids: the new tokens, the one that ended the answer included.
        is_finished: whether it was ended by the teacher and not by `max_new_tokens`.
    """

    ids: list[int]
    is_finished: bool


class GumbelSampler(LogitsProcessor):
    """Turns greedy decoding into sampling, one independent stream per row.

    Args:
        seeds: one per row of the batch.
        sampling: temperature (0 leaves decoding greedy), `top_k` and `top_p`.
    """

    def __init__(self, seeds: Sequence[int], sampling: Sampling) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.warpers = LogitsProcessorList()
        self.is_greedy = sampling.temperature == 0
        if not self.is_greedy and sampling.temperature != 1:
            self.warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if not self.is_greedy and sampling.top_k:
            self.warpers.append(TopKLogitsWarper(sampling.top_k))
        if not self.is_greedy and sampling.top_p < 1:
            self.warpers.append(TopPLogitsWarper(float(sampling.top_p)))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Filter logits `[batch, vocab]` and add the noise of the next draw.

        Raises:
            TrainingError: a logit is NaN.
        """
        if bool(scores.isnan().any()):
            raise TrainingError("the teacher's logits must be numbers: got NaN. Check its weights and its dtype.")
        if self.is_greedy:
            return scores
        # fp64: 24 bits of a uniform number would cut the tail off. u = 0 gives -inf and never wins; u = 1 never comes.
        uniform = torch.stack([torch.rand(scores.shape[1], dtype=torch.float64, generator=g) for g in self.generators])
        noise = uniform.log_().neg_().log_().neg_()
        return self.warpers(input_ids, scores).float() + noise.float().to(scores.device)


def answer_batch(
    model: PreTrainedModel, batch: Sequence[Prompt], sampling: Sampling, stop_ids: Sequence[int], pad_id: int
) -> list[Answer]:
    """Let a model continue prompts, padded on the left and masked there.

    Args:
        model: in eval mode.
        batch: the prompts.
        sampling: how to sample.
        stop_ids: tokens that end an answer.
        pad_id: any token; it is never attended to.

    Raises:
        TrainingError: the model's logits are NaN.
    """
    width = max(len(prompt.ids) for prompt in batch)
    ids = torch.tensor([[pad_id] * (width - len(prompt.ids)) + prompt.ids for prompt in batch])
    mask = torch.tensor([[0] * (width - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in batch])
    device = model.get_input_embeddings().weight.device
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=pad_id,
        disable_compile=True,
    )
    sampler = GumbelSampler([prompt.seed for prompt in batch], sampling)
    with without_generation_defaults(model):
        output = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=config,
            logits_processor=LogitsProcessorList([sampler]),
        )
    return [Answer(*cut_at_stop(row, list(stop_ids))) for row in output[:, width:].tolist()]


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
