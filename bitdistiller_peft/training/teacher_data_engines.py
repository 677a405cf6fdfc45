"""Who runs the teacher while it writes: transformers batch by batch, transformers continuously, or vLLM.

An engine answers a window of prompts; a window is on disk before the next one starts. All of them draw from one random
stream per prompt, so an answer does not depend on the window, on its neighbours, or on the process that wrote it.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
)
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

from bitdistiller_peft.errors import ConfigError, TrainingError, UnknownNameError
from bitdistiller_peft.hub.generation import cut_at_stop, stop_and_pad_ids, without_generation_defaults
from bitdistiller_peft.training.fingerprints import sha256_of
from bitdistiller_peft.training.teacher_data_prompts import Prompt
from bitdistiller_peft.training.teacher_data_sampling import Answer, GumbelSampler, Sampling, answer_batch

STATIC, CONTINUOUS, VLLM = "static", "continuous", "vllm"
ENGINES = (STATIC, CONTINUOUS, VLLM)
_BATCHES_PER_WINDOW = 16
_CPU_BATCH_TOKENS = 256
_VLLM_SEEDS = 1 << 62


class Engine(ABC):
    """Answers prompts, a window at a time."""

    @abstractmethod
    def answer(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """Answer a window of prompts, in order.

        Raises:
            TrainingError: the teacher's logits are NaN, or the engine failed.
        """


class StaticBatches(Engine):
    """`model.generate` on padded batches: a batch takes as long as its longest answer.

    Args:
        model: in eval mode.
        sampling: how to sample.
        stop_ids: tokens that end an answer.
        pad_id: any token.
    """

    def __init__(self, model: PreTrainedModel, sampling: Sampling, stop_ids: Sequence[int], pad_id: int) -> None:
        self._model, self._sampling, self._stop_ids, self._pad_id = model, sampling, stop_ids, pad_id

    def answer(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """Answer a batch."""
        return answer_batch(self._model, prompts, self._sampling, self._stop_ids, self._pad_id)


class ContinuousBatches(Engine):
    """transformers' continuous batching: as soon as an answer ends, the next prompt takes its place.

    Args:
        model: in eval mode.
        sampling: how to sample; `batch_size` answers at once.
        stop_ids: tokens that end an answer.
    """

    def __init__(self, model: PreTrainedModel, sampling: Sampling, stop_ids: Sequence[int]) -> None:
        self._model, self._sampling, self._stop_ids = model, sampling, list(stop_ids)

    def answer(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """Answer a window."""
        noise = RequestNoise(self._sampling)
        config = GenerationConfig(
            max_new_tokens=self._sampling.max_new_tokens,
            do_sample=False,
            eos_token_id=self._stop_ids or -1,
        )
        with without_generation_defaults(self._model), _processors(self._model, [noise]):
            manager = self._model.init_continuous_batching(config, self._batching(prompts))
            manager.logit_processor.tensors_required = 1  # counted only for processors that transformers converts
            try:
                manager.start()
                names = [manager.add_request(p.ids, max_new_tokens=config.max_new_tokens, seed=p.seed) for p in prompts]
                found = self._collect(manager, len(prompts))
            finally:
                manager.stop(block=True)
                manager.destroy()
        return [Answer(*cut_at_stop(found[name], self._stop_ids)) for name in names]

    def _batching(self, prompts: Sequence[Prompt]) -> ContinuousBatchingConfig:
        """Room for as many answers as are wanted at once, not all the memory there is."""
        longest = max(len(prompt.ids) for prompt in prompts) + self._sampling.max_new_tokens
        config = ContinuousBatchingConfig(
            max_requests_per_batch=self._sampling.batch_size,
            # the noise is drawn on the host, which neither CUDA graphs nor batches in flight allow
            use_cuda_graph=False,
            use_async_batching=False,
        )
        config.num_blocks = self._sampling.batch_size * (2 + longest // config.page_size)
        if self._model.device.type == "cpu":  # a mask of the square of it is filled on every step
            config.max_batch_tokens = _CPU_BATCH_TOKENS + self._sampling.batch_size
        return config

    def _collect(self, manager: Any, count: int) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        while len(found) < count:
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise TrainingError(f"continuous batching must answer every prompt: it ended after {len(found)}.")
            if result is None or not result.is_finished():
                continue
            if result.error is not None:
                raise TrainingError(f"continuous batching failed: {result.error}.")
            found[result.request_id] = result.generated_tokens
        return found


class RequestNoise(ContinuousBatchingLogitsProcessor):
    """`GumbelSampler` for requests that come and go: each carries its seed, and its stream waits for it.

    Args:
        sampling: temperature (0 leaves decoding greedy), `top_k` and `top_p`.
    """

    supported_kwargs = {"seed": int}  # noqa: RUF012  (transformers' own form)
    ignored_kwargs = ()

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._samplers: dict[str, GumbelSampler] = {}
        self._rows: list[str] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Nothing is told by tensor."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        """Note whose rows come next."""
        self._rows = [request.state.request_id for request in requests_with_new_token]
        for request in requests_with_new_token:
            state = request.state
            if state.request_id not in self._samplers:
                self._samplers[state.request_id] = GumbelSampler([state.logit_processor_kwargs["seed"]], self._sampling)
        return torch.zeros(len(self._rows), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """Add the noise of each request's next draw to logits `[requests, vocab]`; rows behind them are padding."""
        flat = scores.view(-1, scores.shape[-1])
        none = torch.zeros(1, 0, dtype=torch.long, device=scores.device)
        drawn = [self._samplers[name](none, flat[at : at + 1]) for at, name in enumerate(self._rows)]
        return torch.cat([*(row.float() for row in drawn), flat[len(drawn) :].float()]).view(scores.shape)


class Vllm(Engine):
    """vLLM, with a seed of its own for every prompt.

    Args:
        name: folder or Hub name of the teacher.
        sampling: how to sample; `batch_size` answers at once.
        stop_ids: tokens that end an answer.
        options: for `vllm.LLM`, e.g. ``{"tensor_parallel_size": 4}``.

    Raises:
        ConfigError: vLLM is not installed.
    """

    def __init__(self, name: str, sampling: Sampling, stop_ids: Sequence[int], options: dict[str, Any]) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError(
                "`engine` must not be 'vllm' without vLLM: it is not installed. Run pip install vllm, or use "
                "engine='continuous'."
            )
        from vllm import LLM

        self._sampling, self._stop_ids = sampling, list(stop_ids)
        # a generation config would bring penalties of its own
        mine = {"max_num_seqs": sampling.batch_size, "seed": sampling.seed, "generation_config": "vllm"}
        self._engine = LLM(model=name, **{**mine, **options})

    def answer(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """Answer a window."""
        from vllm import SamplingParams

        asked = self._sampling
        params = [
            SamplingParams(
                max_tokens=asked.max_new_tokens,
                temperature=asked.temperature,
                top_p=asked.top_p,
                top_k=asked.top_k,
                seed=prompt.seed % _VLLM_SEEDS,
                stop_token_ids=self._stop_ids,
                detokenize=False,
            )
            for prompt in prompts
        ]
        inputs = [{"prompt_token_ids": prompt.ids} for prompt in prompts]
        outputs = self._engine.generate(inputs, params, use_tqdm=False)
        return [Answer(*cut_at_stop(list(output.outputs[0].token_ids), self._stop_ids)) for output in outputs]


def window_of(engine: str, sampling: Sampling) -> int:
    """Prompts that are handed over together, and that a kill may cost.

    Args:
        engine: its name.
        sampling: with its batch size.
    """
    return sampling.batch_size if engine == STATIC else _BATCHES_PER_WINDOW * sampling.batch_size


def start_engine(
    engine: str, teacher: PreTrainedModel | str, tokenizer: Any, sampling: Sampling, options: dict[str, Any]
) -> Engine:
    """Make an engine ready.

    Args:
        engine: its name.
        teacher: a model in eval mode, or for vLLM its name.
        tokenizer: of the teacher.
        sampling: how to sample.
        options: for vLLM.

    Raises:
        ConfigError: it is not installed.
    """
    if isinstance(teacher, str):
        known = SimpleNamespace(generation_config=_generation_config(teacher))
        return Vllm(teacher, sampling, stop_and_pad_ids(known, tokenizer)[0], options)
    stop_ids, pad_id = stop_and_pad_ids(teacher, tokenizer)
    if engine == CONTINUOUS:
        return ContinuousBatches(teacher, sampling, stop_ids)
    return StaticBatches(teacher, sampling, stop_ids, pad_id)


def context_of(teacher: PreTrainedModel | str) -> int | None:
    """The teacher's context in tokens, if it has a bound."""
    config = AutoConfig.from_pretrained(teacher) if isinstance(teacher, str) else teacher.config
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def fingerprint_name(name: str) -> str:
    """SHA-256 of a teacher that is not loaded here: its name and its config."""
    config = AutoConfig.from_pretrained(name).to_dict()
    config.pop("transformers_version", None)
    return sha256_of([name, config])


def _generation_config(name: str) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(name)
    except OSError:  # there is none
        return GenerationConfig()


def check_engine(engine: object, model: object, options: object) -> None:
    """Refuse what cannot work.

    Raises:
        UnknownNameError: no such engine.
        ConfigError: a name where a model is needed, or options that nobody takes.
    """
    if engine not in ENGINES:
        raise UnknownNameError("engine", engine, ENGINES)
    if isinstance(model, str) and engine != VLLM:
        raise ConfigError(
            f"`model` must be a loaded model for engine={engine!r}: got {model!r}. Load it, or use engine='vllm'."
        )
    if not isinstance(model, str) and engine == VLLM:
        raise ConfigError(
            "`model` must be a folder or Hub name for engine='vllm', which loads it itself: got "
            f"{type(model).__name__}. Pass the name."
        )
    if options and engine != VLLM:
        raise ConfigError(f"`engine_options` must be None but for engine='vllm': got {options!r} for {engine!r}.")


@contextmanager
def _processors(model: PreTrainedModel, processors: Sequence[Any]) -> Iterator[None]:
    """Let a manager that is made now use these logits processors and no others."""
    model._get_logits_processor = lambda generation_config: LogitsProcessorList(processors)
    try:
        yield
    finally:
        del model._get_logits_processor
