"""What training on a mixture did, source by source: how far the student is from its teacher on texts of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.evaluation.divergence import DivergenceResult, evaluate_divergence


@dataclass(frozen=True)
class SourceDivergences:
    """Divergences by source; `print` it for a table.

    Attributes:
        results: by name of the source.
    """

    results: dict[str, DivergenceResult]

    def __str__(self) -> str:
        return "\n".join(f"{name}: {result}" for name, result in self.results.items())

    def since(self, before: SourceDivergences) -> str:
        """A table of what changed since an earlier measurement.

        Args:
            before: of the same sources under the same protocol.

        Raises:
            ConfigError: other sources, or another protocol.
        """
        for name in sorted(self.results.keys() | before.results.keys()):
            now, then = self.results.get(name), before.results.get(name)
            if now is None or then is None or now.protocol != then.protocol:
                raise ConfigError(
                    f"`before` must be measured on the same sources in the same way: source {name!r} is not. Call "
                    "evaluate_sources with the same texts and options."
                )
        lines = ["source  KL before  KL now  change  top-1 before  top-1 now"]
        for name, now in self.results.items():
            then = before.results[name]
            change = now.mean_kl_nats / then.mean_kl_nats - 1 if then.mean_kl_nats else float("nan")
            lines.append(
                f"{name}  {then.mean_kl_nats:.4f}  {now.mean_kl_nats:.4f}  {change:+.1%}  {then.top1_agreement:.1%}  "
                f"{now.top1_agreement:.1%}"
            )
        return "\n".join(lines)


def evaluate_sources(
    student: nn.Module,
    teacher: nn.Module | Literal["self"],
    tokenizer: Any,
    texts: Mapping[str, str | Sequence[str]],
    **options: Any,
) -> SourceDivergences:
    """Compare a student with its teacher on held-out texts of each source of a mixture.

    Args:
        student: as for `evaluate_divergence`.
        teacher: as for `evaluate_divergence`.
        tokenizer: the tokenizer of both.
        texts: one text, or rows, by name of the source; none of it trained on.
        options: of `evaluate_divergence`, e.g. `seq_len`, `max_chunks`.

    Raises:
        ConfigError: no source.
        BitDistillerError: see `evaluate_divergence`.
    """
    if not texts:
        raise ConfigError("`texts` must name a source: got none. Pass {'web': text}.")
    return SourceDivergences(
        {name: evaluate_divergence(student, teacher, tokenizer, text, **options) for name, text in texts.items()}
    )
