"""`bitdistiller compare`: several models on the same text, each paired with the first."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from bitdistiller_peft.cli import models, output, stages
from bitdistiller_peft.cli.statistics import paired_difference
from bitdistiller_peft.cli.tables import markdown, table
from bitdistiller_peft.cli.texts import load_texts
from bitdistiller_peft.cli.verb import Console, Positional, Settings, Verb
from bitdistiller_peft.errors import ConfigError

SECTIONS = ("", "eval")
HEADER = ("model", "evaluated as", "perplexity", "nats - first", "95 % interval", "perplexity / first")


def run(settings: Settings, console: Console) -> dict[str, Any]:
    """Score every model on the same chunks and compare each with the first one.

    Raises:
        ConfigError: fewer than two models, or tokenizers that cut the text differently.
    """
    sources: list[str] = settings.arguments["models"]
    if len(sources) < 2:
        raise ConfigError(f"`MODELS` must be two or more: got {sources}. `bitdistiller eval` scores one.")
    if settings.origins.get("output") != stages.COMMAND_LINE:
        settings = settings.with_values(output=None)
    texts = load_texts(settings.need("eval.text"), "evaluation")
    arguments = {"models": " ".join(sources)}
    folder = Path(settings["output"]) if settings["output"] else None
    done = output.settled(folder, settings, sections=SECTIONS, console=console, arguments=arguments)
    if done is not None:
        return done
    result = _compare(settings, console, texts, sources)
    cells = [_cells(row) for row in result["rows"]]
    console.say(f"{table(HEADER, cells)}\n\nprotocol: {result['protocol']}\n{result['method']}")
    if folder is not None:
        text = f"{markdown(HEADER, cells)}\n\nProtocol: `{result['protocol']}`. {result['method']}\n"
        output.write_atomically(folder / "results.md", text)
        output.finish(folder, result)
    return result


def _compare(settings: Settings, console: Console, texts: list[str], sources: list[str]) -> dict[str, Any]:
    from bitdistiller_peft.evaluation import evaluate_perplexity

    values = settings.section("eval")
    how = {key: values[key] for key in ("seq_len", "max_chunks", "batch_size", "allow_latent")}
    device = models.choose_device(settings, console)
    text = texts[0] if len(texts) == 1 else texts
    rows: list[dict[str, Any]] = []
    for source in sources:
        tokenizer = models.load_tokenizer(*models.source_of_tokenizer(source, settings), *sources)
        scored = asdict(evaluate_perplexity(models.load_any(source, settings, device), tokenizer, text, **how))
        rows.append({"model": source, **scored})
        if scored["protocol"] != rows[0]["protocol"]:
            raise ConfigError(
                f"models must be compared on the same tokens: {sources[0]} was measured as {rows[0]['protocol']}, "
                f"{source} as {scored['protocol']}. Their tokenizers differ."
            )
        if len(rows) > 1:
            paired = paired_difference(rows[0]["chunk_nll_nats"], scored["chunk_nll_nats"], seed=settings["seed"])
            is_real = paired.is_significant
            rows[-1]["paired"] = {**asdict(paired), "ratio": paired.perplexity_ratio, "significant": is_real}
    method = "Paired by chunk with the first model; percentile bootstrap over chunks, 10,000 resamples."
    return {"rows": rows, "protocol": rows[0]["protocol"], "method": method}


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    head = (row["model"], row["state"], f"{row['perplexity']:,.3f}")
    paired = row.get("paired")
    if paired is None:
        return (*head, "", "", "")
    mark = "" if paired["significant"] else " (no difference shown)"
    interval = f"{paired['low']:+.4f} .. {paired['high']:+.4f}{mark}"
    return (*head, f"{paired['difference']:+.4f}", interval, f"{paired['ratio']:.4f}")


VERB = Verb(
    "compare",
    "several models on the same text, paired",
    run,
    sections=SECTIONS,
    positionals=(Positional("models", "folders or Hub names; the first is compared with", "+"),),
    epilog="example: bitdistiller compare MODEL out/clip/packed out/distill/packed --text wikitext2",
)
