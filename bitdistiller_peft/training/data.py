"""Training text that the teacher wrote itself: what BitDistiller trains on, instead of somebody else's answers."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from pyarrow import ArrowException  # type: ignore[import-untyped]
from tqdm import tqdm
from transformers import PreTrainedModel

from bitdistiller_peft._version import library_version
from bitdistiller_peft.errors import CheckpointError, StateError
from bitdistiller_peft.layers import iter_quantized
from bitdistiller_peft.training.fingerprints import fingerprint_tokenizer, fingerprint_weights
from bitdistiller_peft.training.teacher_data_engines import (
    STATIC,
    Engine,
    check_engine,
    context_of,
    fingerprint_name,
    start_engine,
    window_of,
)
from bitdistiller_peft.training.teacher_data_prompts import (
    Prompt,
    check_lengths,
    fingerprint_prompts,
    prepare_prompts,
)
from bitdistiller_peft.training.teacher_data_sampling import Answer, Sampling
from bitdistiller_peft.training.teacher_data_shards import put_together, resolve_shard
from bitdistiller_peft.training.teacher_data_store import Row, TeacherDataStore, read_finished
from bitdistiller_peft.tuner import BitDistillerLayer, full_precision

logger = logging.getLogger(__name__)


def generate_teacher_data(
    model: PreTrainedModel | PeftModel | str,
    tokenizer: Any,
    prompts: Sequence[str] | Sequence[list[dict[str, str]]],
    *,
    output_dir: str | os.PathLike[str] | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.7,
    top_p: float = 1.0,
    top_k: int = 0,
    batch_size: int = 8,
    seed: int = 0,
    chat_template: str | None = None,
    engine: str = STATIC,
    engine_options: dict[str, Any] | None = None,
    shard: tuple[int, int] | None = None,
    show_progress: bool = True,
) -> Dataset:
    """Let the full-precision teacher answer prompts, and return the answers as training data.

    The answers are sampled from the teacher's own distribution: penalties and other defaults of its generation config
    are not applied. Every prompt has a random stream of its own, derived from `seed` and the prompt, so neither its
    place in the list nor its neighbours' draws matter. What does matter is arithmetic: logits of a prompt differ in
    their last digits between batches, devices and library versions, and now and then that tips a token. So the same
    prompts in the same batches, on the same kind of device, with the same versions and number of threads, give the same
    bytes; anything else mostly the same answers.

    With `output_dir`, every batch is on disk before the next one starts. After a kill, a crash or Ctrl-C, the same call
    goes on where it stopped and ends with the same rows; a call with another model, prompts or settings is refused.
    A finished folder is returned as it is.

    Several processes may share the work, under torchrun or with `shard`: each answers every n-th prompt, into a folder
    of its own inside of `output_dir`, and the last to finish puts the rows together.

    Args:
        model: the teacher, or a `PeftModel` of ours: its adapters are then off, and it is given back as it was. For
            ``engine="vllm"`` its folder or Hub name.
        tokenizer: the teacher's tokenizer; it is not changed, and needs no padding token.
        prompts: texts to continue, or lists of messages to answer; not both.
        output_dir: a folder for ``teacher_data.jsonl`` and ``manifest.json``; `None` keeps all in memory.
        max_new_tokens: what an answer may take. Prompt and answer must fit the teacher's context.
        temperature: of the sampling; 0 takes the likeliest token.
        top_p: sample among the likeliest tokens of this joint probability.
        top_k: sample among this many likeliest tokens; 0 for all.
        batch_size: prompts answered together.
        seed: another seed gives other answers.
        chat_template: for messages, a template in place of the tokenizer's own.
        engine: ``"static"`` for padded batches; ``"continuous"`` for transformers' continuous batching, where a prompt
            takes the place of an answer that has ended; ``"vllm"`` for vLLM, which must be installed. The first two
            draw alike. The latter two keep 16 batches on disk at a time.
        engine_options: for `vllm.LLM`, e.g. ``{"tensor_parallel_size": 4}``.
        shard: index of this process and their number, e.g. ``(0, 4)``; by default `RANK` and `WORLD_SIZE` of the
            environment, which torchrun sets.
        show_progress: show a progress bar.

    Returns:
        One row per prompt, in order; where other processes are not done yet, the rows of this one. ``prompt`` and
        ``completion`` are what TRL's `SFTTrainer` takes: texts for texts, messages for messages. Beside them:
        ``num_tokens`` of the answer, its end included; ``finish_reason``, ``"eos"`` or ``"length"``; ``prompt_id``, the
        prompt's place. An answer that was cut off at ``"length"`` may end mid-word (not mid-character): leave such rows
        out where an end of sequence would be trained on.

    Raises:
        ConfigError: a setting that cannot work, or `output_dir` holds something else.
        DataError: no prompts, an empty, malformed or too long one (named), or messages without a chat template.
        StateError: the model is quantized, or its adapter is merged.
        CheckpointError: damaged files in `output_dir`.
        TrainingError: the teacher's logits are NaN.

    Source:
        Du et al., BitDistiller (arXiv 2402.10631): temperature 0.7, top_p 1, 1024 new tokens, some 8,000 prompts.

    Example:
        >>> data = generate_teacher_data(model, tokenizer, prompts, output_dir="teacher-data")  # doctest: +SKIP
        >>> data.to_parquet("teacher-data.parquet")  # doctest: +SKIP
    """
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, batch_size, seed, chat_template)
    check_engine(engine, model, engine_options)
    folder = None if output_dir is None else Path(output_dir)
    part = resolve_shard(shard, folder)
    prepared = prepare_prompts(tokenizer, prompts, seed=seed, chat_template=chat_template)
    teacher = model if isinstance(model, str) else _checked(model)
    check_lengths(prepared, max_new_tokens, context_of(teacher))
    identity = _identity(teacher, tokenizer, prepared, sampling, engine)
    where, mine = None if folder is None else part.folder(folder), part.of(prepared)
    window = window_of(engine, sampling)
    store = TeacherDataStore(where, identity, _provenance(teacher), window, ids=part.ids(len(prepared)))
    if len(store.rows) < len(mine):
        with nullcontext() if isinstance(model, str) else full_precision(model):
            speaker = start_engine(engine, teacher, tokenizer, sampling, engine_options or {})
            _answer_all(speaker, window, tokenizer, mine, store, show_progress)
    store.finish()
    if folder is None or part.count == 1:
        return _dataset(store.rows, folder)
    return _dataset(put_together(folder, part, identity, _provenance(teacher)) or store.rows, folder)


def load_teacher_data(output_dir: str | os.PathLike[str]) -> Dataset:
    """Read what `generate_teacher_data` wrote, without the teacher.

    Args:
        output_dir: the folder that was given to it.

    Raises:
        StateError: the data are not complete yet.
        CheckpointError: the folder holds no teacher data, or damaged files.
    """
    return _dataset(read_finished(Path(output_dir)), Path(output_dir))


def _dataset(rows: Sequence[Row], folder: Path | None) -> Dataset:
    try:
        return Dataset.from_list(list(rows))
    except (ArrowException, TypeError) as error:  # texts and messages mixed, as no run writes them
        raise CheckpointError(
            f"{folder} must hold teacher data whose rows are alike: {error}. Delete the folder and start again."
        ) from None


def _answer_all(
    engine: Engine,
    window: int,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    store: TeacherDataStore,
    show_progress: bool,
) -> None:
    done, num_tokens, start = len(store.rows), 0, time.perf_counter()
    bar = tqdm(total=len(prompts), initial=done, desc="Teacher data", unit="prompt", disable=not show_progress)
    try:
        for first in range(done, len(prompts), window):
            batch = prompts[first : first + window]
            answers = engine.answer(batch)
            store.append([_row(tokenizer, *pair) for pair in zip(batch, answers, strict=True)])
            num_tokens += sum(len(answer.ids) for answer in answers)
            bar.set_postfix_str(f"{num_tokens / (time.perf_counter() - start):.0f} tokens/s", refresh=False)
            bar.update(len(batch))
    except KeyboardInterrupt:
        kept = f"{len(store.rows)} of {len(prompts)} rows are in {store.folder}; the same call goes on from there"
        logger.warning("Interrupted: %s.", kept if store.folder else "nothing is kept without output_dir")
        raise
    finally:
        bar.close()


def _row(tokenizer: Any, prompt: Prompt, answer: Answer) -> Row:
    text = _answer_text(tokenizer, prompt.ids, answer)
    is_text = isinstance(prompt.value, str)
    return {
        "prompt": prompt.value,
        "completion": text if is_text else [{"role": "assistant", "content": text}],
        "num_tokens": len(answer.ids),
        "finish_reason": "eos" if answer.is_finished else "length",
        "prompt_id": prompt.index,
    }


def _answer_text(tokenizer: Any, prompt_ids: list[int], answer: Answer) -> str:
    """The answer such that prompt + answer is the whole text: decoded alone, it could lose its leading space."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before = tokenizer.decode(prompt_ids, **options)
    whole = tokenizer.decode(prompt_ids + answer.ids, **options)
    text = whole[len(before) :] if whole.startswith(before) else tokenizer.decode(answer.ids, **options)
    return text if answer.is_finished else text.rstrip("\ufffd")  # the first bytes of a character that was cut off


def _checked(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The teacher in a model, if it is one."""
    layers = [module for module in model.modules() if isinstance(module, BitDistillerLayer)]
    if any(layer.merged for layer in layers):
        raise StateError("the adapter must not be merged: switching it off would unmerge it. Call unmerge_adapter().")
    if not layers and next(iter_quantized(model), None) is not None:
        raise StateError(
            "the teacher must be in full precision: got a packed or latent model. Load the original model instead."
        )
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _identity(
    teacher: PreTrainedModel | str, tokenizer: Any, prompts: Sequence[Prompt], sampling: Sampling, engine: str
) -> Mapping[str, Any]:
    """What the rows depend on."""
    return {
        "num_prompts": len(prompts),
        "engine": None if engine == STATIC else engine,
        "settings": dataclasses.asdict(sampling),
        "fingerprints": {
            "prompts": fingerprint_prompts(prompts),
            "tokenizer": fingerprint_tokenizer(tokenizer),
            "teacher": fingerprint_name(teacher) if isinstance(teacher, str) else fingerprint_weights(teacher),
        },
    }


def _provenance(teacher: PreTrainedModel | str) -> dict[str, Any]:
    """What else is worth knowing; it may differ when a run is resumed."""
    libraries = {name: version(name) for name in ("torch", "transformers", "tokenizers")}
    about = {"teacher": teacher}
    if not isinstance(teacher, str):
        about["teacher"] = str(getattr(teacher.config, "_name_or_path", "")) or type(teacher).__name__
        about |= {"dtype": str(teacher.dtype).removeprefix("torch."), "device": str(teacher.device)}
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        **about,
        "num_threads": torch.get_num_threads(),
        "versions": {"bitdistiller_peft": library_version(), **libraries},
    }
