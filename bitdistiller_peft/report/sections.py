"""The sections of a report, each from what was found; one that lacks its data says which command makes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from bitdistiller_peft.hub.header import read_json
from bitdistiller_peft.hub.manifest import MANIFEST_NAME
from bitdistiller_peft.jsonfile import is_of_kind
from bitdistiller_peft.report.axes import duration, num_bytes, short
from bitdistiller_peft.report.document import Answer, Block, Dialogue, Paragraph, Section, Table, Verbatim
from bitdistiller_peft.report.find import STAGES, Findings, items

_PLAIN = (str, int, float, bool)
_DIVERGENCE = ("KL mean", "KL 95 %", "top-1")


def mapping(value: Any) -> dict[str, Any]:
    """A mapping of a file as it is, and anything else as an empty one."""
    return value if isinstance(value, dict) else {}


def real(value: Any) -> float | None:
    """A number of a file, and `None` for what is none."""
    return float(value) if is_of_kind(value, float) else None


def number(value: Any) -> str:
    """A cell for a number of a file; empty for what is none."""
    return "" if (found := real(value)) is None else short(found)


def percent(value: Any) -> str:
    """A cell for a share in [0, 1]; empty for what is none."""
    return "" if (found := real(value)) is None else f"{100 * found:.1f} %"


def score_of(row: dict[str, Any]) -> dict[str, Any]:
    """The perplexity of a row with what belongs to it."""
    return mapping(row.get("perplexity"))


def scores(found: Findings) -> Section:
    """Perplexity, divergence, and the paired comparison if there was one."""
    title = "Scores"
    if not found.rows:
        command = "bitdistiller eval MODEL --text TEXT --teacher BASE --output FOLDER/eval"
        return Section("scores", title, missing=f"No evaluation was found. `{command}` makes one.")
    header: tuple[str, ...] = ("model", "evaluated as", "perplexity", "nats per token", *_DIVERGENCE, "tokens")
    rows = tuple(_score_cells(row) for row in found.rows)
    blocks: list[Block] = [Table("Perplexity, and divergence from the teacher", header, rows, texts=(0, 1))]
    tasks = tuple(_task_cells(row, score) for row in found.rows for score in _scores_on_tasks(row))
    if tasks:
        header = ("model", "task", "score", "±", "samples", "few-shot", "protocol")
        blocks.append(Table("Tasks", header, tasks, texts=(0, 1, 6)))
    pairs = items(found.stages["eval"].get("pairs"))
    if pairs:
        header = ("models", "measure", "difference", "95 % interval")
        blocks.append(Table("Paired comparison", header, tuple(_pair_cells(mapping(p)) for p in pairs), texts=(0, 1)))
    protocols = Counter(str(score_of(row)["protocol"]) for row in found.rows if "protocol" in score_of(row))
    words = "KL in nats per token, from the teacher to the model. Figures compare only under the same protocol: "
    blocks.append(Paragraph(words + "; ".join(protocols) + "."))
    return Section("scores", title, tuple(blocks))


def _score_cells(row: dict[str, Any]) -> tuple[str, ...]:
    score, distance = score_of(row), mapping(row.get("divergence"))
    return (
        str(row.get("model")),
        str(score.get("state", "")),
        number(score.get("perplexity")),
        number(score.get("nll_nats_per_token")),
        number(distance.get("mean_kl_nats")),
        number(distance.get("p95_kl_nats")),
        percent(distance.get("top1_agreement")),
        number(score.get("num_tokens")),
    )


def _scores_on_tasks(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [mapping(score) for score in items(mapping(row.get("tasks")).get("scores"))]


def _task_cells(row: dict[str, Any], score: dict[str, Any]) -> tuple[str, ...]:
    name = "/".join(str(score[key]) for key in ("task", "metric", "filter") if score.get(key) not in (None, "none"))
    numbers = (number(score.get(key)) for key in ("value", "stderr", "num_samples", "num_fewshot"))
    return (str(row.get("model")), name, *numbers, str(score.get("protocol", "")))


def _pair_cells(pair: dict[str, Any]) -> tuple[str, ...]:
    interval = f"{number(pair.get('low'))} to {number(pair.get('high'))}"
    mark = "" if pair.get("significant") else " (no difference shown)"
    names = f"{pair.get('other')} - {pair.get('first')}"
    return (names, str(pair.get("measure")), number(pair.get("difference")), interval + mark)


def costs(found: Findings) -> Section:
    """Time and memory of each stage, as far as they were recorded."""
    rows = []
    for stage in STAGES:
        recorded, result = mapping(found.costs.get(stage)), mapping(found.stages.get(stage))
        seconds = real(recorded.get("seconds", result.get("seconds")))
        if seconds is None and stage == "eval":
            parts = [real(mapping(part).get("seconds")) for row in found.rows for part in row.values()]
            known = [value for value in parts if value is not None]
            seconds = sum(known) if known else None
        if seconds is not None:
            peaks = [real(recorded.get(key)) for key in ("peak_memory_bytes", "peak_accelerator_bytes")]
            rows.append((stage, duration(seconds), *("" if peak is None else num_bytes(peak) for peak in peaks)))
    title = "Time and memory by stage"
    if not rows:
        return Section("costs", title, missing="No stage recorded its time. `bitdistiller run -c run.yaml` does.")
    table = Table("As recorded", ("stage", "time", "peak memory", "peak on the accelerator"), tuple(rows))
    words = "Loading included, where `bitdistiller run` recorded it. Empty: not recorded."
    return Section("costs", title, (table, Paragraph(words)))


def gallery(found: Findings) -> Section:
    """Greedy answers to fixed prompts, those of the teacher beside them."""
    title = "What it says"
    chosen = next((row for row in reversed(found.rows) if items(mapping(row.get("gallery")).get("entries"))), None)
    if chosen is None:
        command = "bitdistiller eval MODEL --text TEXT --teacher BASE --gallery 64 --output FOLDER/eval"
        return Section("gallery", title, missing=f"No gallery of answers was found. `{command}` makes one.")
    content = chosen["gallery"]
    entries = [mapping(entry) for entry in items(content["entries"])]
    kinds = Counter(str(mapping(mapping(entry.get("answer")).get("collapse")).get("kind")) for entry in entries)
    words = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    lead = f"Greedy answers of {chosen.get('model')} ({content.get('state')}) to {len(entries)} fixed prompts: {words}."
    blocks: list[Block] = [Paragraph(f"{lead} {content.get('protocol')}.")]
    for entry in entries:
        answers = [_answer("model", entry.get("answer"))]
        if entry.get("teacher_answer"):
            answers.append(_answer("teacher", entry["teacher_answer"]))
        blocks.append(Dialogue(str(entry.get("prompt")), tuple(answers)))
    return Section("gallery", title, tuple(blocks))


def _answer(speaker: str, content: Any) -> Answer:
    answer = mapping(content)
    collapse = mapping(answer.get("collapse"))
    kind, detail = str(collapse.get("kind", "")), str(collapse.get("detail", ""))
    note = f"{kind}: {detail}" if detail else kind
    return Answer(speaker, str(answer.get("text", "")), note, kind not in ("", "healthy", "unfinished"))


def provenance(found: Findings) -> Section:
    """From what, with what and how: everything that the files say."""
    blocks: list[Block] = [_facts("The packed model", _about_model(found))] if found.packed else []
    for stage in STAGES:
        result = mapping(found.stages.get(stage))
        flat = {key: value for key, value in result.items() if isinstance(value, _PLAIN)}
        data = mapping(result.get("data"))
        flat |= {f"data.{key}": value for key, value in data.items() if isinstance(value, _PLAIN)}
        if flat:
            blocks.append(_facts(f"Result of {stage}", flat))
    files = _manifest(found)
    if files:
        title = "Files, as bitdistiller.json lists them"
        blocks.append(Table(title, ("file", "bytes", "SHA-256"), files, texts=(0, 2)))
    reports = mapping(mapping(found.stages.get("export")).get("reports"))
    if reports:
        rows = tuple((str(name), _one_line(report)) for name, report in reports.items())
        blocks.append(Table("Exports", ("format", "report"), rows, texts=(0, 1)))
    if found.settings:
        blocks.append(Verbatim("Resolved settings: `bitdistiller run -c` takes them as they stand", found.settings))
    missing = "" if blocks else "Nothing says where this comes from. `bitdistiller run` writes it beside every result."
    return Section("provenance", "Provenance", tuple(blocks), missing)


def _about_model(found: Findings) -> dict[str, Any]:
    quantization = found.quantization
    about = {"architecture": ", ".join(map(str, items(found.config.get("architectures")))), "folder": str(found.packed)}
    about |= {f"provenance.{key}": value for key, value in mapping(quantization.get("provenance")).items()}
    about |= {key: value for key, value in quantization.items() if key != "provenance"}
    return about | {"transformers_version": found.config.get("transformers_version")}


def _facts(title: str, facts: dict[str, Any]) -> Table:
    shown = tuple((key, _one_line(value)) for key, value in facts.items() if value not in (None, "", [], {}))
    return Table(title, ("what", "value"), shown, texts=(0, 1))


def _one_line(value: Any) -> str:
    match value:
        case list() | tuple():
            return ", ".join(map(_one_line, value))
        case dict():
            return ", ".join(f"{key}={_one_line(inner)}" for key, inner in value.items())
    return repr(value) if isinstance(value, float) else str(value)


def _manifest(found: Findings) -> tuple[tuple[str, ...], ...]:
    if found.packed is None or not (found.packed / MANIFEST_NAME).is_file():
        return ()
    files = mapping(read_json(found.packed / MANIFEST_NAME).get("files"))
    pairs: Sequence[tuple[str, dict[str, Any]]] = [(str(name), mapping(entry)) for name, entry in files.items()]
    return tuple((name, f"{entry.get('bytes', 0):,}", str(entry.get("sha256", ""))) for name, entry in pairs)
