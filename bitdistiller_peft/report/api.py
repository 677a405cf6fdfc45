"""`write_report`: look through the folder of a run, and write what is there as HTML and Markdown."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitdistiller_peft._version import library_version
from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.hub.atomic import write_text
from bitdistiller_peft.report import figures, sections
from bitdistiller_peft.report.axes import num_bytes, short
from bitdistiller_peft.report.document import Document, Tile
from bitdistiller_peft.report.find import Findings, find
from bitdistiller_peft.report.html import GENERATOR, to_html
from bitdistiller_peft.report.markdown import to_markdown
from bitdistiller_peft.report.weights import WeightReport, measure_weights

HTML, MARKDOWN = "report.html", "report.md"
_MISSING = re.compile(r'<section id="(\w+)"[^>]*>\n<h2[^>]*>[^<]*</h2>\n<p class="missing">')


@dataclass(frozen=True)
class ReportFiles:
    """What was written.

    Attributes:
        html: one self-contained file.
        markdown: the same tables.
        missing: keys of the sections that lack their data; the report says which command makes them.
        was_there: the files were made from the same before, and stay as they are.
    """

    html: Path
    markdown: Path
    missing: tuple[str, ...]
    was_there: bool = False


def write_report(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    base: str | None = None,
    weight: str | None = None,
    show_progress: bool = True,
) -> ReportFiles:
    """Report on a run: scores, training, weights, sizes, cost, answers, provenance.

    The HTML file holds everything that it shows: no script, nothing from the network, every foreign text escaped. The
    same folder gives the same bytes; a report that was made from the same files is left as it is.

    Args:
        folder: of `bitdistiller run`, of one of its stages, or of a packed model.
        output: folder for ``report.html`` and ``report.md``; `folder` by default.
        base: the full-precision model, a folder or a name in the cache of the Hub; the packed model names its own.
        weight: the matrix whose histogram is shown; that with the largest error by default.
        show_progress: show a progress bar while weights are read.

    Raises:
        ConfigError: `folder` holds nothing to report on, or ``report.html`` there is another program's.
        CheckpointError: a file is damaged; it is named.
        UnknownNameError: no quantized matrix is called `weight`.

    Example:
        >>> write_report("runs/smollm2").html  # doctest: +SKIP
        PosixPath('runs/smollm2/report.html')
    """
    target = Path(folder if output is None else output)
    html, markdown = target / HTML, target / MARKDOWN
    before = _check_target(html)
    found = find(Path(folder), base)
    fingerprint = found.fingerprint(library_version(), weight)
    weights = None
    if fingerprint in before and markdown.is_file():
        return ReportFiles(html, markdown, tuple(_MISSING.findall(before)), was_there=True)
    if found.packed is not None:
        weights = measure_weights(found.packed, found.base, weight=weight, show_progress=show_progress)
    document = build_document(found, weights, fingerprint)
    target.mkdir(parents=True, exist_ok=True)
    write_text(markdown, to_markdown(document))
    write_text(html, to_html(document))
    return ReportFiles(html, markdown, tuple(section.key for section in document.sections if section.missing))


def build_document(found: Findings, weights: WeightReport | None, fingerprint: str = "") -> Document:
    """The report, before it is written.

    Args:
        found: the files.
        weights: what was read from the weights.
        fingerprint: of both.
    """
    name = _name(found)
    quantization = found.quantization
    words = [f"{key} {quantization[key]}" for key in ("grid", "bits", "group_size") if key in quantization]
    subtitle = ", ".join([*words, *([f"from {found.base_name}"] if found.base_name else [])])
    return Document(
        title=f"Report: {name}",
        subtitle=subtitle or str(found.folder),
        tiles=tuple(_tiles(found, weights)),
        sections=(
            sections.scores(found),
            figures.training(found),
            figures.errors(found, weights),
            figures.weight_histogram(weights),
            figures.sizes(weights),
            sections.costs(found),
            sections.gallery(found),
            sections.provenance(found),
        ),
        writer=f"Written by bitdistiller_peft {library_version()}. Fingerprint {fingerprint}.",
    )


def _name(found: Findings) -> str:
    folder = found.folder.resolve()
    if folder.name in ("packed", "distill", "calibrate", "eval"):  # names of the chain, which say nothing
        folder = folder.parent if folder.parent.name not in ("distill", "calibrate") else folder.parent.parent
    return folder.name or str(folder)


def _tiles(found: Findings, weights: WeightReport | None) -> list[Tile]:
    tiles = []
    rows = [(row, sections.score_of(row)) for row in found.rows]
    scored: list[dict[str, Any]] = [score for _, score in rows if isinstance(score.get("perplexity"), (int, float))]
    if scored:
        first = scored[0]
        note = f"{first.get('state')}: {short(first['perplexity'])}" if len(scored) > 1 else str(first.get("state"))
        tiles.append(Tile("Perplexity", short(scored[-1]["perplexity"]), note))
    distance = sections.mapping(rows[-1][0].get("divergence")) if rows else {}
    if distance:
        tiles.append(Tile("KL to the teacher", sections.number(distance.get("mean_kl_nats")), "nats per token, mean"))
        agreement = sections.percent(distance.get("top1_agreement"))
        tiles.append(Tile("Same top token", agreement, "as the teacher"))
    if weights is not None:
        total = sum(part.stored_bits for part in weights.parts)
        count = max(1, sum(part.num_weights for part in weights.parts))
        tiles.append(Tile("Bits per weight", f"{total / count:.3f}", "everything counted"))
        tiles.append(Tile("Size", num_bytes(total / 8), f"{count:,} weights"))
    answers = [sections.mapping(row.get("gallery")) for row, _ in rows if row.get("gallery")]
    if answers and isinstance(answers[-1].get("entries"), list):
        last = answers[-1]
        tiles.append(Tile("Collapsed answers", f"{last.get('num_collapsed', '–')} of {len(last['entries'])}"))
    return tiles


def _check_target(html: Path) -> str:
    """The report that stands there already, or an empty text.

    Raises:
        ConfigError: the file is not ours.
    """
    if not html.exists():
        return ""
    before = html.read_text(encoding="utf-8", errors="replace")
    if f'<meta name="generator" content="{GENERATOR}">' not in before[:2000]:
        raise ConfigError(
            f"`output` must be a folder whose {HTML} was written by `bitdistiller report`, or has none: got "
            f"{str(html)!r}, which is something else. Choose another folder; nothing was overwritten."
        )
    return before
