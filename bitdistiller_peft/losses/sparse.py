"""A teacher of whom only the likeliest next tokens are known, and how much probability all others share.

What the others say one by one is unknown, so the divergences are taken between coarser distributions: every known token
for itself, and all others as one outcome. Merging outcomes never increases a divergence, so for forward KL, reverse KL
and Jensen-Shannon the value is a lower bound of the true one, and equal to it once every token is known.

There is no second set of formulas for that. If the unknown share is spread over the unknown tokens in the proportions
of the student's own probabilities, the ratio of student to teacher is the same for all of them, and value and gradient
of every divergence that is an average of a function of that ratio become those of the coarser distributions, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitdistiller_peft.errors import ConfigError, DataError
from bitdistiller_peft.losses.objective import Objective

COMPUTABLE = ("cakld", "forward_kl", "reverse_kl", "jsd", "ce")
"""Parts of an objective that a sparse teacher suffices for: averages of a function of the ratio of both sides."""


@dataclass(frozen=True, eq=False)
class SparseTeacher:
    """What is known of a teacher's next-token distributions, at temperature 1.

    Attributes:
        tokens: `[tokens, k]`, any integer dtype: the known tokens, each once per row; the first is the likeliest, and
            the label must be among them.
        log_probs: `[tokens, k]`, their log-probabilities, any floating dtype.
        log_tail: `[tokens]`, log of the probability of all other tokens together; `-inf` for none.
    """

    tokens: Tensor
    log_probs: Tensor
    log_tail: Tensor

    def __getitem__(self, rows: Tensor | slice) -> SparseTeacher:
        """Pick some tokens."""
        return SparseTeacher(self.tokens[rows], self.log_probs[rows], self.log_tail[rows])

    def __len__(self) -> int:
        """How many tokens there are."""
        return len(self.log_tail)

    def normalized(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Log-probabilities `[tokens, k]` and log tail `[tokens]` in `dtype`; they sum to one again."""
        joint = torch.cat([self.log_probs.to(dtype), self.log_tail.unsqueeze(-1).to(dtype)], -1)
        joint = joint.log_softmax(-1)
        return joint[..., :-1], joint[..., -1]

    def expand(self, student_logits: Tensor) -> Tensor:
        """Spread the tail as the student does.

        Args:
            student_logits: `[tokens, vocab]`, fp32 or fp64.

        Returns:
            Log-probabilities `[tokens, vocab]`.
        """
        known, tail = self.normalized(student_logits.dtype)
        index = self.tokens.long()
        full = student_logits.scatter(-1, index, -torch.inf)
        unknown = full.logsumexp(-1, keepdim=True)
        full += torch.where(torch.isneginf(unknown), 0.0, tail.unsqueeze(-1) - unknown)
        return full.scatter_(-1, index, known)

    def of(self, labels: Tensor) -> Tensor:
        """The probability `[tokens]` of each label.

        Raises:
            DataError: a label is not among the known tokens.
        """
        is_label = self.tokens.long() == labels.long().unsqueeze(-1)
        missing = int((~is_label.any(-1)).sum())
        if missing:
            raise DataError(
                f"labels must be among the tokens that are known of the teacher: {missing} are not. Train on the next "
                "tokens of the text that was cached, or cache hidden states."
            )
        log_probs, _ = self.normalized()
        return torch.where(is_label, log_probs, -torch.inf).amax(-1).exp()

    def entropy(self) -> Tensor:
        """Entropy `[tokens]` of the coarser distribution, a lower bound of the teacher's."""
        log_probs, tail = self.normalized()
        return torch.special.entr(log_probs.exp()).sum(-1) + torch.special.entr(tail.exp())


def check_sparse(teacher: SparseTeacher, num_tokens: int, objective: Objective) -> None:
    """Refuse a sparse teacher that does not fit.

    Args:
        teacher: what is known.
        num_tokens: tokens of the student.
        objective: what to minimize.

    Raises:
        ConfigError: another number of tokens, or see `check_computable`.
    """
    if len(teacher) != num_tokens:
        raise ConfigError(f"the teacher must have the student's tokens: got {len(teacher)} and {num_tokens}.")
    check_computable(objective)


def check_computable(objective: Objective) -> None:
    """Refuse what cannot be computed from a few tokens and a tail.

    Args:
        objective: what to minimize.

    Raises:
        ConfigError: a temperature, or a part that needs the whole distribution.
    """
    refused = [part for part in objective.terms if part not in COMPUTABLE]
    if refused:
        raise ConfigError(
            f"`loss_type` must be computable from the top k and a tail: got {refused[0]!r}, which needs every "
            f"token's probability. Use one of {list(COMPUTABLE)}, or a cache of kind 'hidden'."
        )
    if objective.temperature != 1:
        raise ConfigError(
            f"`temperature` must be 1 with the top k and a tail: got temperature={objective.temperature!r}. How a "
            "temperature would change the tail depends on each of its tokens. Use 1.0, or a cache of kind 'hidden'."
        )
