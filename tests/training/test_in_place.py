"""Training in place: one copy of the weights, a teacher that is elsewhere, and the same student as with a copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bitdistiller_peft import BitDistillerQuantConfig, pack_latent
from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.training import DistillTrainer, cache_teacher
from tests import tiny
from tests.training import helpers

STUDENT = "bitdistiller_weight.default."


def latent(bases: Path, name: str = "llama") -> Any:
    """A student in place of its base model."""
    config = BitDistillerQuantConfig(state="latent", bits=2, group_size=32)
    model = tiny.load(tiny.save_base(name, bases), quantization_config=config)
    if not model.config.tie_word_embeddings:  # as `helpers.base` does
        model.get_output_embeddings().weight.data.mul_(20)
    return model


def weight_bytes(model: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_in_place_trains_what_a_copy_trains_in_half_the_memory(name: str, bases: Path, tmp_path: Path) -> None:
    place, copy = latent(bases, name), helpers.student(bases, name)
    # both have a scale of 4 bytes for each 32 weights
    base = weight_bytes(helpers.base(bases, name))
    assert weight_bytes(place) < 1.04 * base < weight_bytes(copy) - 0.8 * base
    losses = []
    for where, student in (("place", place), ("copy", copy)):
        run = helpers.trainer(student, tmp_path / where, teacher=helpers.base(bases, name, seed=1))
        for parameter in run.model.parameters():  # norms and embeddings are trained in place, but not beside a copy
            parameter.requires_grad_(parameter.requires_grad and (where == "copy" or parameter.ndim > 1))
        run.train()
        losses.append(helpers.history(run))
    assert losses[0][0] == losses[1][0]
    packed = pack_latent(place)
    assert packed(tiny.token_ids()).logits.isfinite().all()


def test_the_quantized_weights_move_alike(bases: Path, tmp_path: Path) -> None:
    place, copy = latent(bases, "llama-tied"), helpers.student(bases, "llama-tied")
    for name, parameter in place.named_parameters():
        parameter.requires_grad_("_proj" in name)
    found = []
    for where, student in (("place", place), ("copy", copy)):
        run = helpers.trainer(student, tmp_path / where, teacher=helpers.base(bases, "llama-tied", seed=1))
        run.train()
        trained = {name: p.detach() for name, p in run.model.named_parameters() if p.requires_grad}
        found.append({name.removeprefix("base_model.model.").replace(STUDENT, ""): p for name, p in trained.items()})
    assert helpers.difference(*found) == 0.0


def test_a_cached_teacher_serves_in_place(bases: Path, tmp_path: Path) -> None:
    base = helpers.base(bases, "llama-tied")
    cache_teacher(base, None, helpers.dataset(), tmp_path / "cache", dtype="float32", show_progress=False)
    losses = []
    for teacher in ({"teacher": "cached", "teacher_cache": str(tmp_path / "cache")}, {}):
        student = latent(bases, "llama-tied")
        for name, parameter in student.named_parameters():
            parameter.requires_grad_("_proj" in name)
        run = DistillTrainer(
            student,
            helpers.config(tmp_path / "run", **teacher),
            teacher=None if teacher else helpers.base(bases, "llama-tied"),
            train_dataset=helpers.dataset(),
            processing_class=helpers.tokenizer(),
        )
        run.train()
        losses.append(helpers.history(run))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_teacher_cannot_be_what_is_trained_over(bases: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Pass another model as `teacher`"):
        helpers.trainer(latent(bases), tmp_path)
