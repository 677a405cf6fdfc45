"""Logits at t answer to the label at t + 1, and what is masked does no harm, in numbers that a child can add."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitdistiller_peft.errors import DataError
from bitdistiller_peft.losses import IGNORE_INDEX, forward_kl, select_targets, shift_labels, sum_over_targets

LABELS = torch.tensor([[-100, -100, 7, 8]])
PER_POSITION = torch.tensor([[10.0, 20.0, 40.0, 80.0]])


def test_the_position_before_a_label_answers_to_it() -> None:
    assert shift_labels(LABELS).tolist() == [[-100, 7, 8, -100]]


def test_the_sum_is_twenty_and_forty() -> None:
    total, count = sum_over_targets(PER_POSITION, LABELS)
    assert (total.item(), count.item()) == (60.0, 2)


def test_select_targets_keeps_the_same_two_positions() -> None:
    values, labels = select_targets(PER_POSITION, LABELS)
    assert (values.tolist(), labels.tolist()) == ([20.0, 40.0], [7, 8])


def test_another_ignore_index_is_honoured_everywhere() -> None:
    labels = torch.tensor([[0, 0, 7, 8]])
    assert shift_labels(labels, ignore_index=0).tolist() == [[0, 7, 8, 0]]
    assert [x.item() for x in sum_over_targets(PER_POSITION, labels, ignore_index=0)] == [60.0, 2]
    assert select_targets(PER_POSITION, labels, ignore_index=0)[1].tolist() == [7, 8]


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_masked_value_does_no_harm_to_the_sum_or_its_gradient(poison: float) -> None:
    per_position = torch.tensor([[poison, 20.0, 40.0, poison]], requires_grad=True)
    total, _ = sum_over_targets(per_position, LABELS)
    total.backward()
    assert total.item() == 60.0
    assert per_position.grad is not None
    assert per_position.grad.tolist() == [[0.0, 1.0, 1.0, 0.0]]


def test_selecting_first_keeps_a_masked_nan_out_of_a_shared_weight(generator: torch.Generator) -> None:
    hidden = torch.randn(1, 4, 3, generator=generator)
    hidden[0, 0] = hidden[0, 3] = math.nan
    weight = torch.randn(5, 3, generator=generator, requires_grad=True)
    kept, _ = select_targets(hidden, LABELS)
    forward_kl(kept @ weight.T, torch.zeros(2, 5)).sum().backward()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()


def test_without_targets_the_sum_is_a_differentiable_zero() -> None:
    per_position = torch.full((2, 3), math.nan, requires_grad=True)
    total, count = sum_over_targets(per_position, torch.full((2, 3), IGNORE_INDEX))
    total.backward()
    assert (total.item(), count.item()) == (0.0, 0)
    assert per_position.grad is not None
    assert per_position.grad.count_nonzero() == 0


def test_sequences_of_one_token_have_nothing_to_predict() -> None:
    total, count = sum_over_targets(torch.ones(2, 1), torch.ones(2, 1, dtype=torch.long))
    assert (total.item(), count.item()) == (0.0, 0)


def test_a_half_precision_sum_is_taken_in_fp32() -> None:
    time = 3000  # bf16 stops counting at 256
    total, count = sum_over_targets(torch.ones(1, time, dtype=torch.bfloat16), torch.ones(1, time, dtype=torch.long))
    assert (total.dtype, total.item(), count.item()) == (torch.float32, time - 1, time - 1)


@given(rows=st.lists(st.lists(st.sampled_from([-100, 0, 3]), min_size=4, max_size=4), min_size=1, max_size=5))
def test_sums_and_counts_add_up_over_any_split_of_the_batch(rows: list[list[int]]) -> None:
    labels = torch.tensor(rows)
    per_position = torch.arange(labels.numel(), dtype=torch.float32).view_as(labels)
    total, count = sum_over_targets(per_position, labels)
    parts = [sum_over_targets(per_position[i : i + 1], labels[i : i + 1]) for i in range(len(rows))]
    assert total.item() == sum(part[0].item() for part in parts)
    assert count.item() == sum(part[1].item() for part in parts) == sum(x != -100 for row in rows for x in row[1:])


@pytest.mark.parametrize("function", [sum_over_targets, select_targets])
def test_labels_of_another_shape_are_refused_and_not_broadcast(function: object) -> None:
    with pytest.raises(DataError, match=r"one entry per position: got labels=\[1, 4\], values=\[2, 4\]"):
        function(torch.zeros(2, 4), LABELS)  # type: ignore[operator]
