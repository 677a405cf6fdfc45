"""The loss and its gradient are those of the textbook, however a batch is split, padded, packed or tiled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import nn

from bitdistiller_peft.losses import distillation_loss
from bitdistiller_peft.training import forward
from tests.training import helpers


@pytest.mark.parametrize("prompts", [True, False], ids=["completions", "whole"])
def test_the_loss_is_the_textbook_mean_over_target_tokens(bases: Path, tmp_path: Path, prompts: bool) -> None:
    model = helpers.student(bases)
    rows = helpers.dataset(8, prompts=prompts)
    total, count = helpers.textbook_loss(model, helpers.batch(rows), gamma=0.4)
    run = helpers.trainer(model, tmp_path, data=rows, per_device_train_batch_size=8, max_steps=1)
    run.train()
    assert helpers.history(run)[0] == pytest.approx(total / count, rel=1e-5)
    assert total / count > 0.01


def test_labels_are_shifted_so_that_the_first_completion_token_counts(bases: Path, tmp_path: Path) -> None:
    # one target token, the last: only the position before it may matter
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7, 8]], "labels": [[-100, -100, -100, 8]]})
    model = helpers.student(bases)
    total, count = helpers.textbook_loss(model, helpers.batch(rows), gamma=0.4)
    run = helpers.trainer(model, tmp_path, data=rows, max_steps=1, per_device_train_batch_size=1)
    run.train()
    assert count == 1
    assert helpers.history(run)[0] == pytest.approx(total, rel=1e-5)


def test_the_returned_loss_is_divided_by_the_given_count(bases: Path, tmp_path: Path) -> None:
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7, 8]], "labels": [[-100, -100, -100, 8]]})
    model = helpers.student(bases)
    total, _ = helpers.textbook_loss(model, helpers.batch(rows), gamma=0.4)
    run = helpers.trainer(model, tmp_path, data=rows)
    for given, divisor in ((None, 1), (torch.tensor(1), 1), (torch.tensor(4), 4)):
        loss = run.compute_loss(run.model, helpers.batch(rows), num_items_in_batch=given)
        assert loss.item() == pytest.approx(total / divisor, rel=1e-5)
    silent = helpers.batch(rows) | {"labels": torch.full((1, 4), -100)}
    assert run.compute_loss(run.model, silent).item() == 0


@pytest.mark.parametrize(("size", "steps"), [(8, 2), (4, 4), (1, 16)], ids=["2x8", "4x4", "16x1"])
def test_every_split_of_a_batch_gives_the_same_weights(bases: Path, tmp_path: Path, size: int, steps: int) -> None:
    whole = helpers.trainer(helpers.student(bases), tmp_path / "a", per_device_train_batch_size=16, max_steps=2)
    split = helpers.trainer(
        helpers.student(bases),
        tmp_path / "b",
        per_device_train_batch_size=size,
        gradient_accumulation_steps=steps,
        max_steps=2,
    )
    start = helpers.weights(whole.model)
    whole.train()
    split.train()
    assert helpers.difference(start, helpers.weights(whole.model)) > 1e-4
    assert helpers.difference(helpers.weights(whole.model), helpers.weights(split.model)) < 1e-6
    for key in ("loss", "forward_kl", "reverse_kl", "ce", "confidence", "entropy", "agreement", "num_tokens"):
        assert helpers.history(split, key) == pytest.approx(helpers.history(whole, key), rel=1e-5)


@pytest.mark.parametrize(
    "layout",
    [{"packing": True, "max_length": 32, "shuffle_dataset": False}, {"padding_free": True, "max_length": None}],
    ids=["bfd", "padding_free"],
)
def test_packed_and_unpadded_batches_equal_padded_ones(bases: Path, tmp_path: Path, layout: dict[str, object]) -> None:
    padded = helpers.trainer(helpers.student(bases), tmp_path / "a", per_device_train_batch_size=16, max_steps=1)
    other = helpers.trainer(
        helpers.student(bases), tmp_path / "b", per_device_train_batch_size=16, max_steps=1, **layout
    )
    padded.train()
    other.train()
    assert helpers.history(other) == pytest.approx(helpers.history(padded), rel=1e-5)
    assert helpers.history(other, "num_tokens") == helpers.history(padded, "num_tokens")
    assert helpers.difference(helpers.weights(padded.model), helpers.weights(other.model)) < 1e-6


def test_a_micro_batch_without_targets_changes_nothing(bases: Path, tmp_path: Path) -> None:
    rows = helpers.dataset(4)
    silent = [[-100] * len(row) for row in rows["input_ids"]]
    both = Dataset.from_dict(
        {"input_ids": [*rows["input_ids"]] * 2, "labels": [*rows["labels"], *silent]},
    )
    plain = helpers.trainer(helpers.student(bases), tmp_path / "a", data=rows, max_steps=1)
    mixed = helpers.trainer(
        helpers.student(bases),
        tmp_path / "b",
        data=both,
        gradient_accumulation_steps=8,
        per_device_train_batch_size=1,
        max_steps=1,
        max_length=None,  # cutting would drop the silent rows
    )
    plain.train()
    mixed.train()
    assert len(mixed.train_dataset) == 8
    assert helpers.difference(helpers.weights(plain.model), helpers.weights(mixed.model)) < 1e-6


def test_the_size_of_a_tile_changes_nothing(bases: Path, tmp_path: Path) -> None:
    runs = [
        helpers.trainer(helpers.student(bases), tmp_path / str(tile), loss_tile_tokens=tile) for tile in (None, 1, 7)
    ]
    for run in runs:
        run.train()
    for run in runs[1:]:
        assert helpers.difference(helpers.weights(runs[0].model), helpers.weights(run.model)) < 1e-6


def test_the_size_of_a_tile_reaches_the_loss(bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(*args: object, **kwargs: object) -> object:
        seen.append(kwargs["tile_tokens"])
        return distillation_loss(*args, **kwargs)

    monkeypatch.setattr(forward, "distillation_loss", spy)
    helpers.trainer(helpers.student(bases), tmp_path, loss_tile_tokens=7, max_steps=1).train()
    assert seen == [7]


def test_no_logits_of_a_whole_batch_are_made(bases: Path, tmp_path: Path) -> None:
    model = helpers.student(bases)
    run = helpers.trainer(model, tmp_path, eval_data=helpers.dataset(4), gamma="estimate")
    calls: list[torch.Size] = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda _m, _i, output: calls.append(output.shape))
    run.train()
    run.evaluate()
    assert calls == []


def test_gradient_checkpointing_changes_nothing(bases: Path, tmp_path: Path) -> None:
    runs = [
        helpers.trainer(helpers.student(bases), tmp_path / str(on), gradient_checkpointing=on) for on in (False, True)
    ]
    for run in runs:
        run.train()
    assert helpers.difference(*(helpers.weights(run.model) for run in runs)) == 0


def test_bf16_autocast_keeps_the_loss_in_fp32(bases: Path, tmp_path: Path) -> None:
    exact = helpers.trainer(helpers.student(bases), tmp_path / "a")
    mixed = helpers.trainer(helpers.student(bases), tmp_path / "b", bf16=True)
    exact.train()
    mixed.train()
    assert helpers.history(mixed)[0] == pytest.approx(helpers.history(exact)[0], rel=0.02)
    assert all(p.dtype == torch.float32 for p in helpers.weights(mixed.model).values())


def test_a_padded_vocabulary_does_no_harm(bases: Path, tmp_path: Path) -> None:
    def padded() -> nn.Module:
        model = helpers.base(bases)
        bias = torch.zeros(len(model.lm_head.weight))
        bias[-8:] = -torch.inf
        model.lm_head.bias = nn.Parameter(bias, requires_grad=False)
        return model

    model = helpers.get_bitdistiller_model(padded(), helpers.BitDistillerConfig(bits=2, group_size=32))
    rows = Dataset.from_dict({"input_ids": [[row % 80 + 3 for row in ids] for ids in helpers.dataset(4)["input_ids"]]})
    run = helpers.trainer(model, tmp_path, data=rows)
    run.train()
    assert all(torch.isfinite(torch.tensor(helpers.history(run, key))).all() for key in ("loss", "forward_kl", "ce"))
    assert all(bool(torch.isfinite(p).all()) for p in helpers.weights(model).values())
