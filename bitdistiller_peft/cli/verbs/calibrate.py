"""`bitdistiller calibrate`: fit a student to a calibration text; with --pack, that is all a packed model needs."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from bitdistiller_peft.cli import checks, models, output, stages
from bitdistiller_peft.cli.packed import save_packed
from bitdistiller_peft.cli.texts import load_texts
from bitdistiller_peft.cli.verb import Console, Settings, Verb

SECTIONS = ("", "quant", "calibrate")
BLOCKS = "blocks"


def run(settings: Settings, console: Console) -> dict[str, Any]:
    """The verb, with the chain's folders where a YAML file names one."""
    return execute(stages.placed(settings, "calibrate"), console)


def execute(settings: Settings, console: Console) -> dict[str, Any]:
    """Calibrate, and save the student.

    Args:
        settings: `output` is the stage's own folder.
        console: where to speak.

    Returns:
        Folder of the student, of the packed model if asked for, and the mean errors.
    """
    settings.need("model")
    checks.check_calibration(settings)
    needs_text = settings["calibrate.objective"] != "weight" or settings["calibrate.method"] == "blockwise"
    texts = load_texts(settings.need("calibrate.texts"), "calibration") if needs_text else None
    folder = Path(settings.need("output"))
    checks.check_student(settings, console)
    done = output.settled(folder, settings, sections=SECTIONS, console=console)
    if done is not None:
        return done
    try:
        result = output.finish(folder, _calibrate(settings, console, texts, folder))
    except KeyboardInterrupt:
        kept = "Finished blocks are kept; the" if settings["calibrate.method"] == "blockwise" else "The"
        raise KeyboardInterrupt(f"{kept} same command goes on.") from None
    shutil.rmtree(folder / BLOCKS, ignore_errors=True)  # only a run that was cut off needs them
    return result


def _calibrate(settings: Settings, console: Console, texts: list[str] | None, folder: Path) -> dict[str, Any]:
    from bitdistiller_peft.calibration import calibrate

    start = time.perf_counter()
    device = models.choose_device(settings, console)
    models.seed_all(settings)
    tokenizer = models.load_tokenizer(settings["model"], settings=settings)
    student = models.build_student(settings, device)
    values = settings.section("calibrate")
    found = calibrate(
        student,
        tokenizer,
        texts,
        method=values["method"],
        num_samples=values["num_samples"],
        seq_len=values["seq_len"],
        batch_size=values["batch_size"],
        show_progress=True,
        output_path=folder / "calibration.safetensors",
        resume_dir=folder / BLOCKS if values["method"] == "blockwise" else None,
        **checks.calibration_options(settings),
    )
    console.say(found)
    student.save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")
    result = {
        "student": str(folder / "student"),
        "method": values["method"],
        "seconds": time.perf_counter() - start,
        "data": dict(found.data),
    }
    if values["pack"]:
        result |= save_packed(student, tokenizer, folder / "packed", console, settings)
    else:
        console.say(f"\nstudent: {folder / 'student'} (latent: not yet the quantized model)")
    return result


VERB = Verb(
    "calibrate",
    "fit a student to a calibration text",
    run,
    sections=SECTIONS,
    epilog="""
examples:
  bitdistiller calibrate --model MODEL --bits 2 --group-size 64 --texts wikitext2 --output out/clip --pack
  bitdistiller calibrate -c run.yaml        the first stage of the chain

After a kill or Ctrl-C the same command goes on: --method blockwise with the first block that is missing.""",
)
