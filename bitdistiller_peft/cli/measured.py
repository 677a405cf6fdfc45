"""What `bitdistiller eval` found, as a repository on the Hub shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from bitdistiller_peft.cli.output import RESOLVED, RESULT
from bitdistiller_peft.errors import DataError
from bitdistiller_peft.jsonfile import Kinds, check_entries, read_object

EVAL_RESULTS = ".eval_results"
_AGAIN = "`push.results` must be a folder of `bitdistiller eval`: name one, or evaluate the model again."
_ROW: Mapping[str, Kinds] = {
    "model": str,
    "perplexity?": (dict, NoneType),
    "divergence?": (dict, NoneType),
    "tasks?": (dict, NoneType),
}
_ENTRY: Mapping[str, Kinds] = {"metric": str, "value": float, "protocol": str, "data": str}


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
    path = folder / RESULT
    content = read_object(path, _AGAIN, error=DataError, allow_nan=True)
    check_entries(content, {"rows": list}, path, _AGAIN, error=DataError)
    for row in content["rows"]:
        check_entries(row, _ROW, path, _AGAIN, error=DataError)
        check_entries(row.get("tasks") or {}, {"scores?": (list, NoneType)}, path, _AGAIN, error=DataError)
    mine = [row for row in content["rows"] if Path(row["model"]).resolve() == model.resolve()]
    found = [entry for row in mine for entry in (*_text_scores(row, folder), *_task_scores(row))]
    for entry in found:
        check_entries(entry, _ENTRY, path, _AGAIN, error=DataError)
    if not found:
        raise DataError(
            f"`push.results` must hold a measurement of {model}: got {source!r}, which has none. Evaluate that folder."
        )
    files = sorted((folder / EVAL_RESULTS).glob("*.yaml"))
    return Measured(found, {f"{EVAL_RESULTS}/{file.name}": file for file in files})


def _text_scores(row: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    scored, distance = row.get("perplexity"), row.get("divergence")
    entries = [] if scored is None else [("perplexity", scored.get("perplexity"), scored.get("protocol"))]
    if distance is not None:
        names = ("mean_kl_nats", "p95_kl_nats", "top1_agreement")
        entries += [(name, distance.get(name), distance.get("protocol")) for name in names]
    return [{"metric": m, "value": v, "protocol": p, "data": _text(folder)} for m, v, p in entries]


def _task_scores(row: dict[str, Any]) -> list[dict[str, Any]]:
    scores = (row.get("tasks") or {}).get("scores") or ()
    kept = {"metric": "metric", "value": "value", "protocol": "protocol", "data": "task"}
    return [{ours: score.get(name) for ours, name in kept.items()} for score in map(_mapping, scores)]


def _text(folder: Path) -> str:
    """Name of the text, as the settings beside the result say; of a file, without its folder."""
    from bitdistiller_peft.cli.yamlfile import plain, read_yaml

    path = folder / RESOLVED
    section = _mapping(plain(read_yaml(path)).get("eval")) if path.is_file() else {}
    named = section.get("text")
    return ", ".join(Path(str(name)).name for name in named) if isinstance(named, list) else "unnamed text"


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
