"""`bitdistiller eval`: perplexity with its protocol, divergence from a teacher, and standard tasks."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from bitdistiller_peft.cli import models, output, scores, stages
from bitdistiller_peft.cli.options import Option
from bitdistiller_peft.cli.tables import markdown, table
from bitdistiller_peft.cli.texts import evaluation_input
from bitdistiller_peft.cli.verb import Console, Positional, Settings, Verb
from bitdistiller_peft.errors import ConfigError

SECTIONS = ("", "eval")
HEADER = ("model", "evaluated as", "perplexity", "KL mean", "KL 95 %", "top-1")


def run(settings: Settings, console: Console) -> dict[str, Any]:
    """Evaluate the model that was named, or the one that the chain has made."""
    source, teacher = settings.arguments["model"], settings.arguments["teacher"]
    if source is None:
        found = stages.packed_folder(settings)
        if found is None:
            raise ConfigError("`MODEL` must be given, or `output` in the file of --config hold a packed model.")
        source, teacher = str(found), teacher or settings["model"]
        settings = stages.placed(settings, "eval")
    elif settings.origins.get("output") != stages.COMMAND_LINE:
        settings = settings.with_values(output=None)  # that of the file is the chain's
    return execute(settings, console, [source], teacher)


def execute(settings: Settings, console: Console, sources: list[str], teacher: str | None) -> dict[str, Any]:
    """Evaluate models, each on the same text and the same tasks.

    Args:
        settings: `output`, if there is one, is a folder of its own.
        console: gets the table.
        sources: folders or Hub names.
        teacher: measure the divergence of each from it; ``"self"`` for a student's own base.

    Returns:
        ``rows``, one per model, and the ``protocol`` of the perplexities, `None` without a text.
    """
    text, how = evaluation_input(settings)
    scores.check_tasks(settings)
    for source in sources:
        models.check_models(settings, MODEL=source, teacher=teacher)
    arguments = {"models": " ".join(sources), "teacher": teacher}
    folder = Path(settings["output"]) if settings["output"] else None
    done = output.settled(folder, settings, sections=SECTIONS, console=console, arguments=arguments)
    if done is not None:
        return done
    device = models.choose_device(settings, console)
    rows, tasks = [], []
    for source in sources:
        row, scored = _evaluate(settings, device, (text, how), source, teacher)
        rows.append(row)
        tasks.append(scored)
    result = {"rows": rows, "protocol": rows[0].get("perplexity", {}).get("protocol"), "teacher": teacher}
    _say(console, result)
    say_gallery(console, rows)
    if folder is not None:
        scores.save_eval_results(folder, tasks)
        output.write_atomically(folder / "results.md", _as_markdown(result))
        output.finish(folder, result)
    return result


def _evaluate(
    settings: Settings, device: str, given: tuple[Any, dict[str, Any]], source: str, teacher: str | None
) -> tuple[dict[str, Any], Any]:
    """The row of a model, and its scores on tasks."""
    from bitdistiller_peft.evaluation import evaluate_divergence

    text, how = given
    model = models.load_any(source, settings, device, key="MODEL")
    tokenizer = models.load_tokenizer(*models.source_of_tokenizer(source, settings), teacher, settings=settings)
    perplexity = scores.perplexity_of(model, tokenizer, text, how)
    row = {"model": source} | ({} if perplexity is None else {"perplexity": asdict(perplexity)})
    other: Any = None
    if teacher is not None and teacher != source:
        other = "self" if teacher == "self" else models.load_any(teacher, settings, device, key="teacher")
        if text is not None:
            row["divergence"] = asdict(evaluate_divergence(model, other, tokenizer, text, **how))
    if other is not None or teacher is None:
        row |= gallery(settings, model, tokenizer, other)
    del other
    tasks = scores.tasks_of(model, tokenizer, settings)
    return row | ({} if tasks is None else {"tasks": tasks.as_dict()}), tasks


def _say(console: Console, result: dict[str, Any]) -> None:
    if result["protocol"] is not None:
        cells = [_cells(row) for row in result["rows"]]
        console.say(f"{table(HEADER, cells)}\n\nprotocol: {result['protocol']}")
    tasks = scores.task_table(result["rows"])
    if tasks:
        console.say(f"\n{tasks}")


def _as_markdown(result: dict[str, Any]) -> str:
    parts = []
    if result["protocol"] is not None:
        cells = [_cells(row) for row in result["rows"]]
        parts.append(f"{markdown(HEADER, cells)}\n\nProtocol: `{result['protocol']}`; KL in nats per token.\n")
    tasks = scores.task_table(result["rows"], as_markdown=True)
    return "\n".join([*parts, *([f"{tasks}\n"] if tasks else [])])


def gallery(settings: Settings, model: Any, tokenizer: Any, teacher: Any) -> dict[str, Any]:
    """The entry of a row with greedy answers to the fixed prompts; empty where none are asked for.

    Args:
        settings: `eval.gallery`, the tokens that an answer may take.
        model: what answers.
        tokenizer: its tokenizer.
        teacher: answers too; a model, ``"self"`` or `None`.
    """
    from bitdistiller_peft.evaluation import generate_gallery

    if not settings["eval.gallery"]:
        return {}
    latent = settings["eval.allow_latent"]
    found = generate_gallery(
        model, tokenizer, teacher=teacher, max_new_tokens=settings["eval.gallery"], allow_latent=latent
    )
    return {"gallery": {**asdict(found), "num_collapsed": found.num_collapsed, "num_lost_ends": found.num_lost_ends}}


def say_gallery(console: Console, rows: list[dict[str, Any]]) -> None:
    """One line per model that wrote a gallery; the answers themselves are in the result and in `report`."""
    for row in rows:
        if "gallery" in row:
            found = row["gallery"]
            words = f"{found['num_collapsed']} of {len(found['entries'])} greedy answers collapsed"
            lost = f", {found['num_lost_ends']} do not end where the teacher's do" if found["teacher_state"] else ""
            console.say(f"{row['model']}: {words}{lost}")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    scored, distance = row["perplexity"], row.get("divergence")
    if distance is None:
        return (row["model"], scored["state"], f"{scored['perplexity']:,.3f}", "", "", "")
    return (
        row["model"],
        scored["state"],
        f"{scored['perplexity']:,.3f}",
        f"{distance['mean_kl_nats']:.4f}",
        f"{distance['p95_kl_nats']:.4f}",
        f"{distance['top1_agreement']:.1%}",
    )


VERB = Verb(
    "eval",
    "perplexity, divergence from a teacher, tasks",
    run,
    sections=SECTIONS,
    positionals=(Positional("model", "folder or Hub name; default: what the chain of --config made", "?"),),
    own=(Option("teacher", "text", "measure KL and top-1 agreement with this model; 'self' for a student's base"),),
    epilog="""
examples:
  bitdistiller eval out/distill/packed --text wikitext2 --teacher MODEL --output out/eval
  bitdistiller eval out/distill/packed --tasks arc_easy gsm8k --limit 200""",
)
