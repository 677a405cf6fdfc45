"""Groups are runs of one row along the input axis, or the whole matrix; sizes that cannot be are refused."""

from __future__ import annotations

import pytest
import torch

from bitdistiller_peft.errors import ConfigError, GroupSizeError
from bitdistiller_peft.quantizers import check_group_size, num_groups, to_groups


def test_a_group_is_a_run_of_one_row() -> None:
    weight = torch.arange(12).reshape(2, 6)
    assert to_groups(weight, 3).tolist() == [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]]


def test_minus_one_is_the_row_and_tensor_is_the_matrix() -> None:
    weight = torch.arange(12).reshape(2, 6)
    assert to_groups(weight, -1).tolist() == [[[0, 1, 2, 3, 4, 5]], [[6, 7, 8, 9, 10, 11]]]
    assert to_groups(weight, "tensor").tolist() == [[list(range(12))]]


def test_each_matrix_of_a_stack_has_groups_of_its_own() -> None:
    weight = torch.arange(24).reshape(2, 2, 6)
    assert to_groups(weight, 3).shape == (2, 2, 2, 3)
    assert to_groups(weight, "tensor").shape == (2, 1, 1, 12)
    assert torch.equal(to_groups(weight, "tensor")[1].flatten(), weight[1].flatten())


def test_groups_are_counted() -> None:
    assert num_groups(128, 64) == 2
    assert num_groups(172, 4) == 43
    assert num_groups(172, -1) == 1


@pytest.mark.parametrize("group_size", [1, 64, 128, -1, "tensor"])
def test_these_group_sizes_are_taken(group_size: int | str) -> None:
    check_group_size(group_size)


@pytest.mark.parametrize("group_size", [0, -2, 64.0, True, None, "row", "128", [64]])
def test_other_group_sizes_are_refused(group_size: object) -> None:
    with pytest.raises(ConfigError) as refusal:
        check_group_size(group_size)
    assert str(refusal.value) == (
        "`group_size` must be a positive integer, -1 (one group per output row) or 'tensor': "
        f"got group_size={group_size!r}. Use 64 or 128."
    )


def test_a_size_that_does_not_divide_is_refused_with_those_that_do() -> None:
    with pytest.raises(GroupSizeError) as refusal:
        to_groups(torch.zeros(2, 100), 48)
    assert str(refusal.value) == (
        "`group_size` must divide the input width: got group_size=48, in_features=100. "
        "Use one of [10, 20, 25, 50, 100], or group_size=-1 for one group per output row."
    )


def test_a_width_without_fitting_divisors_still_gets_advice_that_works() -> None:
    with pytest.raises(GroupSizeError, match=r"Use one of \[1031\]"):
        num_groups(1031, 128)
