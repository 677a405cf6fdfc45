"""`bitdistiller compare`: several models on the same text and tasks, every two of them paired."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bitdistiller_peft.cli import models, output, scores, stages
from bitdistiller_peft.cli.tables import markdown, table
from bitdistiller_peft.cli.texts import evaluation_input
from bitdistiller_peft.cli.verb import Console, Positional, Settings, Verb
from bitdistiller_peft.cli.verbs.eval import gallery, say_gallery
from bitdistiller_peft.errors import ConfigError

SECTIONS = ("", "eval")
HEADER = ("model", "evaluated as", "perplexity")
PAIR_HEADER = ("other - first", "of", "difference", "95 % interval", "perplexity ratio")
NO_DIFFERENCE = " (no difference shown)"


def run(settings: Settings, console: Console) -> dict[str, Any]:
    """Score every model on the same chunks and samples, and compare every two of them.

    Raises:
        ConfigError: fewer than two models, or one of them twice.
        DataError: tokenizers that cut the text differently.
    """
    sources: list[str] = settings.arguments["models"]
    if len(set(sources)) < 2 or len(set(sources)) < len(sources):
        raise ConfigError(f"`MODELS` must be two or more, each once: got {sources}. `bitdistiller eval` scores one.")
    if settings.origins.get("output") != stages.COMMAND_LINE:
        settings = settings.with_values(output=None)
    given = evaluation_input(settings)
    _check_pairs(settings, has_text=given[0] is not None)
    scores.check_tasks(settings)
    for source in sources:
        models.check_models(settings, MODELS=source)
    arguments = {"models": " ".join(sources)}
    folder = Path(settings["output"]) if settings["output"] else None
    done = output.settled(folder, settings, sections=SECTIONS, console=console, arguments=arguments)
    if done is not None:
        return done
    result = _compare(settings, console, given, sources)
    console.say("\n\n".join([*_tables(result, as_markdown=False), _method(result)]))
    say_gallery(console, result["rows"])
    if folder is not None:
        text = "\n\n".join([*_tables(result, as_markdown=True), _method(result)])
        output.write_atomically(folder / "results.md", f"{text}\n")
        output.finish(folder, result)
    return result


def _check_pairs(settings: Settings, *, has_text: bool) -> None:
    from bitdistiller_peft.evaluation.comparison import LEAST_PAIRS

    most = settings["eval.max_chunks"]
    if has_text and most is not None and most < LEAST_PAIRS:
        raise ConfigError(
            f"`max_chunks` must be at least {LEAST_PAIRS} for a comparison: got max_chunks={most!r}. An interval needs "
            "that many pairs."
        )


def _compare(
    settings: Settings, console: Console, given: tuple[Any, dict[str, Any]], sources: list[str]
) -> dict[str, Any]:
    from bitdistiller_peft.evaluation.comparison import METHOD, compare_results

    device = models.choose_device(settings, console)
    rows: list[dict[str, Any]] = []
    measured: dict[str, dict[str, Any]] = {"perplexity": {}, "tasks": {}}
    for source in sources:
        tokenizer = models.load_tokenizer(*models.source_of_tokenizer(source, settings), *sources, settings=settings)
        model = models.load_any(source, settings, device)
        found = {
            "perplexity": scores.perplexity_of(model, tokenizer, *given),
            "tasks": scores.tasks_of(model, tokenizer, settings),
        }
        found = {kind: scored for kind, scored in found.items() if scored is not None}
        for kind, scored in found.items():
            measured[kind][source] = scored
        row = {"model": source, **{kind: asdict(scored) for kind, scored in found.items()}}
        rows.append({**row, **gallery(settings, model, tokenizer, None)})
        del model  # before the next one is loaded
    seed = settings["seed"]
    pairs = [pair for results in measured.values() if results for pair in compare_results(results, seed=seed)]
    protocol = rows[0].get("perplexity", {}).get("protocol")
    return {"rows": rows, "pairs": [_pair(pair) for pair in pairs], "protocol": protocol, "method": METHOD}


def _pair(pair: Any) -> dict[str, Any]:
    from bitdistiller_peft.evaluation.comparison import NLL

    ratio = math.exp(pair.paired.difference) if pair.measure == NLL else None
    found = {**asdict(pair.paired), "significant": pair.paired.is_significant, "perplexity_ratio": ratio}
    return {"measure": pair.measure, "first": pair.first, "other": pair.other, **found}


def _tables(result: dict[str, Any], *, as_markdown: bool) -> list[str]:
    shape = markdown if as_markdown else table
    scored = [(row["model"], row["perplexity"]) for row in result["rows"] if "perplexity" in row]
    plain = [(model, found["state"], f"{found['perplexity']:,.3f}") for model, found in scored]
    parts = [shape(HEADER, plain) if plain else "", scores.task_table(result["rows"], as_markdown=as_markdown)]
    parts.append(shape(PAIR_HEADER, [_cells(pair) for pair in result["pairs"]]) if result["pairs"] else "")
    return [part for part in parts if part]


def _cells(pair: dict[str, Any]) -> tuple[str, ...]:
    interval = f"{pair['low']:+.4f} .. {pair['high']:+.4f}{'' if pair['significant'] else NO_DIFFERENCE}"
    ratio = "" if pair["perplexity_ratio"] is None else f"{pair['perplexity_ratio']:.4f}"
    names = f"{pair['other']} - {pair['first']}"
    return (names, pair["measure"], f"{pair['difference']:+.4f}", interval, ratio)


def _method(result: dict[str, Any]) -> str:
    return "\n".join([*([f"protocol: {result['protocol']}"] if result["protocol"] else []), result["method"]])


VERB = Verb(
    "compare",
    "several models on the same text and tasks, paired",
    run,
    sections=SECTIONS,
    positionals=(Positional("models", "folders or Hub names, two or more", "+"),),
    epilog="""
examples:
  bitdistiller compare MODEL out/clip/packed out/distill/packed --text wikitext2
  bitdistiller compare out/clip/packed out/distill/packed --tasks arc_easy""",
)
