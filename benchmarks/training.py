"""What training costs: memory of the loss, time of a step, fidelity of teachers that are not there.

    python -m benchmarks.training loss
    python -m benchmarks.training steps --model FOLDER
    python -m benchmarks.training teachers --model FOLDER [--text NAME=FILE ...]

`loss`: peak memory of the loss above its inputs, each in a process of its own, beside the textbook formula and TRL's
chunked kernel. `steps`: one optimizer step of 2,048 tokens, on one thread, of the same model plainly fine-tuned in
full, as a student, and with each teacher; all in one process, in turn, and compared as the median ratio of a round, in
CPU time, since the machine may be shared. `teachers`: how far the gradients of a cached teacher are from the live
one's, and how far a teacher in few bits is from the full one, on a short passage and on the beginnings of texts.

Results are written as they come, each part among the others'. A run goes on where the last one ended; `--fresh`
measures its part anew.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import _training_loss as loss_part
from benchmarks import _training_steps as steps_part
from benchmarks import _training_teachers as teachers_part
from benchmarks._results import RESULTS, table, write_results

NAME = "training"


def known() -> dict[str, Any]:
    """The rows and figures of earlier runs."""
    path = RESULTS / f"{NAME}.cpu.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": [], "figures": {}}


def rows_of(part: str) -> list[dict[str, Any]]:
    """What an earlier run of a part has measured."""
    rows = [row for row in known()["rows"] if row["part"] == part]
    return [{key: value for key, value in row.items() if key != "part"} for row in rows]


def save(part: str, rows: list[dict[str, Any]], figures: dict[str, Any]) -> Path:
    """Write the rows and figures of a part, among those of the others."""
    before = known()
    others = [row for row in before["rows"] if row["part"] != part]
    kept = {name: value for name, value in before["figures"].items() if not name.startswith(f"{part}:")}
    new = {f"{part}: {name}": value for name, value in figures.items()}
    return write_results(NAME, [*others, *({"part": part, **row} for row in rows)], {**kept, **new})


def main() -> None:
    """Run one part and write its results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training")
    parser.add_argument("part", choices=["loss", "steps", "teachers"])
    parser.add_argument("--model", type=Path, help="folder of a causal language model")
    parser.add_argument("--fresh", action="store_true", help="measure the part anew")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each kind (part steps)")
    parser.add_argument("--text", nargs="*", default=[], metavar="NAME=FILE", help="also on these (part teachers)")
    args = parser.parse_args()
    if args.part != "loss" and args.model is None:
        parser.error("--model is needed")
    rows = [] if args.fresh else rows_of(args.part)
    match args.part:
        case "loss":
            runs, figures_of = loss_part.run(rows), loss_part.figures
        case "steps":
            runs, figures_of = steps_part.run(args.model, args.rounds, rows), steps_part.figures
        case _:
            runs, figures_of = (
                teachers_part.run(args.model, teachers_part.texts_of(args.text), rows),
                teachers_part.figures,
            )
    for new in runs:
        rows += new
        save(args.part, rows, figures_of(rows))
    figures = figures_of(rows)
    print(table(rows))
    for name, entry in figures.items():
        print(f"{name}: {entry['value']:.4g} {entry['unit']}, asked {entry['asked'] or 'nothing'}")
    print(save(args.part, rows, figures))


if __name__ == "__main__":
    main()
