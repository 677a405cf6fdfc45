"""How the verbs of the chain find each other's folders, in `run` and one by one."""

from __future__ import annotations

from pathlib import Path

from bitdistiller_peft.cli.verb import Settings

COMMAND_LINE = "command line"


def placed(settings: Settings, stage: str) -> Settings:
    """The settings of one stage, with its own folder and those of the stages before it filled in.

    Where `output` comes from a YAML file, it is the folder of the whole chain, and a stage writes to a folder of its
    own in it; so `bitdistiller calibrate -c run.yaml` does what that stage of `bitdistiller run -c run.yaml` does. With
    ``--output`` on the command line, that is the stage's folder.

    Args:
        settings: of the chain, or of the stage alone.
        stage: name of the stage.
    """
    if settings["output"] is None or (settings.origins.get("output") == COMMAND_LINE and settings.verb != "run"):
        return settings
    root = Path(settings["output"])
    changes: dict[str, object] = {"output": str(root / stage)}
    planned = settings["run.stages"] if settings.verb == "run" else ()
    for key, before in _inputs(settings, stage).items():
        if settings[key] is None and (before in planned or (root / before / "result.json").is_file()):
            changes[key.replace(".", "__")] = str(root / before)
    moved = settings.with_values(**changes)
    moved.verb = stage
    return moved


def _inputs(settings: Settings, stage: str) -> dict[str, str]:
    """What a stage takes from the stages before it: setting to stage."""
    match stage:
        case "cache":
            return {"distill.data": "generate"}
        case "distill":
            cached = {"distill.teacher_cache": "cache"} if needs_cache(settings) else {}
            return {"distill.student": "calibrate", "distill.data": "generate", **cached}
    return {}


def needs_cache(settings: Settings) -> bool:
    """Whether training asks a cached teacher, and no folder is named that has its answers."""
    return settings["distill.teacher"] == "cached" and settings["distill.teacher_cache"] is None


def packed_folder(settings: Settings) -> Path | None:
    """The packed model that the chain has made so far, if there is one."""
    if settings["output"] is None:
        return None
    root = Path(settings["output"])
    folders = [root / stage / "packed" for stage in ("distill", "calibrate")]
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)
