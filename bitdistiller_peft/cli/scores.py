"""What `eval` and `compare` measure of a model, and how scores on tasks are shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitdistiller_peft.cli.tables import markdown, table
from bitdistiller_peft.cli.verb import Settings

if TYPE_CHECKING:
    from bitdistiller_peft.evaluation import PerplexityResult, TaskResults

TASK_HEADER = ("task", "model", "evaluated as", "score", "±", "samples", "few-shot")
_CHECKED = ("limit", "num_fewshot", "batch_size", "task_folder", "data_folder", "allow_code_execution")
_TASK_SETTINGS = (*_CHECKED, "apply_chat_template", "allow_latent")


def perplexity_of(model: Any, tokenizer: Any, text: str | list[str] | None, how: dict[str, Any]) -> Any:
    """The perplexity, or `None` where there is no text."""
    from bitdistiller_peft.evaluation import evaluate_perplexity

    if text is None:
        return None
    scored: PerplexityResult = evaluate_perplexity(model, tokenizer, text, **how)
    return scored


def tasks_of(model: Any, tokenizer: Any, settings: Settings) -> Any:
    """The scores on `eval.tasks`, or `None` where there are none."""
    from bitdistiller_peft.evaluation import evaluate_tasks

    values = settings.section("eval")
    if not values["tasks"]:
        return None
    scored: TaskResults = evaluate_tasks(
        model, tokenizer, values["tasks"], **{key: values[key] for key in _TASK_SETTINGS}
    )
    return scored


def check_tasks(settings: Settings) -> None:
    """Refuse tasks that cannot be scored before any model is loaded.

    Raises:
        ConfigError: lm-evaluation-harness is not installed, an unknown task, a number out of range, or a task that runs
            code without leave.
        DataError: a task without files in `eval.data_folder`.
    """
    from bitdistiller_peft.evaluation.tasks import check_tasks as check

    values = settings.section("eval")
    if values["tasks"]:
        check(values["tasks"], **{key: values[key] for key in _CHECKED})


def task_table(rows: Sequence[dict[str, Any]], *, as_markdown: bool = False) -> str:
    """All scores on tasks, task by task, so that models stand below each other; empty if there are none.

    Args:
        rows: of a result, with ``model`` and, where tasks were scored, ``tasks``.
        as_markdown: for a file, not for a terminal.
    """
    cells = [
        (at, (_name(score), row["model"], row["tasks"]["state"], *_numbers(score)))
        for row in rows
        for at, score in enumerate(row.get("tasks", {}).get("scores", ()))
    ]
    ordered = [cell for _, cell in sorted(cells, key=lambda pair: pair[0])]
    if not ordered:
        return ""
    return (markdown if as_markdown else table)(TASK_HEADER, ordered)


def save_eval_results(folder: Path, results: Sequence[Any]) -> None:
    """Write ``.eval_results`` of the one quantized model among results; of several, whose they are would be open."""
    quantized = [result for result in results if result is not None and result.state != "full_precision"]
    if len(quantized) == 1:
        quantized[0].save_eval_results(folder)


def _name(score: dict[str, Any]) -> str:
    read_by = [score["filter"]] if score["filter"] != "none" else []
    return "/".join([score["task"], score["metric"], *read_by])


def _numbers(score: dict[str, Any]) -> tuple[str, ...]:
    error = "" if score["stderr"] is None else f"{score['stderr']:.4f}"
    return (f"{score['value']:.4f}", error, f"{score['num_samples']:,}", str(score["num_fewshot"]))
