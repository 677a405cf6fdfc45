"""What a model scores on tasks, and the three forms that a score is passed on in: JSON, Markdown, `.eval_results`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bitdistiller_peft.errors import ConfigError

EVAL_RESULTS = ".eval_results"


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        task: name of the task or group.
        metric: name of the metric, ``"acc"``, ``"exact_match"``.
        filter: how an answer was read out of what the model wrote; ``"none"`` where the text is taken as it is.
        value: the score, as lm-eval has it: accuracies between 0 and 1.
        stderr: standard error of the score over samples; `None` where lm-eval gives none.
        higher_is_better: which way is better; `None` where the task does not say.
        num_samples: how many samples.
        num_fewshot: examples in front of each question.
        protocol: how it was measured; two scores are comparable if, and only if, this is equal.
        is_whole: whether all samples of the task were used, not the first few.
        dataset: name of the data on the Hub, as lm-eval's task has it; `None` for local data.
        dataset_config: its configuration, if it has several.
        samples: the score of every sample, for paired comparisons; empty where `value` is not their mean.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    num_samples: int
    num_fewshot: int
    protocol: str
    is_whole: bool
    dataset: str | None = None
    dataset_config: str | None = None
    samples: tuple[float, ...] = field(default=(), repr=False)

    @property
    def name(self) -> str:
        """Task and metric in one word: ``"gsm8k/exact_match/strict-match"``."""
        return "/".join([self.task, self.metric, *([self.filter] if self.filter != "none" else [])])


@dataclass(frozen=True)
class TaskResults:
    """What a model scores on several tasks.

    Attributes:
        scores: in the order of the tasks.
        state: what was measured, see `detect_state`.
        seconds: how long it took.
        date: when it ended, ISO 8601, UTC.
    """

    scores: tuple[TaskScore, ...]
    state: str
    seconds: float
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def __str__(self) -> str:
        return f"{self.to_markdown()}\nevaluated as: {self.state}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, samples included."""
        return asdict(self)

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(self.as_dict(), indent=1, ensure_ascii=False)

    def to_markdown(self) -> str:
        """A table with the protocol of every score."""
        rows = [
            f"| {s.name} | {s.value:.4f} | {_error(s)} | {s.num_samples} | {s.num_fewshot} | `{s.protocol}` |"
            for s in self.scores
        ]
        head = ["| task | score | ± | samples | few-shot | protocol |", "|---|---:|---:|---:|---:|---|"]
        return "\n".join([*head, *rows])

    def eval_results(self, benchmarks: Mapping[str, tuple[str, str]] | None = None) -> list[dict[str, Any]]:
        """The scores as the Hub reads them from ``.eval_results/*.yaml``.

        A task has one entry, its first score. Left out are scores on local data, unless `benchmarks` says what they
        are, and scores on a part of the data: a leader board would take them for whole ones.

        Args:
            benchmarks: by name of the task, the benchmark's id on the Hub and the id of its task there; by default the
                data set and the configuration that lm-eval reads.

        Raises:
            ConfigError: `benchmarks` names a task that was not evaluated.

        See https://huggingface.co/docs/hub/eval-results.
        """
        from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

        named = dict(benchmarks or {})
        unknown = sorted(set(named) - {score.task for score in self.scores})
        if unknown:
            have = sorted({score.task for score in self.scores})
            raise ConfigError(f"`benchmarks` must name tasks that were evaluated, {have}: got {unknown}.")
        entries = []
        for score in {score.task: score for score in reversed(self.scores) if score.is_whole}.values():
            default = (score.dataset, score.dataset_config or "default") if score.dataset else None
            place = named.get(score.task, default)
            if place is not None:
                notes = f"{score.name}; evaluated as {self.state}; {score.protocol}"
                entries.append(EvalResultEntry(*place, value=round(score.value, 6), date=self.date, notes=notes))
        return eval_result_entries_to_yaml(entries[::-1])

    def save_eval_results(self, folder: Path, benchmarks: Mapping[str, tuple[str, str]] | None = None) -> list[Path]:
        """Write ``.eval_results/*.yaml`` into a model folder, a file per benchmark.

        Args:
            folder: the folder that is, or will be, the repository on the Hub.
            benchmarks: see `eval_results`.

        Returns:
            The files; none if no score is on data of the Hub.
        """
        import yaml

        by_name: dict[str, list[dict[str, Any]]] = {}
        for entry in self.eval_results(benchmarks):
            by_name.setdefault(entry["dataset"]["id"].replace("/", "--"), []).append(entry)
        files = []
        for name, entries in by_name.items():
            file = Path(folder) / EVAL_RESULTS / f"{name}.yaml"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(yaml.safe_dump(entries, sort_keys=False, allow_unicode=True), encoding="utf-8")
            files.append(file)
        return files


def mean_samples(values: Sequence[object], value: float) -> tuple[float, ...]:
    """The samples of a score as numbers, if the score is their mean; else none.

    Args:
        values: what the task's metric gave for every sample.
        value: the score.
    """
    if not values or not all(isinstance(each, (bool, int, float)) for each in values):
        return ()
    numbers = tuple(float(each) for each in values if isinstance(each, (bool, int, float)))
    return numbers if math.isclose(math.fsum(numbers) / len(numbers), value, abs_tol=1e-9) else ()


def _error(score: TaskScore) -> str:
    return "" if score.stderr is None else f"{score.stderr:.4f}"
