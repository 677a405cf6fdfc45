"""What `bitdistiller eval` found, as a model card shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bitdistiller_peft.cli.output import RESOLVED, RESULT
from bitdistiller_peft.errors import DataError


def measured(source: str, model: Path) -> list[dict[str, Any]]:
    """The rows of an evaluation that belong to a model, for `with_results`.

    Args:
        source: folder that `eval` wrote to, or its result.json.
        model: folder of the model.

    Raises:
        DataError: there is no such result, or it does not know the model.
    """
    path = Path(source)
    path = path / RESULT if path.is_dir() else path
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        mine = [row for row in rows if Path(row["model"]).resolve() == model.resolve()]
        found = [entry for row in mine for entry in _figures(row, _text(path.parent))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"`push.results` must be a folder of `bitdistiller eval`: got {source!r} ({type(error).__name__}: {error})."
        ) from None
    if not found:
        raise DataError(
            f"`push.results` must hold a measurement of {model}: got {source!r}, which has none. Evaluate that folder."
        )
    return found


def _figures(row: dict[str, Any], text: str) -> list[dict[str, Any]]:
    scored, distance = row.get("perplexity"), row.get("divergence")
    entries = [] if scored is None else [("perplexity", scored["perplexity"], scored["protocol"], text)]
    if distance is not None:
        names = ("mean_kl_nats", "p95_kl_nats", "top1_agreement")
        entries += [(name, distance[name], distance["protocol"], text) for name in names]
    for score in row.get("tasks", {}).get("scores", []):
        read_by = [score["filter"]] if score["filter"] != "none" else []
        entries.append((" ".join([score["metric"], *read_by]), score["value"], score["protocol"], score["task"]))
    return [{"metric": m, "value": v, "protocol": p, "data": d} for m, v, p, d in entries]


def _text(folder: Path) -> str:
    """Name of the text, as the settings beside the result say; of a file, without its folder."""
    from bitdistiller_peft.cli.yamlfile import plain, read_yaml

    path = folder / RESOLVED
    named = plain(read_yaml(path))["eval"].get("text", []) if path.is_file() else ["unnamed text"]
    return ", ".join(Path(name).name for name in named)
