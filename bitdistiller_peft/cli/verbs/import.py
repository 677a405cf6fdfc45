"""`bitdistiller import`: take over a model that another tool quantized, with its very codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitdistiller_peft.cli import models, output
from bitdistiller_peft.cli.verb import Console, Positional, Settings, Verb
from bitdistiller_peft.errors import ConfigError

SECTIONS = ("",)


def run(settings: Settings, console: Console) -> dict[str, Any]:
    """Write the packed model and, over a base model, the student that `distill` goes on with.

    Args:
        settings: `model`, if given, is the full-precision model that was quantized.
        console: gets the summary.

    Returns:
        Folders of the packed model and of the student.

    Raises:
        ForeignModelError: no grid of ours holds the model; with what would work.
        CheckpointError: its files are damaged.
    """
    from bitdistiller_peft.hub import quant_summary
    from bitdistiller_peft.importing import import_model

    source, folder = settings.arguments["source"], Path(settings.need("output"))
    done = output.begin(folder, settings, SECTIONS, {"source": source})
    if done is not None:
        console.say(f"imported before: {folder}")
        return done
    if settings.is_dry_run:
        console.say(f"{source} -> {folder}")
        return {"dry_run": True, "output": str(folder)}
    student = import_model(source, settings["model"], dtype=settings["dtype"], revision=settings["revision"])
    tokenizer = _tokenizer(source, settings["model"], console)
    result: dict[str, Any] = {"source": source}
    if settings["model"] is not None:
        student.save_pretrained(folder / "student")
        _save(tokenizer, folder / "student")
        result["student"] = str(folder / "student")
        console.say(f"student: {folder / 'student'} (for bitdistiller distill --student {folder})")
    packed = student.pack_and_unload()
    _save(tokenizer, folder / "packed")
    packed.save_pretrained(folder / "packed")  # last: it writes the manifest
    console.say(f"\n{quant_summary(packed)}\npacked model: {folder / 'packed'}")
    return output.finish(folder, result | {"packed": str(folder / "packed")})


def _tokenizer(source: str, base: str | None, console: Console) -> Any:
    """The tokenizer of the source or of its base; GGUF files often stand alone."""
    try:
        return models.load_tokenizer(None if source.endswith(".gguf") else source, base)
    except ConfigError:
        console.note("no tokenizer found beside the model: copy one into the folder.")
        return None


def _save(tokenizer: Any, folder: Path) -> None:
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


VERB = Verb(
    "import",
    "take over a model that another tool quantized",
    run,
    sections=SECTIONS,
    positionals=(Positional("source", "folder, .gguf file or Hub name: GPTQ, AWQ, compressed-tensors, NF4, GGUF"),),
    hidden=("device", "seed"),
    epilog="""
examples:
  bitdistiller import user/Model-GPTQ --output out/import                  a packed model
  bitdistiller import user/Model-GPTQ --model user/Model --output out/import
  bitdistiller distill --model user/Model --student out/import --data out/data --output out/healed""",
)
