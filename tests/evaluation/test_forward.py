"""Evaluation borrows a model: whatever it had, it has again afterwards, also when something goes wrong."""

from __future__ import annotations

import pytest
import torch

from bitdistiller_peft.evaluation import forward
from bitdistiller_peft.evaluation.forward import tiles
from bitdistiller_peft.tuner import borrowed


def snapshot(model) -> list[object]:
    return [
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_modes_gradient_flags_and_random_state_come_back(student, fails: bool) -> None:
    student.train()
    student.base_model.model.model.layers[0].eval()  # a mixed mode, which model.train() would level
    for part in ("weight_scale", "norm.modules_to_save.default.weight"):
        next(p for name, p in student.named_parameters() if name.endswith(part)).requires_grad_(False)
    before = snapshot(student)
    try:
        with borrowed(student):
            assert not any(module.training for module in student.modules())
            assert not torch.is_grad_enabled()
            torch.rand(())
            with student.disable_adapter():
                if fails:
                    raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert snapshot(student) == before
    assert not any(layer.disable_adapters for _, layer in student.base_model.student_layers())


def test_what_is_borrowed_can_be_trained_afterwards(student) -> None:
    ids = torch.tensor([[5, 6, 7]])
    with borrowed(student):
        kept = student(input_ids=ids).logits  # an inference tensor, such as a layer may cache, could not be trained on
    assert not kept.is_inference()
    student(input_ids=ids).logits.sum().backward()


def test_tiles_cover_every_predicting_position_once(monkeypatch) -> None:
    monkeypatch.setattr(forward, "_TILE_ELEMENTS", 30)
    pieces = list(tiles(torch.zeros(2, 8), vocab=10))
    assert pieces == [(row, part) for row in (0, 1) for part in (slice(0, 3), slice(3, 6), slice(6, 7))]
    assert len(list(tiles(torch.zeros(1, 3), vocab=1000))) == 2  # one position at least
