"""`bitdistiller eval`: perplexity with its protocol, and divergence from a teacher."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from bitdistiller_peft.cli import models, output, stages
from bitdistiller_peft.cli.options import Option
from bitdistiller_peft.cli.tables import markdown, table
from bitdistiller_peft.cli.texts import load_texts
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
    """Evaluate models, each on the same text.

    Args:
        settings: `output`, if there is one, is a folder of its own.
        console: gets the table.
        sources: folders or Hub names.
        teacher: measure the divergence of each from it; ``"self"`` for a student's own base.

    Returns:
        ``rows``, one per model, and ``protocol``.
    """
    texts = load_texts(settings.need("eval.text"), "evaluation")
    arguments = {"models": " ".join(sources), "teacher": teacher}
    folder = Path(settings["output"]) if settings["output"] else None
    done = output.settled(folder, settings, sections=SECTIONS, console=console, arguments=arguments)
    if done is not None:
        return done
    device = models.choose_device(settings, console)
    rows = [_evaluate(settings, device, texts, source, teacher) for source in sources]
    cells = [_cells(row) for row in rows]
    result = {"rows": rows, "protocol": rows[0]["perplexity"]["protocol"], "teacher": teacher}
    console.say(f"{table(HEADER, cells)}\n\nprotocol: {result['protocol']}")
    if folder is not None:
        text = f"{markdown(HEADER, cells)}\n\nProtocol: `{result['protocol']}`; KL in nats per token.\n"
        output.write_atomically(folder / "results.md", text)
        output.finish(folder, result)
    return result


def _evaluate(settings: Settings, device: str, texts: list[str], source: str, teacher: str | None) -> dict[str, Any]:
    from bitdistiller_peft.evaluation import evaluate_divergence, evaluate_perplexity

    values = settings.section("eval")
    how = {key: values[key] for key in ("seq_len", "max_chunks", "batch_size", "allow_latent")}
    model = models.load_any(source, settings, device, key="MODEL")
    tokenizer = models.load_tokenizer(*models.source_of_tokenizer(source, settings), teacher)
    text = texts[0] if len(texts) == 1 else texts
    row = {"model": source, "perplexity": asdict(evaluate_perplexity(model, tokenizer, text, **how))}
    if teacher is not None and teacher != source:
        other: Any = "self" if teacher == "self" else models.load_any(teacher, settings, device, key="teacher")
        row["divergence"] = asdict(evaluate_divergence(model, other, tokenizer, text, **how))
    return row


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
    "perplexity, and divergence from a teacher",
    run,
    sections=SECTIONS,
    positionals=(Positional("model", "folder or Hub name; default: what the chain of --config made", "?"),),
    own=(Option("teacher", "text", "measure KL and top-1 agreement with this model; 'self' for a student's base"),),
    epilog="example: bitdistiller eval out/distill/packed --text wikitext2 --teacher MODEL --output out/eval",
)
