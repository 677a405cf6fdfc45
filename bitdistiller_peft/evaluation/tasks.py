"""The standard tasks: lm-evaluation-harness on the model that is in memory, in whatever state it is."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from bitdistiller_peft.errors import ConfigError, DataError
from bitdistiller_peft.evaluation.programs import own_metric
from bitdistiller_peft.evaluation.state import detect_state
from bitdistiller_peft.evaluation.task_results import TaskResults, TaskScore, mean_samples
from bitdistiller_peft.evaluation.task_sources import open_tasks
from bitdistiller_peft.tuner import borrowed

_CONSENT = "HF_ALLOW_CODE_EVAL"


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: str | Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 1,
    apply_chat_template: bool = False,
    task_folder: str | Path | None = None,
    data_folder: str | Path | None = None,
    allow_code_execution: bool = False,
    allow_latent: bool = False,
) -> TaskResults:
    """Score a model on tasks of lm-evaluation-harness, by its own rules, prompts and metrics.

    The model is handed over as it is, so that packed layers, students and full precision are scored alike; it and the
    tokenizer are given back as they were. Needs ``pip install 'bitdistiller_peft[eval]'``. One process.

    Data comes from the Hub, or wholly from this machine. Either `task_folder` holds task files of your own, whose
    ``dataset_path: json`` and ``dataset_kwargs: {data_files: ...}`` name local files (relative to the working
    directory, as everywhere in lm-eval). Or `data_folder` holds the data of lm-eval's tasks, ``<task>/<split>.jsonl``
    with the columns that the data set has on the Hub: then no task reads anything else.

    A task file can hold Python, and its templates are not confined: trust a `task_folder` as you trust a script.

    Args:
        model: a transformers model or a `PeftModel`; its state is found out and reported.
        tokenizer: the model's tokenizer.
        tasks: names of tasks, groups or tags: ``"gsm8k"``, ``"arc_easy"``, ``"humaneval"``.
        limit: use only that many samples of each task.
        num_fewshot: examples in front of each question; `None` for what each task is published with.
        batch_size: samples per forward pass.
        apply_chat_template: put each question into the tokenizer's chat template.
        task_folder: a folder with task files besides lm-eval's own.
        data_folder: a folder with the data of every task that is asked for; groups are scored task by task.
        allow_code_execution: let tasks run the programs that the model writes (HumanEval, MBPP): on this machine, with
            your rights, each in a process, an empty environment and a folder of its own, with limits of time and
            memory. That is no wall against a hostile program: use a container.
        allow_latent: score the float master weights of a latent checkpoint as they are.

    Returns:
        Every score with its protocol and its samples, and the model's state.

    Raises:
        ConfigError: lm-eval is not installed, an unknown task, a number out of range, or a task that runs code
            without leave.
        DataError: data that cannot be read, or that lacks what the task asks of it.
        StateError: the layers are in different states, or see `allow_latent`.

    Example:
        >>> print(evaluate_tasks(model, tokenizer, ["arc_easy", "gsm8k"], limit=100))  # doctest: +SKIP
    """
    names = _names(tasks)
    _check(names, limit=limit, num_fewshot=num_fewshot, batch_size=batch_size)
    state = detect_state(model, allow_latent=allow_latent)
    start = time.perf_counter()
    given = {"limit": limit, "num_fewshot": num_fewshot, "apply_chat_template": apply_chat_template}
    with (
        _quiet(),
        _consent(allow_code_execution),
        _opened(names, task_folder, data_folder, allow_code_execution) as (manager, specs),
        borrowed(model),
        _other_random_states(),
    ):
        given |= {"task_manager": manager, "confirm_run_unsafe_code": allow_code_execution}
        raw = _run(model, tokenizer, specs, batch_size, given)
    return TaskResults(_scores(raw), state, time.perf_counter() - start)


def check_tasks(
    tasks: str | Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 1,
    task_folder: str | Path | None = None,
    data_folder: str | Path | None = None,
    allow_code_execution: bool = False,
) -> None:
    """Refuse what `evaluate_tasks` would refuse, without a model: before one is loaded, or trained.

    Args:
        tasks: names of tasks, groups or tags.
        limit: see `evaluate_tasks`, as the others.
        num_fewshot: see there.
        batch_size: see there.
        task_folder: see there.
        data_folder: see there.
        allow_code_execution: see there.

    Raises:
        ConfigError: lm-eval is not installed, an unknown task, a number out of range, or a task that runs code
            without leave.
        DataError: a task without files in `data_folder`.
    """
    names = _names(tasks)
    _check(names, limit=limit, num_fewshot=num_fewshot, batch_size=batch_size)
    with _quiet(), _opened(names, task_folder, data_folder, allow_code_execution):
        pass


def _names(tasks: str | Sequence[str]) -> list[str]:
    return [tasks] if isinstance(tasks, str) else list(tasks)


def _opened(
    names: list[str], task_folder: str | Path | None, data_folder: str | Path | None, allow_code_execution: bool
) -> AbstractContextManager[tuple[Any, list[str]]]:
    folders = {"task_folder": task_folder, "data_folder": data_folder}
    paths = {name: None if folder is None else Path(folder).expanduser() for name, folder in folders.items()}
    return open_tasks(names, **paths, allow_code_execution=allow_code_execution)


def _check(names: list[str], **numbers: int | None) -> None:
    if find_spec("lm_eval") is None:
        raise ConfigError(
            "`tasks` must not be given without lm-evaluation-harness: it is not installed. "
            "Run: pip install 'bitdistiller_peft[eval]'"
        )
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"`tasks` must be names of tasks: got tasks={names!r}. Use tasks=['arc_easy'].")
    least = {"limit": 1, "num_fewshot": 0, "batch_size": 1}
    for name, value in numbers.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least[name]):
            raise ConfigError(f"`{name}` must be a whole number of at least {least[name]}: got {name}={value!r}.")


def _run(model: nn.Module, tokenizer: Any, specs: list[str], batch_size: int, given: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's results."""
    from datasets.exceptions import DatasetsError
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=deepcopy(tokenizer), batch_size=batch_size)  # it may add a padding token
    try:
        results: dict[str, Any] = simple_evaluate(model=lm, tasks=specs, **given)
    except (DatasetsError, OSError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"the data of `tasks` must be readable, with the splits and columns that the tasks name: {reason}. "
            "Offline, give local files with `data_folder`, or task files of your own with `task_folder`."
        ) from error
    return results


def _scores(raw: dict[str, Any]) -> tuple[TaskScore, ...]:
    return tuple(score for task in {**raw["results"], **raw.get("groups", {})} for score in _scores_of(task, raw))


def _scores_of(task: str, raw: dict[str, Any]) -> Iterator[TaskScore]:
    """The scores of a task or a group; a group has neither samples nor settings of its own."""
    values = {**raw["results"], **raw.get("groups", {})}[task]
    samples, config = raw["samples"].get(task, []), raw["configs"].get(task, {})
    better, shots = raw["higher_is_better"].get(task, {}), raw["n-shot"].get(task)
    dataset = _hub_dataset(config)
    for key, value in values.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        own = [sample for sample in samples if sample["filter"] == chosen]
        stderr = values.get(f"{metric}_stderr,{chosen}")
        yield TaskScore(
            task=task,
            metric=metric,
            filter=chosen,
            value=float(value),
            stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
            higher_is_better=better.get(metric),
            num_samples=int(values.get("sample_len", len(own))),
            num_fewshot=int(shots or 0),
            protocol=_protocol(task, raw, own),
            is_whole=all(counts["original"] == counts["effective"] for counts in _counts(task, raw)),
            dataset=dataset,
            dataset_config=config.get("dataset_name") if dataset else None,
            samples=mean_samples([sample.get(metric) for sample in own], float(value)),
        )


def _counts(task: str, raw: dict[str, Any]) -> list[dict[str, int]]:
    """How many samples a task has, and how many were used; of a group, those of its tasks."""
    counts = raw["n-samples"]
    return [counts[task]] if task in counts else [counts[m] for m in raw["group_subtasks"][task] if m in counts]


def _hub_dataset(config: dict[str, Any]) -> str | None:
    """The data set's name on the Hub; names without an owner are readers of local files, or old aliases."""
    path = str(config.get("dataset_path") or "")
    return path if path.count("/") == 1 and not Path(path).exists() else None


def _protocol(task: str, raw: dict[str, Any], samples: list[dict[str, Any]]) -> str:
    """What two comparable scores have in common: version of the rules, shots, and the very questions and answers."""
    group = raw.get("group_subtasks", {}).get(task, [])
    members = samples or [sample for member in group for sample in raw["samples"].get(member, [])]
    hashes = [f"{sample['doc_hash']}{sample['prompt_hash']}{sample['target_hash']}" for sample in members]
    digest = hashlib.sha256("".join(hashes).encode()).hexdigest()[:12]
    shots = raw["n-shot"].get(task)
    parts = [f"lm-eval/{raw['lm_eval_version']}", task, f"version={raw['versions'].get(task)}"]
    parts += [] if shots is None else [f"shots={shots}"]
    return "/".join([*parts, f"n={len(hashes)}", f"samples={digest}"])


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's warnings are for its own command line: that a model object was given, and the like."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _consent(is_given: bool) -> Iterator[None]:
    """Leave to run programs, as lm-eval's tasks look for it, and our metric that runs them."""
    before = os.environ.pop(_CONSENT, None)
    if is_given:
        os.environ[_CONSENT] = "1"
    try:
        with own_metric() if is_given else nullcontext():
            yield
    finally:
        os.environ.pop(_CONSENT, None)
        if before is not None:
            os.environ[_CONSENT] = before


@contextmanager
def _other_random_states() -> Iterator[None]:
    """lm-eval seeds Python and NumPy; `borrowed` takes care of torch."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
