"""What a student was trained with stands in the packed model's config, also by way of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel

from bitdistiller_peft.training.documents import fingerprint_dataset
from tests.training import helpers


def test_gamma_loss_teacher_and_data_are_packed_with_the_codes(bases: Path, tmp_path: Path) -> None:
    run = helpers.trainer(helpers.student(bases), tmp_path, gamma="estimate", save_strategy="steps", save_steps=2)
    run.train()
    expected = {
        "loss": "cakld",
        "gamma": run.gamma,
        "teacher": "self",
        "data": fingerprint_dataset(helpers.dataset()),
        "examples": len(helpers.dataset()),
        "steps": run.args.max_steps,
        "learning_rate": run.args.learning_rate,
    }
    again = PeftModel.from_pretrained(helpers.base(bases), tmp_path / "checkpoint-2")
    for model in (run.model, again):
        provenance = model.pack_and_unload(progressbar=False).config.quantization_config.provenance
        assert {key: provenance[key] for key in expected} == expected


def test_the_fingerprint_of_data_knows_no_order_but_every_token() -> None:
    rows = helpers.dataset()
    assert fingerprint_dataset(rows.shuffle(seed=1)) == fingerprint_dataset(rows)
    assert fingerprint_dataset(helpers.dataset(seed=1)) != fingerprint_dataset(rows)
    assert fingerprint_dataset(rows.to_iterable_dataset()) is None
