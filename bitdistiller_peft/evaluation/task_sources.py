"""Which tasks lm-evaluation-harness is given, and where their data comes from: the Hub, or files on this machine."""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from bitdistiller_peft.errors import ConfigError, DataError

READERS = {"json": ("json", "jsonl"), "csv": ("csv",), "parquet": ("parquet",)}
"""Readers of `datasets`, and the endings that they read; ``.gz`` may follow."""


@contextmanager
def open_tasks(
    tasks: Sequence[str], *, task_folder: Path | None, data_folder: Path | None, allow_code_execution: bool
) -> Iterator[tuple[Any, list[str]]]:
    """Find tasks, and refuse what cannot or must not run, before any data is read.

    Args:
        tasks: names of tasks, groups or tags.
        task_folder: a folder with task files (YAML) besides lm-eval's own.
        data_folder: a folder with the data of every task; see `evaluate_tasks`.
        allow_code_execution: whether tasks may run what the model writes.

    Yields:
        lm-eval's task manager, and what to load from it.

    Raises:
        ConfigError: an unknown task, a folder that does not exist, or a task that runs code without leave.
        DataError: a task without files in `data_folder`.
    """
    for name, folder in (("task_folder", task_folder), ("data_folder", data_folder)):
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"`{name}` must be a folder that exists: got {name}={str(folder)!r}.")
    manager, leaves = _find(tasks, task_folder)
    if not allow_code_execution:
        _refuse_code(leaves)
    if data_folder is None:
        yield manager, list(tasks)
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield manager, [_redirected(*leaf, data_folder, Path(temporary)) for leaf in leaves.items()]


def _find(tasks: Sequence[str], task_folder: Path | None) -> tuple[Any, dict[str, Any]]:
    """A manager that knows all tasks, and lm-eval's entry of each single task by name."""
    from lm_eval.tasks import TaskManager

    if task_folder is not None:  # lm-eval's own tasks are many: 14,000 names, read only if they are needed
        manager = TaskManager(include_path=str(task_folder), include_defaults=False)
        leaves = _leaves(manager.task_index, tasks)
        if all(leaves.values()):
            return manager, leaves
    manager = TaskManager(include_path=str(task_folder)) if task_folder is not None else _own_tasks()
    leaves = _leaves(manager.task_index, tasks)
    unknown = [name for name, entry in leaves.items() if entry is None]
    if unknown:
        near = difflib.get_close_matches(unknown[0], manager.all_tasks, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else " `lm_eval ls tasks` lists all."
        raise ConfigError(f"`tasks` must be names that lm-eval knows: got {unknown[0]!r}.{hint}")
    return manager, leaves


@cache
def _own_tasks() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _leaves(index: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Single tasks under names of tasks, groups and tags; `None` for a name that is not there."""
    found: dict[str, Any] = {}
    for name in names:
        entry: Any = index.get(name)
        match None if entry is None else entry.kind.name:
            case "GROUP":
                found |= _leaves(index, [_member(member) for member in entry.cfg["task"]])
            case "TAG":
                found |= _leaves(index, sorted(entry.tags))
            case _:
                found[name] = entry
    return found


def _member(member: str | dict[str, Any]) -> str:
    return member if isinstance(member, str) else str(member.get("group") or member.get("task"))


def _refuse_code(leaves: dict[str, Any]) -> None:
    for name, entry in leaves.items():
        if (entry.cfg or {}).get("unsafe_code"):
            raise ConfigError(
                f"`tasks` must not run what a model writes unless you allow it: got {name!r}, which runs the model's "
                "programs on this machine with your rights. In a container, or where nothing can be harmed, pass "
                "allow_code_execution=True."
            )


def _redirected(name: str, entry: Any, data_folder: Path, temporary: Path) -> str:
    """A task file that is lm-eval's own but for the place of its data; returns its path."""
    import yaml

    reader, files = _data_files(name, data_folder / name)
    content = {
        "include": str(entry.yaml_path),
        "dataset_path": reader,
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
    }
    path = temporary / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)


def _data_files(name: str, folder: Path) -> tuple[str, dict[str, str]]:
    """The reader of a task's files, and the file of every split."""
    readers = {ending: reader for reader, endings in READERS.items() for ending in endings}
    found: dict[str, tuple[str, str]] = {}
    for file in sorted(folder.glob("*")):
        split, _, ending = file.name.partition(".")
        reader = readers.get(ending.removesuffix(".gz"))
        if reader is not None:
            found[split] = (reader, str(file.resolve()))
    kinds = {reader for reader, _ in found.values()}
    if len(kinds) != 1:
        what = "files of several kinds" if kinds else "none"
        raise DataError(
            f"`data_folder` must hold the splits of {name!r} as files of one kind, {folder.name}/test.jsonl and so on: "
            f"got {what} in {str(folder)!r}. Endings: .json, .jsonl, .csv, .parquet, and .gz behind them."
        )
    return kinds.pop(), {split: path for split, (_, path) in found.items()}
