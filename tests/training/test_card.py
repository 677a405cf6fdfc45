"""The model card says what was trained, names no base model that nobody can find, and shows the last figures."""

from __future__ import annotations

from pathlib import Path

import yaml

from tests.training import helpers


def front_matter(text: str) -> dict[str, object]:
    return yaml.safe_load(text.split("---\n")[1])


def test_a_run_writes_its_card(bases: Path, tmp_path: Path) -> None:
    run = helpers.trainer(helpers.student(bases), tmp_path / "out", save_strategy="steps", save_steps=2)
    run.train()
    text = (tmp_path / "out" / "README.md").read_text()
    assert "2 bits, grid `int`, 32 weights per scale" in text
    assert "Loss: cakld, gamma 0.4, teacher: self." in text
    assert "| training, step 2 | forward_kl |" in text
    assert "None" not in text
    header = front_matter(text)
    assert "base_model" not in header  # a local folder means nothing to others
    assert "bitdistiller" in header["tags"]


def test_a_base_model_of_the_hub_is_named(bases: Path, tmp_path: Path) -> None:
    model = helpers.student(bases)
    model.get_base_model().config._name_or_path = "someone/some-model"
    run = helpers.trainer(model, tmp_path)
    run.create_model_card(model_name="mine", dataset_name="someone/texts", tags="extra")
    header = front_matter((tmp_path / "README.md").read_text())
    assert header["base_model"] == "someone/some-model"
    assert header["base_model_relation"] == "quantized"
    assert header["datasets"] == ["someone/texts"]
    assert "extra" in header["tags"]


def test_a_model_built_in_memory_is_named_by_its_class(bases: Path, tmp_path: Path) -> None:
    model = helpers.student(bases)
    model.get_base_model().config._name_or_path = ""
    run = helpers.trainer(model, tmp_path)
    run.create_model_card()
    assert "built in memory" in (tmp_path / "README.md").read_text()
