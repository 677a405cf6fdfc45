"""The relation loss and its gradients equal loops in fp64 under every convention; what cannot work is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from bitdistiller_peft.errors import ConfigError, UnknownNameError
from bitdistiller_peft.losses import RelationObjective, attention_relation_loss, count_rows
from bitdistiller_peft.losses.attention_relations import RELATION_MASKS, RELATION_REDUCTIONS, RELATIONS, split_heads
from tests.reference.attention_relations import relation_loss, split_states

MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
# queries of four heads, keys and values of two: grouped-query attention
HEADS = (4, 2, 2)


def states(
    seed: int, heads: tuple[int, ...] = HEADS, width: int = 6, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, h, 5, width, generator=generator, dtype=torch.float64).to(dtype) for h in heads]


def loss_of(student: list[Tensor], teacher: list[Tensor], objective: RelationObjective) -> Tensor:
    return attention_relation_loss(student, teacher, MASK, objective=objective) / count_rows(MASK, (2, 5), objective)


@pytest.mark.parametrize(("kind", "masking"), list(itertools.product(RELATIONS, RELATION_MASKS)))
@pytest.mark.parametrize("reduction", RELATION_REDUCTIONS)
def test_loss_and_gradients_equal_loops_in_fp64(kind: str, masking: str, reduction: str) -> None:
    teacher = states(1, heads=(6, 3, 3), width=4)  # a teacher of another width
    ours, theirs = ([s.clone().requires_grad_() for s in states(0)] for _ in range(2))
    objective = RelationObjective(3, kind, masking, reduction)
    found = loss_of(ours, teacher, objective)
    expected = relation_loss(theirs, teacher, MASK, heads=3, kind=kind, masking=masking, reduction=reduction)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    found.backward()
    expected.backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-15)


def test_heads_are_joined_and_split_anew() -> None:
    queries = states(0)[0]
    assert torch.equal(split_heads(queries, 3), split_states(queries, 3))


def test_a_student_like_its_teacher_has_loss_and_gradient_zero() -> None:
    teacher = states(0)
    student = [s.clone().requires_grad_() for s in teacher]
    loss = loss_of(student, teacher, RelationObjective(2))
    loss.backward()
    assert loss.item() == 0
    assert all(float(s.grad.abs().max()) < 1e-15 for s in student)


def test_padding_neither_counts_nor_is_looked_at() -> None:
    teacher, student = states(1), states(0)
    changed = [s.clone() for s in student]
    for s in changed:
        s[1, :, 3:] = 1e3
    objective = RelationObjective(2)
    assert torch.equal(loss_of(changed, teacher, objective), loss_of(student, teacher, objective))
    assert not torch.equal(
        loss_of(changed, teacher, RelationObjective(2, mask="none")),
        loss_of(student, teacher, RelationObjective(2, mask="none")),
    )


def test_sequences_add_up_whatever_the_batch() -> None:
    teacher, student, objective = states(1), states(0), RelationObjective(2)
    whole = attention_relation_loss(student, teacher, MASK, objective=objective)
    parts = [
        attention_relation_loss(
            [s[i : i + 1] for s in student], [t[i : i + 1] for t in teacher], MASK[i : i + 1], objective=objective
        )
        for i in range(2)
    ]
    torch.testing.assert_close(whole, parts[0] + parts[1], rtol=1e-12, atol=0)
    assert [count_rows(MASK[i : i + 1], (1, 5), objective) for i in range(2)] == [5, 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_half_precision_states_are_compared_in_fp32(dtype: torch.dtype) -> None:
    student = [s.to(dtype).requires_grad_() for s in states(0)]
    teacher = [t.to(dtype) for t in states(1)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss_of(student, teacher, RelationObjective(2))
    expected = loss_of([s.double() for s in student], [t.double() for t in teacher], RelationObjective(2))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    found.backward()
    assert all(s.grad is not None and s.grad.dtype == dtype for s in student)


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"relation": "euclid"}, UnknownNameError),
        ({"mask": "all"}, UnknownNameError),
        ({"reduction": "sum"}, UnknownNameError),
        ({"split_heads": 0}, ConfigError),
        ({"split_heads": 2.0}, ConfigError),
    ],
    ids=str,
)
def test_conventions_that_do_not_exist_are_refused(kwargs: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error, match=f"attention_{next(iter(kwargs))}"):
        RelationObjective(**kwargs)  # type: ignore[arg-type]


def test_a_split_that_does_not_divide_is_refused_with_one_that_does() -> None:
    with pytest.raises(ConfigError, match=r"must divide the joined width of heads: got 5, and 4 heads of 6.*\[4, 8\]"):
        loss_of(states(0), states(1), RelationObjective(5))


def test_states_of_another_batch_are_refused() -> None:
    with pytest.raises(ConfigError, match="must have the student's batch and time"):
        loss_of(states(0), [t[:1] for t in states(1)], RelationObjective(2))


def test_a_gradient_is_rounded_once_however_much_the_loss_is_multiplied_by() -> None:
    student, teacher = states(4), states(5)
    halves = [part.detach().bfloat16().requires_grad_() for part in student]
    wide = [part.detach().float().requires_grad_() for part in halves]
    for part, factor in ((halves, 3), (wide, 1)):
        (factor * attention_relation_loss(part, teacher, MASK, objective=RelationObjective(2))).backward()
    for half, full in zip(halves, wide, strict=True):
        assert half.grad is not None
        assert full.grad is not None
        assert torch.equal(half.grad, (3 * full.grad).bfloat16())
