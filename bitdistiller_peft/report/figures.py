"""The sections with drawings: training, errors by layer, the histogram, sizes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from bitdistiller_peft.jsonfile import is_of_kind
from bitdistiller_peft.report.axes import num_bytes, short
from bitdistiller_peft.report.document import Block, Figure, Paragraph, Section, Table
from bitdistiller_peft.report.find import Findings
from bitdistiller_peft.report.svg import Bars, Series, divided_bar, heat_map, line_chart, two_histograms
from bitdistiller_peft.report.weights import MatrixError, WeightHistogram, WeightReport, relative

MAX_ROWS = 25
"""A table under a curve shows so many of its points, evenly spread."""
MAX_LEVELS = 16
"""Levels of more bits are too many to be drawn."""
_CURVES = (
    ("Loss", {"loss": "training", "eval_loss": "evaluation"}, "loss"),
    ("KL between teacher and student", {"forward_kl": "forward", "reverse_kl": "reverse"}, "nats per token"),
    ("Codes that changed", {"flip_rate": "flip rate"}, "share of codes"),
    (
        "What codes and scales do",
        {
            "oscillation": "oscillation",
            "clamped": "clamped",
            "dead_levels": "dead levels",
            "dead_scales": "dead scales",
        },
        "share of all",
    ),
)
_STEPS = 1 << 50  # no run has more; beyond, an axis could not tell one from the next
_NO_MODEL = "No packed model was found. `bitdistiller distill` or `bitdistiller run` makes one."
_TRAIN = "`bitdistiller distill` (with `logging_steps`) writes the log; so does `bitdistiller run`."


def series_of(log: Sequence[dict[str, Any]], key: str, name: str) -> Series | None:
    """A metric over the steps; `None` where it was never logged.

    Args:
        log: entries of the trainer.
        key: the metric.
        name: for the legend.
    """
    entries = [entry for entry in log if _is_number(entry.get(key)) and _is_step(entry.get("step"))]
    series = Series(name, tuple(float(e["step"]) for e in entries), tuple(float(e[key]) for e in entries))
    return series if series.points() else None


def training(found: Findings) -> Section:
    """Loss, both divergences, flip rate and what the doctor measures over the steps; and what it found."""
    title = "Training"
    if not found.log:
        return Section("training", title, missing=f"No log of a training run was found. {_TRAIN}")
    blocks: list[Block] = []
    for name, keys, unit in _CURVES:
        series = [one for key, label in keys.items() if (one := series_of(found.log, key, label)) is not None]
        if not series:
            blocks.append(Paragraph(f"{name}: not in the log ({', '.join(keys)}). {_TRAIN}"))
            continue
        svg = line_chart(name, series, x_name="step", y_name=unit, from_zero=unit != "loss")
        blocks.append(Figure(name, svg, _points(name, series)))
    if found.doctor:
        rows = tuple(
            tuple(str(one.get(key, "")) for key in ("name", "severity", "first_step", "seen", "advice"))
            for one in found.doctor
        )
        header = ("finding", "severity", "first step", "what was seen", "what helps")
        blocks.append(Table("The training doctor", header, rows, texts=(0, 1, 3, 4)))
    lost = sum(1 for entry in found.log for key in ("loss", "forward_kl", "reverse_kl") if _is_lost(entry.get(key)))
    if lost:
        blocks.append(Paragraph(f"{lost} logged values are not finite; the curves leave them out."))
    return Section("training", title, tuple(blocks))


def _points(title: str, series: Sequence[Series]) -> Table:
    """The points as a table, thinned out evenly; the first and the last stay."""
    by_step: dict[float, dict[int, float]] = defaultdict(dict)
    for number, one in enumerate(series):
        for x, y in one.points():
            by_step[x][number] = y
    steps = sorted(by_step)
    if len(steps) > MAX_ROWS:
        steps = [steps[round(at * (len(steps) - 1) / (MAX_ROWS - 1))] for at in range(MAX_ROWS)]
    cells = ((short(by_step[x][n]) if n in by_step[x] else "" for n in range(len(series))) for x in steps)
    rows = tuple((short(x), *row) for x, row in zip(steps, cells, strict=True))
    return Table(title, ("step", *(one.name for one in series)), rows, texts=())


def errors(found: Findings, weights: WeightReport | None) -> Section:
    """How far each matrix is from the full-precision one: layer by module."""
    title = "Error of the weights, by layer and module"
    if weights is None:
        return Section("errors", title, missing=_NO_MODEL)
    if not weights.errors:
        words = f"{weights.no_errors} Where it is, `bitdistiller report FOLDER --model BASE` reads it."
        return Section("errors", title, missing=words)
    layers = sorted({error.layer for error in weights.errors})
    modules = list(dict.fromkeys(error.module for error in weights.errors))
    values = _cells(weights.errors, layers, modules)
    names = ["–" if layer < 0 else str(layer) for layer in layers]
    columns = _last_words(modules)
    rows = tuple(
        (name, *(f"{values[row, at]:.4f}" if (row, at) in values else "" for at in range(len(columns))))
        for row, name in enumerate(names)
    )
    finite = {place: value for place, value in values.items() if math.isfinite(value)}
    total = relative(sum(e.squared_error for e in weights.errors), sum(e.squared_norm for e in weights.errors))
    words = (
        f"‖packed − full precision‖ / ‖full precision‖ of every matrix; {short(total)} over all of them. Training "
        "moves weights on purpose, and AWQ rescales them: then a large error here is no fault by itself."
    )
    table = Table(title, ("layer", *columns), rows, texts=())
    drawn = (
        [Figure("Relative error of each matrix", heat_map(title, names, columns, finite), table)] if finite else [table]
    )
    return Section("errors", title, (*drawn, Paragraph(words)))


def _cells(found: Sequence[MatrixError], layers: list[int], modules: list[str]) -> dict[tuple[int, int], float]:
    """One value for each layer and module; the experts of a module count together."""
    sums: dict[tuple[int, int], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for error in found:
        entry = sums[layers.index(error.layer), modules.index(error.module)]
        entry[0], entry[1] = entry[0] + error.squared_error, entry[1] + error.squared_norm
    return {place: relative(*entry) for place, entry in sums.items()}


def _last_words(names: Sequence[str]) -> list[str]:
    """The last word of each name, or the whole name where two end alike."""
    last = [name.rpartition(".")[2] for name in names]
    return [word if last.count(word) == 1 else name for word, name in zip(last, names, strict=True)]


def weight_histogram(weights: WeightReport | None) -> Section:
    """One weight before and after, with the levels."""
    title = "One weight, before and after"
    if weights is None or weights.histogram is None:
        return Section("histogram", title, missing=_NO_MODEL)
    found: WeightHistogram = weights.histogram
    levels = [level for level in found.levels if math.isfinite(level)] if len(found.levels) <= MAX_LEVELS else []
    before = None if found.before is None else Bars(found.edges, found.before)
    svg = two_histograms(f"Weights of {found.name}", before, Bars(found.edges, found.after), levels, found.unit)
    shares = zip(found.levels, found.shares, strict=True)
    rows = tuple((short(level) if math.isfinite(level) else "never used", f"{100 * s:.2f} %") for level, s in shares)
    table = Table("Levels, and the share of weights on each", ("level", "share of the weights"), rows, texts=())
    words = f"In {found.unit}. `bitdistiller report FOLDER --weight NAME` shows another one."
    if found.before is None:
        words += f" {weights.no_errors}"
    elif found.outside:
        words += f" {100 * found.outside:.2g} % of the weights before lie outside and count at the ends."
    return Section("histogram", title, (Figure(found.name, svg, table), Paragraph(words)))


def sizes(weights: WeightReport | None) -> Section:
    """Bits and bytes by part: together they are the files."""
    title = "Size by part"
    if weights is None:
        return Section("sizes", title, missing=_NO_MODEL)
    total = sum(part.stored_bits for part in weights.parts)
    count = max(1, sum(part.num_weights for part in weights.parts))
    rows = [
        (
            part.part,
            f"{part.num_weights:,}" if part.num_weights else "",
            f"{part.stored_bits / 8:,.10g}",
            f"{part.stored_bits / count:.4f}",
            f"{100 * part.stored_bits / total:.2f} %",
        )
        for part in weights.parts
    ]
    rows.append(("total", f"{count:,}", f"{total / 8:,.10g}", f"{total / count:.4f}", "100 %"))
    header = ("part", "weights", "bytes", "bits per weight of the model", "share")
    svg = divided_bar(title, [(part.part, part.stored_bits / 8) for part in weights.parts])
    words = f"{num_bytes(total / 8)} in all, {total / count:.3f} bits per weight, everything counted."
    return Section(
        "sizes", title, (Figure("Shares of the files", svg, Table(title, header, tuple(rows))), Paragraph(words))
    )


def _is_number(value: Any) -> bool:
    return is_of_kind(value, float)


def _is_step(value: Any) -> bool:
    return _is_number(value) and abs(value) < _STEPS


def _is_lost(value: Any) -> bool:
    return _is_number(value) and not math.isfinite(value)
