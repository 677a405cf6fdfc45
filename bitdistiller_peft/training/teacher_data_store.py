"""A folder that survives being killed: rows are appended batch by batch, and a manifest says what they are rows of.

- ``manifest.json``: what was asked for and of whom; written first, atomically.
- ``teacher_data.part.jsonl``: the rows so far; every batch is one write and one fsync.
- ``teacher_data.jsonl``: the same file under its final name, once it is complete.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitdistiller_peft.errors import CheckpointError, ConfigError, StateError
from bitdistiller_peft.hub.atomic import sync, write_text
from bitdistiller_peft.jsonfile import Kinds, check_entries, is_of_kind, read_object, strict_json

MANIFEST_NAME = "manifest.json"
PART_NAME = "teacher_data.part.jsonl"
DATA_NAME = "teacher_data.jsonl"
MANIFEST_VERSION = 1
_DELETE = "Delete the folder and start again."
_ROW: dict[str, Kinds] = {
    **dict.fromkeys(("prompt", "completion"), (str, list)),
    "num_tokens": int,
    "finish_reason": str,
    "prompt_id": int,
}

Row = dict[str, Any]


class TeacherDataStore:
    """Rows in memory and, if there is a folder, on disk.

    Args:
        folder: where to write; `None` keeps the rows in memory alone.
        identity: what the rows depend on: settings, fingerprints, number of prompts. Plain values.
        provenance: what else is worth knowing about them; noted for every start.
        window: rows that are generated together; a window that is not whole is generated again.
        ids: the prompts whose rows these are, in order; all of them by default.

    Raises:
        ConfigError: the folder holds rows of something else; the differences are named.
        CheckpointError: the folder's files are damaged beyond a torn last line.
    """

    def __init__(
        self,
        folder: Path | None,
        identity: Mapping[str, Any],
        provenance: Mapping[str, Any],
        window: int,
        *,
        ids: Sequence[int] | None = None,
    ) -> None:
        self.folder = folder
        self.ids = range(identity["num_prompts"]) if ids is None else ids
        self.rows: list[Row] = []
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        manifest = _read_manifest(folder)
        if manifest is None:
            _refuse_orphans(folder)
            manifest = {"format_version": MANIFEST_VERSION, **identity, "sessions": []}
        _check_identity(folder, manifest, identity)
        if (folder / DATA_NAME).exists():
            self.rows = _read_rows(folder / DATA_NAME, self.ids)
            return
        self.rows = _recover(folder / PART_NAME, self.ids, window)
        manifest["sessions"].append({"first_prompt": len(self.rows), **provenance})
        write_text(folder / MANIFEST_NAME, json.dumps(manifest, indent=1, sort_keys=True) + "\n")

    def append(self, rows: Sequence[Row]) -> None:
        """Keep a batch of rows; when this returns, they survive a power cut."""
        self.rows += rows
        if self.folder is None:
            return
        with (self.folder / PART_NAME).open("ab", buffering=0) as file:
            file.write(b"".join(_line(row) for row in rows))
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Give a complete file its final name."""
        if self.folder is not None and not (self.folder / DATA_NAME).exists():
            (self.folder / PART_NAME).replace(self.folder / DATA_NAME)
            sync(self.folder)


def read_finished(folder: Path) -> list[Row]:
    """The rows of a complete folder.

    Raises:
        StateError: it is not complete yet.
        CheckpointError: there is no readable manifest, or a row cannot be read.
    """
    manifest = _read_manifest(folder)
    if manifest is None:
        raise CheckpointError(f"{folder} must hold teacher data: there is no {MANIFEST_NAME}.")
    count = manifest["num_prompts"]
    if not (folder / DATA_NAME).exists():
        done = _count_lines(folder / PART_NAME)
        raise StateError(
            f"{folder} must be complete: got {done} of {count} rows. Call generate_teacher_data() with the same "
            "arguments and output_dir to go on."
        )
    return _read_rows(folder / DATA_NAME, range(count))


def is_finished(folder: Path) -> bool:
    """Whether all rows of a folder are there."""
    return (folder / DATA_NAME).exists()


def write_finished(
    folder: Path, identity: Mapping[str, Any], provenance: Mapping[str, Any], rows: Sequence[Row]
) -> None:
    """Write a complete folder at once; two processes that do so at the same time write the same.

    Args:
        folder: where to.
        identity: what the rows depend on.
        provenance: what else is worth knowing.
        rows: all of them, in order.
    """
    manifest = {"format_version": MANIFEST_VERSION, **identity, "sessions": [{"first_prompt": 0, **provenance}]}
    write_text(folder / MANIFEST_NAME, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    write_text(folder / DATA_NAME, b"".join(map(_line, rows)).decode())


def _line(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _recover(path: Path, ids: Sequence[int], window: int) -> list[Row]:
    """Read what a killed run left, and cut the file back to whole windows."""
    if not path.exists():
        return []
    entries = _parse_file(path, ids, may_be_torn=True)
    keep = len(entries) if len(entries) == len(ids) else len(entries) // window * window
    with path.open("r+b") as file:
        file.truncate(sum(len(line) for _, line in entries[:keep]))
        os.fsync(file.fileno())
    return [row for row, _ in entries[:keep]]


def _read_rows(path: Path, ids: Sequence[int]) -> list[Row]:
    rows = [row for row, _ in _parse_file(path, ids, may_be_torn=False)]
    if len(rows) != len(ids):
        raise CheckpointError(f"{path} must hold {len(ids)} rows: got {len(rows)}. {_DELETE}")
    return rows


def _parse_file(path: Path, ids: Sequence[int], *, may_be_torn: bool) -> list[tuple[Row, bytes]]:
    """Every row with its line; a last line that cannot be read is dropped if it may be torn."""
    entries: list[tuple[Row, bytes]] = []
    lines = path.read_bytes().splitlines(keepends=True)
    for index, line in enumerate(lines):
        row = _parse(line)
        if row is None and may_be_torn and index == len(lines) - 1:
            break
        if row is None or index >= len(ids) or row["prompt_id"] != ids[index]:
            found = "what cannot be read" if row is None else f"prompt {row['prompt_id']}"
            raise CheckpointError(
                f"{path} must hold one row per line, in order: got {found} in line {index + 1}. The disk may be "
                f"damaged, or two runs may have written at once. {_DELETE}"
            )
        entries.append((row, line))
    return entries


def _parse(line: bytes) -> Row | None:
    """The row in a line; nothing if the line is torn or something else."""
    try:
        row = strict_json(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    is_row = isinstance(row, dict) and all(is_of_kind(row.get(key), kind) for key, kind in _ROW.items())
    return row if is_row else None


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / MANIFEST_NAME
    if not path.exists():
        return None
    manifest = read_object(path, _DELETE)
    if manifest.get("format_version") != MANIFEST_VERSION:
        raise CheckpointError(
            f"{path} must be a manifest of teacher data, version {MANIFEST_VERSION}: it is not. {_DELETE}"
        )
    check_entries(manifest, {"num_prompts": int, "sessions": list}, path, _DELETE)
    return manifest


def _refuse_orphans(folder: Path) -> None:
    for name in (PART_NAME, DATA_NAME):
        if (folder / name).exists():
            raise CheckpointError(
                f"{folder / name} must have a {MANIFEST_NAME} beside it: there is none. Choose another output_dir."
            )


def _check_identity(folder: Path, manifest: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Refuse to mix rows of two different runs."""
    was, now = _flat(manifest), _flat(identity)
    differences = [f"{key} was {was.get(key)!r}, is {value!r}" for key, value in now.items() if was.get(key) != value]
    if differences:
        raise ConfigError(
            f"`output_dir` must hold data of the same run, or nothing: in {folder}, {'; '.join(differences)}. "
            "Use the same model, prompts and settings to go on, or another output_dir to start anew."
        )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
