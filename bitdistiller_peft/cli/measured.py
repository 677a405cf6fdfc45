"""What `bitdistiller eval` found, as a repository on the Hub shows it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitdistiller_peft.cli.output import RESOLVED, RESULT
from bitdistiller_peft.errors import DataError

EVAL_RESULTS = ".eval_results"


@dataclass(frozen=True)
class Measured:
    """The measurements of one model.

    Attributes:
        rows: ``metric``, ``value``, ``data`` and ``protocol`` of each, for the card.
        files: the Hub's own files about scores on benchmarks, by their path in the repository.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, Path] = field(default_factory=dict)


def measured(source: str, model: Path) -> Measured:
    """Read an evaluation.

    Args:
        source: folder that `eval` wrote to.
        model: folder of the model.

    Raises:
        DataError: there is no such result, or it does not know the model.
    """
    folder = Path(source)
    try:
        rows = json.loads((folder / RESULT).read_text(encoding="utf-8"))["rows"]
        mine = [row for row in rows if Path(row["model"]).resolve() == model.resolve()]
        found = [entry for row in mine for entry in (*_text_scores(row, folder), *_task_scores(row))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"`push.results` must be a folder of `bitdistiller eval`: got {source!r} ({type(error).__name__}: {error})."
        ) from None
    if not found:
        raise DataError(
            f"`push.results` must hold a measurement of {model}: got {source!r}, which has none. Evaluate that folder."
        )
    files = sorted((folder / EVAL_RESULTS).glob("*.yaml"))
    return Measured(found, {f"{EVAL_RESULTS}/{file.name}": file for file in files})


def _text_scores(row: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    scored, distance = row.get("perplexity"), row.get("divergence")
    entries = [] if scored is None else [("perplexity", scored["perplexity"], scored["protocol"])]
    if distance is not None:
        names = ("mean_kl_nats", "p95_kl_nats", "top1_agreement")
        entries += [(name, distance[name], distance["protocol"]) for name in names]
    return [{"metric": m, "value": v, "protocol": p, "data": _text(folder)} for m, v, p in entries]


def _task_scores(row: dict[str, Any]) -> list[dict[str, Any]]:
    scores = row.get("tasks", {}).get("scores", ())
    return [{"metric": s["metric"], "value": s["value"], "protocol": s["protocol"], "data": s["task"]} for s in scores]


def _text(folder: Path) -> str:
    """Name of the text, as the settings beside the result say; of a file, without its folder."""
    from bitdistiller_peft.cli.yamlfile import plain, read_yaml

    path = folder / RESOLVED
    named = plain(read_yaml(path)["eval"].value)["text"] if path.is_file() else ["unnamed text"]
    return ", ".join(Path(name).name for name in named)
