"""`bitdistiller generate`: let the full-precision teacher answer prompts; goes on where it was stopped."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from bitdistiller_peft.cli import checks, models, output, stages
from bitdistiller_peft.cli.texts import load_prompts
from bitdistiller_peft.cli.verb import Console, Settings, Verb

SECTIONS = ("", "generate")


def run(settings: Settings, console: Console) -> dict[str, Any]:
    """The verb, with the chain's folders where a YAML file names one."""
    return execute(stages.placed(settings, "generate"), console)


def execute(settings: Settings, console: Console) -> dict[str, Any]:
    """Generate into `output`, the stage's own folder.

    Returns:
        Folder, number of rows and of tokens, and how many answers were cut off.
    """
    values = settings.section("generate")
    load_prompts(settings.need("generate.prompts"), "text", has_template=False, max_prompts=values["max_prompts"])
    models.check_source(settings.need("model"))
    sampling = checks.sampling(settings)
    folder = Path(settings.need("output"))
    done = output.settled(folder, settings, sections=SECTIONS, console=console)
    if done is not None:
        return done
    start = time.perf_counter()
    device = models.choose_device(settings, console)
    tokenizer = models.load_tokenizer(settings["model"], settings=settings)
    prompts = load_prompts(
        values["prompts"],
        values["prompt_format"],
        has_template=bool(tokenizer.chat_template),
        max_prompts=values["max_prompts"],
    )
    console.note(
        f"{len(prompts)} prompts, {'messages to answer' if isinstance(prompts[0], list) else 'texts to continue'}"
    )
    rows = _generate(settings, device, tokenizer, prompts, folder, sampling)
    result = {
        "data": str(folder),
        "rows": len(rows),
        "tokens": sum(rows["num_tokens"]),
        "cut_off": sum(reason == "length" for reason in rows["finish_reason"]),
        "seconds": time.perf_counter() - start,
    }
    console.say(f"{result['rows']} answers, {result['tokens']:,} tokens, {result['cut_off']} cut off: {folder}")
    return output.finish(folder, result)


def _generate(
    settings: Settings, device: str, tokenizer: Any, prompts: list[Any], folder: Path, sampling: dict[str, Any]
) -> Any:
    from bitdistiller_peft.training import generate_teacher_data

    model = models.load_full_precision(settings, device)
    try:
        return generate_teacher_data(model, tokenizer, prompts, output_dir=folder, seed=settings["seed"], **sampling)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("Finished batches are kept; the same command goes on.") from None


VERB = Verb(
    "generate",
    "let the teacher write training data",
    run,
    sections=SECTIONS,
    epilog="example: bitdistiller generate --model MODEL --prompts prompts.txt --output out/data",
)
