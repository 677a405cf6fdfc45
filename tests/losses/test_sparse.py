"""A teacher known by its top k and a tail: the coarser divergence, exactly, and never above the true one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bitdistiller_peft.errors import ConfigError, DataError
from bitdistiller_peft.losses import Objective, SparseTeacher, distillation_loss, register_divergence, registry

TOKENS, WIDTH, VOCAB = 7, 5, 23
OBJECTIVES = {
    "cakld": Objective("cakld", gamma=0.3),
    "per_token": Objective("cakld", gamma="per_token"),
    "forward": Objective("forward_kl"),
    "reverse": Objective("reverse_kl", ce_weight=0.2),
    "jsd": Objective("jsd", jsd_beta=0.3),
}


def sides(generator: torch.Generator, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student states, head, teacher logits and labels."""
    hidden = torch.randn(TOKENS, WIDTH, dtype=dtype, generator=generator)
    head = torch.randn(VOCAB, WIDTH, dtype=dtype, generator=generator)
    teacher = 2 * torch.randn(TOKENS, VOCAB, dtype=dtype, generator=generator)
    return hidden, head, teacher, torch.randint(0, VOCAB, (TOKENS,), generator=generator)


def keep(teacher: Tensor, labels: Tensor, k: int) -> SparseTeacher:
    """The top k, with the label in the last place where it is not among them."""
    log_probs = teacher.log_softmax(-1)
    tokens = log_probs.topk(k).indices
    missing = ~(tokens == labels.unsqueeze(-1)).any(-1)
    tokens[missing, -1] = labels[missing]
    tail = log_probs.scatter(-1, tokens, -torch.inf).logsumexp(-1)
    return SparseTeacher(tokens, log_probs.gather(-1, tokens), tail)


def merged(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities of the kept tokens one by one and of all others as one outcome, the textbook way."""
    rest = torch.ones_like(log_probs, dtype=torch.bool).scatter(-1, tokens, False)
    tail = (log_probs.exp() * rest).sum(-1, keepdim=True).log()
    return torch.cat([log_probs.gather(-1, tokens), tail], -1)


def textbook(objective: Objective, student: Tensor, sparse: SparseTeacher, labels: Tensor) -> Tensor:
    """The objective between coarser distributions, in differentiable steps."""
    s = merged(student.log_softmax(-1), sparse.tokens)
    t = torch.cat([sparse.log_probs, sparse.log_tail.unsqueeze(-1)], -1)
    kl: Callable[[Tensor, Tensor], Tensor] = lambda p, q: (p.exp() * (p - q)).sum(-1)  # noqa: E731
    confidence = (sparse.log_probs.exp() * (sparse.tokens == labels.unsqueeze(-1))).sum(-1)
    beta = objective.jsd_beta
    mixture = ((1 - beta) * s.exp() + beta * t.exp()).log()
    gamma = confidence if objective.gamma == "per_token" else objective.gamma
    values = {
        "forward_kl": kl(t, s),
        "reverse_kl": kl(s, t),
        "jsd": beta * kl(t, mixture) + (1 - beta) * kl(s, mixture),
        "ce": -student.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1),
    }
    if gamma is not None:
        values["cakld"] = gamma * values["reverse_kl"] + (1 - gamma) * values["forward_kl"]
    return torch.stack([weight * values[part].sum() for part, weight in objective.terms.items()]).sum()


@pytest.mark.parametrize("k", [1, 4, VOCAB - 1])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_gradient_are_those_of_the_coarser_distributions(
    name: str, k: int, generator: torch.Generator
) -> None:
    hidden, head, teacher, labels = sides(generator)
    sparse = keep(teacher, labels, k)
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    got = distillation_loss(ours, head, sparse, None, labels, objective=OBJECTIVES[name], tile_tokens=3).loss_sum
    expected = textbook(OBJECTIVES[name], theirs @ head.T, sparse, labels)
    got.backward()
    expected.backward()
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_with_every_token_known_it_is_the_whole_teacher(name: str, generator: torch.Generator) -> None:
    hidden, head, teacher, labels = sides(generator)
    sparse = keep(teacher, labels, VOCAB)
    assert bool(torch.isneginf(sparse.log_tail).all())
    results = []
    for left, right in ((sparse, None), (teacher, torch.eye(VOCAB, dtype=teacher.dtype))):
        states = hidden.clone().requires_grad_()
        output = distillation_loss(states, head, left, right, labels, objective=OBJECTIVES[name])
        output.loss_sum.backward()
        results.append((states.grad, output.sums()))
    torch.testing.assert_close(*(grad for grad, _ in results))
    torch.testing.assert_close(*(sums for _, sums in results))


@pytest.mark.parametrize("part", ["forward_kl", "reverse_kl", "jsd"])
def test_more_tokens_bring_it_closer_to_the_true_value_from_below(part: str, generator: torch.Generator) -> None:
    hidden, head, teacher, labels = sides(generator)
    objective = Objective("mixture", weights={part: 1.0})
    true = distillation_loss(
        hidden, head, teacher, torch.eye(VOCAB, dtype=teacher.dtype), labels, objective=objective
    ).loss_sum
    values = [
        float(distillation_loss(hidden, head, keep(teacher, labels, k), None, labels, objective=objective).loss_sum)
        for k in range(2, VOCAB + 1)
    ]
    assert all(left <= right + 1e-12 for left, right in zip(values, [*values[1:], float(true)], strict=True))
    assert values[0] > 0


def test_rounded_log_probabilities_still_sum_to_one(generator: torch.Generator) -> None:
    _, _, teacher, labels = sides(generator)
    exact = keep(teacher, labels, 4)
    rounded = SparseTeacher(exact.tokens.int(), exact.log_probs.half(), exact.log_tail.float())
    known, tail = rounded.normalized()
    torch.testing.assert_close(known.exp().sum(-1) + tail.exp(), torch.ones(TOKENS))
    torch.testing.assert_close(known.double(), exact.log_probs, atol=4e-3, rtol=0)


def test_agreement_and_entropy_do_not_believe_the_filled_up_tail() -> None:
    # the student is sure of token 2, in the tail; filled up, it would be the teacher's likeliest token too
    student = torch.tensor([[0.0, 0.0, 9.0, 0.0]])
    sparse = SparseTeacher(torch.tensor([[0]]), torch.tensor([[0.4]]).log(), torch.tensor([0.6]).log())
    labels = torch.tensor([0])
    output = distillation_loss(student, torch.eye(4), sparse, None, labels, objective=Objective("forward_kl"))
    assert output.agreement == 0
    assert float(output.teacher_entropy) == pytest.approx(0.6730, abs=1e-4)  # of 0.4 and 0.6
    assert float(output.confidence) == pytest.approx(0.4)


def test_what_cannot_be_computed_is_refused(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, teacher, labels = sides(generator)
    sparse = keep(teacher, labels, 4)
    monkeypatch.setattr(registry, "_DIVERGENCES", dict(registry._DIVERGENCES))
    register_divergence("total_variation", lambda s, t: (s.softmax(-1) - t.softmax(-1)).abs().sum(-1) / 2)
    with pytest.raises(ConfigError, match=r"total_variation.*which needs every token"):
        distillation_loss(hidden, head, sparse, None, labels, objective=Objective("total_variation"))
    with pytest.raises(ConfigError, match="temperature=2"):
        distillation_loss(hidden, head, sparse, None, labels, objective=Objective("forward_kl", temperature=2.0))
    with pytest.raises(ConfigError, match="got 3 and 7"):
        distillation_loss(hidden, head, sparse[:3], None, labels, objective=Objective("forward_kl"))
    other = SparseTeacher(sparse.tokens[:, :1], sparse.log_probs[:, :1], sparse.log_tail)
    unknown = (sparse.tokens[:, 0] + 1) % VOCAB
    with pytest.raises(DataError, match="labels must be among"):
        distillation_loss(hidden, head, other, None, unknown, objective=Objective("forward_kl"))
