"""`bitdistiller report`: one page about a run, as HTML that needs nothing else, and as Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitdistiller_peft.cli import stages
from bitdistiller_peft.cli.options import Option
from bitdistiller_peft.cli.verb import Console, Positional, Settings, Verb
from bitdistiller_peft.errors import ConfigError


def run(settings: Settings, console: Console) -> dict[str, Any]:
    """Report on the folder that was named, or on the chain of --config.

    Raises:
        ConfigError: no folder, or one that holds nothing to report on.
        CheckpointError: a file in it is damaged.
    """
    named, output = settings.arguments["folder"], settings["output"]
    is_chain = settings.origins.get("output") != stages.COMMAND_LINE
    source = named or (output if is_chain else None)
    if source is None:
        raise ConfigError("`FOLDER` must be given, or `output` in the file of --config.")
    target = Path(source) if output is None or is_chain else Path(output)
    base = settings["model"] if settings.origins.get("model") == stages.COMMAND_LINE else None
    if settings.is_dry_run:
        return _dry_run(console, Path(source), target, base)
    return execute(console, Path(source), target, base=base, weight=settings.arguments["weight"])


def execute(
    console: Console, source: Path, target: Path, *, base: str | None = None, weight: str | None = None
) -> dict[str, Any]:
    """Write the report.

    Args:
        console: is told what was written and what is missing.
        source: folder of a chain, of a stage, or of a packed model.
        target: folder for ``report.html`` and ``report.md``.
        base: the full-precision model; the packed one names its own.
        weight: matrix whose histogram is shown.

    Returns:
        Both paths, and the sections that lack their data.
    """
    from bitdistiller_peft.report import write_report

    written = write_report(source, target, base=base, weight=weight)
    console.say(f"{'reported before' if written.was_there else 'report'}: {written.html}")
    if written.missing:
        console.say(f"without data: {', '.join(written.missing)} (the report says which command makes them)")
    return {"html": str(written.html), "markdown": str(written.markdown), "missing": list(written.missing)}


def _dry_run(console: Console, source: Path, target: Path, base: str | None) -> dict[str, Any]:
    from bitdistiller_peft.report.find import find

    found = find(source, base)
    console.say(f"{source}: {', '.join(found.stages) or 'no stage'}; packed model: {found.packed or 'none'}")
    console.say(f"full precision: {found.base or 'not on this machine'}; would write to {target}")
    return {"dry_run": True, "folder": str(source), "output": str(target), "stages": list(found.stages)}


VERB = Verb(
    "report",
    "one page about a run: scores, curves, weights, sizes, answers",
    run,
    sections=("",),
    positionals=(Positional("folder", "of a chain, a stage, or a packed model; default: the chain of --config", "?"),),
    own=(Option("weight", "text", "matrix whose histogram is shown; default: the one with the largest error"),),
    hidden=("revision", "device", "dtype", "seed"),
    epilog="""
examples:
  bitdistiller report runs/run               writes report.html and report.md there
  bitdistiller report runs/run/distill/packed --model BASE --output out

The HTML file is all of it: no script, nothing from the network. Weights are read one matrix at a time.""",
)
