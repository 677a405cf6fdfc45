"""`bitdistiller distill`: train the student, keep checkpoints, pack; what was stopped goes on."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from bitdistiller_peft.cli import checks, models, output, stages
from bitdistiller_peft.cli.packed import save_packed
from bitdistiller_peft.cli.ranks import is_main_process
from bitdistiller_peft.cli.texts import load_training_data
from bitdistiller_peft.cli.verb import Console, Settings, Verb
from bitdistiller_peft.errors import BitDistillerError, ConfigError

SECTIONS = ("", "quant", "distill")
OWN = ("data", "student", "pack", "resume")


def run(settings: Settings, console: Console) -> dict[str, Any]:
    """The verb, with the chain's folders where a YAML file names one."""
    return execute(stages.placed(settings, "distill"), console)


def execute(settings: Settings, console: Console) -> dict[str, Any]:
    """Train into `output`, the stage's own folder.

    Returns:
        Folders of the packed model and of the student, steps, the last log entry.

    Raises:
        KeyboardInterrupt: stopped by a signal, after a checkpoint was written.
    """
    settings.need("model")
    source = settings.need("distill.data")
    folder = Path(settings.need("output"))
    if settings["distill.student"] is None:
        checks.check_student(settings, console)
    else:  # its own config says how it is quantized
        models.check_source(settings.need("model"))
    training_arguments(settings, folder, models.choose_device(settings, console))
    if settings.is_dry_run:
        output.check(folder, settings, SECTIONS)
        console.say(output.resolved_text(settings, SECTIONS))
        return {"dry_run": True, "output": str(folder)}
    data = load_training_data(source)
    done = output.begin(folder, settings, SECTIONS)
    if done is not None:
        console.say(f"distilled before: {folder}")
        return done
    start = time.perf_counter()
    device = models.choose_device(settings, console)
    models.seed_all(settings)
    tokenizer = models.load_tokenizer(settings["model"], settings=settings)
    args = training_arguments(settings, folder, device)
    trainer = _train(settings, args, data, tokenizer)
    result = _report(trainer, folder, console) | {"seconds": time.perf_counter() - start}
    if settings["distill.pack"]:
        result |= save_packed(trainer.model, tokenizer, folder / "packed", console, settings)
    else:
        trainer.save_model(str(folder / "student"))  # all processes take part
        if is_main_process():
            tokenizer.save_pretrained(folder / "student")
        result["student"] = str(folder / "student")
        console.say(f"student: {folder / 'student'} (latent: not yet the quantized model)")
    return output.finish(folder, result)


def training_arguments(settings: Settings, folder: Path, device: str) -> Any:
    """The `DistillConfig` of `distill:`.

    Args:
        settings: for `distill:`.
        folder: of the stage.
        device: where to train.

    Raises:
        ConfigError: a setting that cannot work, by our own rules or by those of TRL and transformers.
    """
    from bitdistiller_peft.training import DistillConfig

    values = {key: v for key, v in settings.section("distill").items() if key not in OWN and v is not None}
    try:
        return DistillConfig(
            **{"use_cpu": device == "cpu", "report_to": "none", **values},
            output_dir=str(folder / "trainer"),
            seed=settings["seed"],
        )
    except BitDistillerError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"`distill` must hold settings that TRL's SFTConfig takes: {error}") from None


def _train(settings: Settings, args: Any, data: Any, tokenizer: Any) -> Any:
    from bitdistiller_peft.hub import stored_dtype
    from bitdistiller_peft.training import DistillTrainer

    student = settings["distill.student"]
    if not args.use_cpu and settings["dtype"] == "auto":  # loaded on the CPU, but not to be computed there
        settings = settings.with_values(dtype=stored_dtype(settings["model"], settings["revision"]))
    if student is None:
        model = models.build_student(settings, "cpu")  # the trainer moves it
    else:
        source = models.model_folder(student, prefer=("student",))
        model = models.load_any(source, settings, "cpu", key="distill.student", is_trainable=True)
    trainer = DistillTrainer(
        model, args, train_dataset=data, processing_class=tokenizer, callbacks=[_last_step_logged()]
    )
    checkpoints = Path(args.output_dir)
    try:
        trainer.train(resume_from_checkpoint="auto" if settings["distill.resume"] else None)
    except (KeyboardInterrupt, SystemExit):  # the trainer has saved before it left
        saved = newest_whole(checkpoints)
        words = "No checkpoint was written yet" if saved is None else f"Saved {saved}"
        raise KeyboardInterrupt(f"{words}; the same command goes on.") from None
    return trainer


def _last_step_logged() -> Any:
    """Logs what came after the last multiple of `logging_steps`, or of fewer steps than that."""
    from transformers import TrainerCallback

    class LastStepLogged(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_log |= state.global_step >= state.max_steps

    return LastStepLogged()


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint that is not damaged; without one, a run that was killed starts again.

    Args:
        folder: the trainer's output folder.
    """
    from bitdistiller_peft.training.checkpoints import damage_of

    whole = [path for path in folder.glob("checkpoint-*") if damage_of(path) is None]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _report(trainer: Any, folder: Path, console: Console) -> dict[str, Any]:
    """Keep what was logged, show its end, and say what the training doctor finds there."""
    from bitdistiller_peft.training import diagnose

    history = trainer.state.log_history
    lines = "".join(json.dumps(entry) + "\n" for entry in history)
    output.write_atomically(folder / "metrics.jsonl", lines)
    entries = [entry for entry in history if "loss" in entry]
    last = entries[-1] if entries else {}
    shown = [f"{key} {last[key]:.4g}" for key in ("loss", "forward_kl", "reverse_kl", "agreement") if key in last]
    console.say(f"{trainer.state.global_step} steps{': ' if shown else ''}{', '.join(shown)}")
    findings = diagnose(history, trainer.model)
    for finding in findings:
        console.say(finding)
    found = [finding.to_dict() for finding in findings]
    return {"steps": trainer.state.global_step, "gamma": trainer.gamma, "last": last, "findings": found}


VERB = Verb(
    "distill",
    "train the student on what its teacher says, and pack it",
    run,
    sections=SECTIONS,
    epilog="""
examples:
  bitdistiller distill --model MODEL --bits 2 --data out/data --student out/clip --output out/distilled
  bitdistiller distill -c run.yaml --learning-rate 8e-6

Every setting of DistillConfig, and so of TRL's SFTConfig, is one here: --help-all. Telemetry and reports are off
unless report_to names one.""",
)
