"""Output folders: what is in them, whose they are, and what is written beside every result."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitdistiller_peft._version import library_version
from bitdistiller_peft.cli.ranks import is_main_process
from bitdistiller_peft.cli.schema import SECTIONS
from bitdistiller_peft.cli.verb import Console, Settings
from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.jsonfile import read_object

RESOLVED = "resolved.yaml"
RESULT = "result.json"
_HEAD = "# bitdistiller "
_FREE = {"output", "device", "distill.resume", "distill.report_to", "distill.logging_steps", "distill.save_steps"}
"""Settings that may differ when a command is taken up again: they do not change what comes out."""


_MADE: list[Path] = []
"""Folders that this process made, the inner ones first."""


def resolved(settings: Settings, sections: Sequence[str]) -> dict[str, Any]:
    """All settings that a command depends on, nested as in YAML; the output folder is where they are written."""
    tree: dict[str, Any] = {}
    for name in sections:
        if name:
            values = settings.section(name)
            tree[name] = {key: values[key] for key in values if values[key] is not None}
        else:
            names = [option.name for option in SECTIONS[""].options if option.name != "output"]
            tree |= {key: settings[key] for key in names if settings[key] is not None}
    return tree


def resolved_text(settings: Settings, sections: Sequence[str], arguments: dict[str, Any] | None = None) -> str:
    """The YAML that is written beside a result, and works as --config."""
    from bitdistiller_peft.cli.yamlfile import dump_yaml

    words = "".join(f"\n#   {key}: {value}" for key, value in (arguments or {}).items() if value is not None)
    head = f"{_HEAD}{settings.verb}, bitdistiller_peft {library_version()}. Works as --config.{words}\n"
    return head + dump_yaml(resolved(settings, sections))


def begin(
    folder: Path, settings: Settings, sections: Sequence[str], arguments: dict[str, Any] | None = None
) -> dict[str, Any] | None:
    """Claim an output folder.

    Args:
        folder: new, empty, or left by the same command with the same settings, finished or not.
        settings: of the command.
        sections: those that the result depends on.
        arguments: what else it depends on.

    Returns:
        The result that stands there already, or `None` if there is work to do.

    Raises:
        ConfigError: the folder holds something else; nothing is overwritten.
        CheckpointError: the result that stands there is damaged.
    """
    if is_main_process():  # others would look while it writes
        check(folder, settings, sections, arguments)
    result = folder / RESULT
    if result.is_file():
        return read_object(result, "Delete it to run this command again.", allow_nan=True)
    if not settings.is_dry_run:
        _MADE.extend(path for path in (folder, *folder.parents) if not path.exists())
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / RESOLVED, resolved_text(settings, sections, arguments))
    return None


def withdraw() -> None:
    """Remove the folders that `begin` made in this process and that nothing was put into: no trace of a refusal."""
    for folder in _MADE:
        if folder.is_dir() and [file.name for file in folder.iterdir()] == [RESOLVED]:
            (folder / RESOLVED).unlink()
        with contextlib.suppress(OSError):  # something else is in it
            folder.rmdir()
    _MADE.clear()


def settled(
    folder: Path | None,
    settings: Settings,
    *,
    sections: Sequence[str],
    console: Console,
    arguments: dict[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Claim the output folder, if there is one, and say what there is to say where nothing is left to do.

    Args:
        folder: as for `begin`; `None` where nothing is written.
        settings: of the command.
        sections: those that the result depends on.
        console: is told that the result stands there already, or, on a dry run, what would be done.
        arguments: what else it depends on.

    Returns:
        What the command returns at once: the result that is there, or that of a dry run; `None` if there is work to do.

    Raises:
        ConfigError: the folder holds something else.
    """
    done = None if folder is None else begin(folder, settings, sections, arguments)
    if done is not None:
        console.say(f"{_DONE.get(settings.verb, 'done')} before: {folder}")
        return done
    if settings.is_dry_run:
        console.say(resolved_text(settings, sections, arguments))
        return {"dry_run": True, **(arguments or {"output": str(folder)})}
    return None


_DONE = {
    "calibrate": "calibrated",
    "generate": "generated",
    "cache": "cached",
    "eval": "evaluated",
    "compare": "compared",
}


def finish(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Write the result, last of all: its presence says that everything else is there."""
    write_atomically(folder / RESULT, json.dumps(result, indent=1, ensure_ascii=False, default=str) + "\n")
    return result


def check(folder: Path, settings: Settings, sections: Sequence[str], arguments: dict[str, Any] | None = None) -> None:
    """Refuse a folder that holds something else.

    Raises:
        ConfigError: it does; what differs is named.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"`output` must be a folder: got the file {str(folder)!r}.")
    if not any(folder.iterdir()):
        return
    there = folder / RESOLVED
    if not there.is_file():
        raise ConfigError(
            f"`output` must be a new or empty folder, or one of this command: got {str(folder)!r}, which holds other "
            "files. Choose another folder; nothing is overwritten."
        )
    from bitdistiller_peft.cli.yamlfile import read_yaml

    read_yaml(there)  # which says what is wrong with a damaged one
    before = there.read_text(encoding="utf-8")
    if before.startswith(_HEAD) and not any(file.is_file() and file != there for file in folder.rglob("*")):
        return  # claimed, but refused or stopped before anything was made: the settings may be mended
    text = resolved_text(settings, sections, arguments)
    differences = _differences(before, text, there)
    if differences:
        raise ConfigError(
            f"`output` must hold this very command's files, or nothing: in {str(folder)!r}, {'; '.join(differences)}. "
            "Choose another folder, or delete that one."
        )


def write_atomically(path: Path, text: str) -> None:
    """Write a file whole or not at all; of several processes, the first does."""
    if not is_main_process():
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _differences(was: str, now: str, path: Path) -> list[str]:
    """What two resolved files do not agree in: settings, and the arguments in their heads."""
    from bitdistiller_peft.cli.yamlfile import parse_yaml, plain

    before, after = ({**_flat(plain(parse_yaml(text, path))), **_head(text)} for text in (was, now))
    return [
        f"{key} was {before.get(key)!r}, is {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if key not in _FREE and before.get(key) != after.get(key)
    ]


def _head(text: str) -> dict[str, str]:
    lines = text.splitlines()
    verb = {"command": lines[0].split(",")[0].removeprefix(_HEAD)} if lines else {}
    words = [line.removeprefix("#   ").partition(": ") for line in lines if line.startswith("#   ")]
    return {**verb, **{key: value for key, _, value in words}}


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and key in SECTIONS:
            flat |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            flat[key] = value
    return flat
