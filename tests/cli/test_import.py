"""`bitdistiller import` writes the packed model, and over its base the student that `distill` goes on with."""

from __future__ import annotations

import json
from pathlib import Path

from bitdistiller_peft.export import PackedSource, export_model
from tests.hub.models import make_packed
from tests.tiny import save_base


def test_a_gptq_folder_becomes_a_packed_model_and_a_student(command, tmp_path: Path) -> None:
    packed = make_packed("llama", tmp_path, bits=4, steps=0)
    packed.save_pretrained(tmp_path / "before")
    export_model(packed, "gptq", tmp_path / "gptq")
    base = save_base("llama", tmp_path)
    done = command("import", tmp_path / "gptq", "--model", base, "--output", tmp_path / "out")
    assert done.code == 0, done.err
    assert "packed model:" in done.out
    ours, theirs = (PackedSource(folder) for folder in (tmp_path / "out" / "packed", tmp_path / "before"))
    name = "model.layers.1.mlp.down_proj.weight"
    assert ours.weight(name).words.equal(theirs.weight(name).words)
    adapter = json.loads((tmp_path / "out" / "student" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(base)
    again = command("import", tmp_path / "gptq", "--model", base, "--output", tmp_path / "out")
    assert "imported before" in again.out


def test_a_model_that_cannot_be_held_ends_with_the_reason(command, tmp_path: Path) -> None:
    done = command("import", save_base("llama", tmp_path), "--output", tmp_path / "out")
    assert done.code == 2
    assert "without `quantization_config`" in done.err
