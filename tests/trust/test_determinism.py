"""The same seed gives the same bytes: every stage, three times, in one process; `test_kills` compares processes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests.hub.models import make_packed
from tests.trust.stages import STAGES


@pytest.mark.parametrize("stage", ["teacher_data", "calibration", "distillation"])
def test_a_stage_gives_the_same_bytes_three_times(stage: str, tmp_path: Path) -> None:
    digests = {STAGES[stage](tmp_path / "bases", _folder(tmp_path, number)) for number in range(3)}
    assert len(digests) == 1


def test_three_saves_of_one_recipe_are_the_same_files(tmp_path: Path) -> None:
    found = []
    for number in range(3):
        folder = tmp_path / str(number) / "model"
        make_packed("llama", tmp_path / "bases").save_pretrained(folder, max_shard_size="20KB")
        files = sorted(path for path in folder.iterdir() if path.name != "README.md")  # the card names its folder
        found.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files})
    assert found[0] == found[1] == found[2]
    assert {"bitdistiller.json", "config.json", "model.safetensors.index.json"} < found[0].keys()


def _folder(parent: Path, number: int) -> Path:
    folder = parent / str(number)
    folder.mkdir()
    return folder
