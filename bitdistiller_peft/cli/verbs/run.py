"""`bitdistiller run`: the whole chain from one YAML file; a stage that is finished is not done again."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from bitdistiller_peft.cli import checks, models, output, stages
from bitdistiller_peft.cli.cost import recorded
from bitdistiller_peft.cli.schema import STAGES
from bitdistiller_peft.cli.scores import check_tasks
from bitdistiller_peft.cli.texts import evaluation_input, load_prompts, load_texts
from bitdistiller_peft.cli.verb import Console, Settings, Verb
from bitdistiller_peft.cli.verbs import cache, calibrate, distill, eval, export, generate, push, report
from bitdistiller_peft.errors import ConfigError, UnknownNameError

SECTIONS = ("", "quant", "calibrate", "generate", "cache", "distill", "eval", "export", "push", "run")


def run(settings: Settings, console: Console) -> dict[str, Any]:
    """Run the stages in order.

    Raises:
        ConfigError: a stage lacks a setting, or has one that cannot work; said before the first one starts.
    """
    chosen = _chosen(settings)
    root = Path(settings.need("output"))
    _check_all(settings, chosen)
    _check_values(settings, chosen, console)
    if settings.is_dry_run:
        console.say(output.resolved_text(settings, SECTIONS))
        for stage in chosen:
            if stage == "report":  # made again whenever something changed
                console.say(f"{stage:<12}{'to do':<10}{root / 'report.html'}")
                continue
            state = "finished" if (root / stage / output.RESULT).is_file() else "to do"
            console.say(f"{stage:<12}{state:<10}{root / stage}")
        return {"dry_run": True, "stages": chosen}
    _check_folder(root)
    root.mkdir(parents=True, exist_ok=True)
    output.write_atomically(root / output.RESOLVED, output.resolved_text(settings, SECTIONS))
    results: dict[str, Any] = {}
    for number, stage in enumerate(chosen, start=1):
        console.say(f"\n== {stage} ({number} of {len(chosen)}) ==")
        is_done = stage == "report" or (root / stage / output.RESULT).is_file()
        with nullcontext() if is_done else recorded(root, stage):
            results[stage] = _run_stage(settings, console, stage)
        gc.collect()  # the models of a stage are large
    found = stages.packed_folder(settings)
    console.say(f"\ndone: {found or root}")
    return {"stages": results, "packed": None if found is None else str(found)}


def _chosen(settings: Settings) -> list[str]:
    asked = list(settings["run.stages"])
    for stage in asked:
        if stage not in STAGES:
            raise UnknownNameError("run.stages", stage, STAGES)
    if "run.stages" not in settings.origins and stages.needs_cache(settings):
        asked.append("cache")
    return [stage for stage in STAGES if stage in asked]


def _check_all(settings: Settings, chosen: list[str]) -> None:
    """Everything that a later stage needs is asked for before the first one spends an hour."""
    settings.need("model")
    if "calibrate" in chosen:
        load_texts(settings.need("calibrate.texts"), "calibration")
    if "generate" in chosen:
        most = settings["generate.max_prompts"]
        load_prompts(settings.need("generate.prompts"), "text", has_template=False, max_prompts=most)
    if "distill" in chosen and "generate" not in chosen:
        settings.need("distill.data")
    _check_cache(settings, chosen)
    if "eval" in chosen:
        evaluation_input(settings)
        check_tasks(settings)
    if "export" in chosen:
        export.check_formats(settings)
    if "push" in chosen:
        settings.need("push.repo")
    if not {"distill", "calibrate"} & set(chosen) and stages.packed_folder(settings) is None:
        raise ConfigError(f"`run.stages` must make a model, or find one in `output`: got {chosen}. Add 'distill'.")


def _check_values(settings: Settings, chosen: list[str], console: Console) -> None:
    """Values that only the library's own classes can judge."""
    models.student_config(settings)
    if "generate" in chosen:
        checks.sampling(settings)
    if "calibrate" in chosen:
        checks.check_calibration(settings)
    if {"calibrate", "distill"} & set(chosen) and settings["distill.student"] is None:
        checks.check_student(settings, console)
    if "distill" in chosen:
        placed = stages.placed(settings.with_values(run__stages=chosen), "distill")  # a cache may have been added
        distill.training_arguments(placed, Path(placed["output"]), models.choose_device(settings, console))


def _check_cache(settings: Settings, chosen: list[str]) -> None:
    needed, is_there = stages.needs_cache(settings), (Path(settings["output"]) / "cache" / output.RESULT).is_file()
    if "cache" in chosen and not needed:
        raise ConfigError(
            "`run.stages` must not name 'cache' unless training asks for it: got distill.teacher="
            f"{settings['distill.teacher']!r}, distill.teacher_cache={settings['distill.teacher_cache']!r}. Set "
            "distill.teacher to 'cached' and leave teacher_cache out."
        )
    if "distill" in chosen and needed and "cache" not in chosen and not is_there:
        raise ConfigError(
            f"`run.stages` must name 'cache' for distill.teacher='cached': got {chosen}. Or give distill.teacher_cache."
        )


def _check_folder(root: Path) -> None:
    """The folder of a chain holds its own stages and nothing else that a run would not know."""
    if root.is_dir() and any(root.iterdir()) and not (root / output.RESOLVED).is_file():
        raise ConfigError(
            f"`output` must be a new or empty folder, or that of an earlier run: got {str(root)!r}, which holds other "
            "files. Choose another folder; nothing is overwritten."
        )


def _run_stage(settings: Settings, console: Console, stage: str) -> dict[str, Any]:
    placed = stages.placed(settings, stage)
    match stage:
        case "calibrate":
            makes_model = "distill" not in settings["run.stages"]
            return calibrate.execute(placed.with_values(calibrate__pack=True) if makes_model else placed, console)
        case "generate":
            return generate.execute(placed, console)
        case "cache":
            return cache.execute(placed, console)
        case "distill":
            return distill.execute(placed, console)
        case "eval":
            sources = [settings["model"], str(stages.packed_folder(settings))]
            return eval.execute(placed, console, sources, settings["model"])
        case "export":
            return export.execute(placed, console, str(stages.packed_folder(settings)))
        case "report":
            return report.execute(console, Path(settings["output"]), Path(settings["output"]))
        case _:
            return _push_once(settings, placed, console)


def _push_once(settings: Settings, placed: Settings, console: Console) -> dict[str, Any]:
    """Push, unless this very model was pushed there before."""
    source, folder = str(stages.packed_folder(settings)), Path(placed["output"])
    done = output.begin(folder, placed, ("push",), {"model": source})
    if done is not None:
        console.say(f"pushed before: {done.get('url')}")
        return done
    return output.finish(folder, push.execute(placed, console, source, settings["push.repo"]))


VERB = Verb(
    "run",
    "the whole chain from one YAML file; goes on where it stopped",
    run,
    sections=("",),
    dotted=("quant", "calibrate", "generate", "distill", "eval", "export", "push", "run"),
    epilog="""
examples:
  bitdistiller init run.yaml && bitdistiller run -c run.yaml
  bitdistiller run -c run.yaml --distill.learning-rate 8e-6 --output out/lower-rate

After a kill or Ctrl-C, the same command goes on: finished stages are kept; `generate`, `distill` and a
block-wise `calibrate` continue.""",
)
