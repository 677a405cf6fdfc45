"""`bitdistiller cache`: let the teacher speak once about the training data; what was stopped goes on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from bitdistiller_peft.cli import models, output, stages
from bitdistiller_peft.cli.schema import DISTILL
from bitdistiller_peft.cli.texts import load_training_data
from bitdistiller_peft.cli.verb import Console, Settings, Verb
from bitdistiller_peft.errors import ConfigError

SECTIONS = ("", "cache", "distill")
DATA = {
    "data", "max_length", "packing", "packing_strategy", "padding_free", "truncation_mode", "dataset_text_field",
    "dataset_kwargs", "chat_template_path", "eos_token", "pad_token", "completion_only_loss", "assistant_only_loss",
}  # fmt: skip
"""Settings of `distill:` that decide which tokens there are; only they must be the same in training."""


def run(settings: Settings, console: Console) -> dict[str, Any]:
    """The verb, with the chain's folders where a YAML file names one."""
    return execute(stages.placed(settings, "cache"), console)


def execute(settings: Settings, console: Console) -> dict[str, Any]:
    """Ask the teacher, and write its answers into `output`, the stage's own folder.

    Returns:
        Folder, documents and bytes of the cache.

    Raises:
        DoesNotFitError: the disk has too little room; said before the first token is computed.
        KeyboardInterrupt: stopped; finished shards are kept.
    """
    source = settings.need("distill.data")
    _check(settings)
    folder = Path(settings.need("output"))
    others = {f"distill__{name}": None for name in settings.section("distill") if name not in DATA}
    settings = settings.with_values(**others)  # another learning rate is no reason to ask again
    done = output.settled(folder, settings, sections=SECTIONS, console=console)
    if done is not None:
        return done
    start = time.perf_counter()
    data = load_training_data(source)
    try:
        found = _ask(settings, console, data, folder)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("Finished shards are kept; the same command goes on.") from None
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    console.say(f"{len(found):,} documents, {size / 2**20:,.1f} MiB: {folder}")
    result = {"cache": str(folder), "documents": len(found), "bytes": size, "kind": found.layout.kind}
    return output.finish(folder, result | {"seconds": time.perf_counter() - start})


def _check(settings: Settings) -> None:
    """Refuse what settings alone can tell, before a model is loaded.

    Raises:
        ConfigError: no such model, or a number that cannot be.
    """
    models.check_source(settings.need("model"))
    if settings["cache.teacher"] is not None:
        models.check_source(settings["cache.teacher"], "cache.teacher")
    if settings["cache.batch_size"] < 1:
        raise ConfigError(f"`batch_size` must be at least 1: got batch_size={settings['cache.batch_size']!r}.")
    if "cache.k" in settings.origins and settings["cache.kind"] != "topk":
        raise ConfigError(
            f"`k` must be left out for kind={settings['cache.kind']!r}: got k={settings['cache.k']!r}. Hidden states "
            "give whole distributions; kind='topk' keeps the k likeliest tokens."
        )


def _ask(settings: Settings, console: Console, data: Any, folder: Path) -> Any:
    from bitdistiller_peft.training import DistillConfig, cache_teacher, prepare_dataset

    device = models.choose_device(settings, console)
    models.seed_all(settings)
    tokenizer = models.load_tokenizer(settings["model"], settings=settings)
    values = {key: v for key, v in settings.section("distill").items() if key != "data" and v is not None}
    args = DistillConfig(
        **values,
        output_dir=str(folder),
        use_cpu=device == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        seed=settings["seed"],
    )
    asked = settings["cache.teacher"]
    teacher = models.load_full_precision(settings if asked is None else settings.with_values(model=asked), device)
    prepared = prepare_dataset(teacher, args, data, tokenizer)
    return cache_teacher(
        teacher,
        tokenizer,
        prepared,
        folder,
        kind=settings["cache.kind"],
        k=settings["cache.k"],
        dtype=settings["cache.stored_dtype"],
        batch_size=settings["cache.batch_size"],
        tell=console.say,
    )


VERB = Verb(
    "cache",
    "let the teacher speak once, to disk; distill then needs no teacher in memory",
    run,
    sections=SECTIONS,
    hidden=tuple(DISTILL.key(option.name) for option in DISTILL.options if option.name not in DATA),
    epilog="""
examples:
  bitdistiller cache --model MODEL --data out/data --max-length 512 --output out/cache
  bitdistiller distill --model MODEL --data out/data --max-length 512 --teacher cached --teacher-cache out/cache ...
  bitdistiller cache -c run.yaml        a stage of the chain, where the file says `distill: {teacher: cached}`

The size is said first; exit code 4: the disk has too little room. After a kill or Ctrl-C the same command goes on.""",
)
