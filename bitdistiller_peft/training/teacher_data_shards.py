"""Teacher data written by several processes: each takes every n-th prompt, and the last one puts them together."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.training.teacher_data_prompts import Prompt
from bitdistiller_peft.training.teacher_data_store import Row, TeacherDataStore, is_finished, write_finished


@dataclass(frozen=True)
class Shard:
    """Which share of the prompts a process answers.

    Attributes:
        index: counted from 0.
        count: processes in all.
    """

    index: int = 0
    count: int = 1

    def of(self, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
        """Its share."""
        return prompts[self.index :: self.count]

    def ids(self, num_prompts: int) -> range:
        """The places of its share in the list of all prompts."""
        return range(self.index, num_prompts, self.count)

    def folder(self, whole: Path) -> Path:
        """Where it is written; a single process writes into the folder itself."""
        return whole if self.count == 1 else whole / f"shard-{self.index:05d}-of-{self.count:05d}"

    @property
    def all(self) -> list[Shard]:
        """Those of all processes."""
        return [Shard(index, self.count) for index in range(self.count)]


def resolve_shard(shard: tuple[int, int] | None, folder: Path | None) -> Shard:
    """The share of this process: as it was said, or as torchrun and Slurm say it in the environment.

    Args:
        shard: index and count.
        folder: where all is written.

    Raises:
        ConfigError: an index out of range, several processes without a folder, or one that others have begun.
    """
    if shard is None:
        shard = (int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    index, count = shard
    if not 0 <= index < count:
        raise ConfigError(f"`shard` must be an index below a count: got shard={shard!r}. Use (0, 4) to (3, 4).")
    if count > 1 and folder is None:
        raise ConfigError(f"`output_dir` must be given to {count} processes: got None. Use a folder that all can see.")
    if folder is not None and is_finished(folder):
        return Shard()  # all is there, whoever wrote it
    if folder is not None and folder.is_dir():
        others = [path.name for path in folder.glob("shard-*") if not path.name.endswith(f"-of-{count:05d}")]
        if others:
            raise ConfigError(
                f"`output_dir` must be written by as many processes as began it: got {count}, and {folder} has "
                f"{others[0]}. Start as many again, or choose another output_dir."
            )
    return Shard(index, count)


def put_together(
    folder: Path, part: Shard, identity: Mapping[str, Any], provenance: Mapping[str, Any]
) -> list[Row] | None:
    """Write the rows of all processes into the folder itself, once they are there; whoever finishes last does it.

    Args:
        folder: of the whole.
        part: of this process.
        identity: what the rows depend on.
        provenance: what else is worth knowing.

    Returns:
        All rows, in order; None where some process is not done.

    Raises:
        ConfigError: another process has answered other prompts, or with other settings.
        CheckpointError: a file is damaged.
    """
    num_prompts = identity["num_prompts"]
    if not all(is_finished(other.folder(folder)) for other in part.all):
        return None
    stores = [
        TeacherDataStore(other.folder(folder), identity, provenance, 1, ids=other.ids(num_prompts))
        for other in part.all
    ]
    rows = sorted((row for store in stores for row in store.rows), key=lambda row: int(row["prompt_id"]))
    write_finished(folder, identity, provenance, rows)
    return rows
