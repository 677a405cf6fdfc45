"""How sure the teacher is of the training data, before training: CAKLD's gamma.

Everything random here draws from a generator of its own, and what the machinery draws from the global one is given
back, so that a run with an estimated gamma is the same run as one that was given this number.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from bitdistiller_peft.errors import DataError
from bitdistiller_peft.losses import IGNORE_INDEX, ConfidenceSums, shift_labels, teacher_confidence
from bitdistiller_peft.training.forward import HiddenStates, SparseStates

_COLUMNS = ("input_ids", "labels", "attention_mask", "seq_lengths", "position_ids", "token_type_ids")


def estimate_gamma(
    answer: Callable[[Mapping[str, Any]], HiddenStates | SparseStates],
    batches: Iterable[Mapping[str, Any]],
    accelerator: Accelerator,
    *,
    tile_tokens: int | None = None,
) -> float:
    """Average the teacher's probability of the actual next token over target tokens, over all ranks.

    Args:
        answer: the teacher.
        batches: this rank's share, with `labels`.
        accelerator: sums over ranks.
        tile_tokens: tokens whose logits are held at once.

    Raises:
        DataError: the batches hold no target token, on any rank.
    """
    total = torch.zeros(2, dtype=torch.float32, device=accelerator.device)
    for batch in batches:
        labels: Tensor = batch["labels"]
        sums = _confidence(answer(batch), shift_labels(labels).flatten(), tile_tokens)
        total += torch.stack([sums.confidence.float(), sums.confidence.new_tensor(sums.num_targets)]).to(total)
    confidence, count = accelerator.reduce(total, reduction="sum").tolist()
    if not count:
        raise DataError(
            "`gamma` needs target tokens to be estimated: got none in the sampled training batches. "
            "Raise gamma_num_batches, check the labels, or give gamma a number."
        )
    # rounding over many tokens must not leave [0, 1]
    return min(1.0, max(0.0, confidence / count))


def _confidence(states: HiddenStates | SparseStates, labels: Tensor, tile_tokens: int | None) -> ConfidenceSums:
    if isinstance(states, HiddenStates):  # it leads: the labels follow it to its device
        return teacher_confidence(states.hidden.flatten(0, 1), states.head, labels, tile_tokens=tile_tokens)
    known = states.flat(labels.device)
    rows = (labels != IGNORE_INDEX).nonzero().flatten()
    best = known[rows].normalized()[0].amax(-1).exp().sum()
    return ConfidenceSums(known[rows].of(labels[rows]).sum(), best, len(rows))


def sample_batches(
    dataset: Any,
    collate: Callable[[list[Any]], Mapping[str, Any]],
    accelerator: Accelerator,
    *,
    batch_size: int,
    num_batches: int,
    seed: int,
    keep_columns: bool = False,
) -> Iterator[Mapping[str, Any]]:
    """Draw training examples at random (the first ones of a stream), this rank's share of them, in batches.

    Which examples are drawn depends on the product of ranks, batch size and number of batches only, so one process
    and two with half the batch see the same.

    Args:
        dataset: of the trainer, prepared.
        collate: the trainer's collator.
        accelerator: knows the ranks.
        batch_size: examples per batch and rank.
        num_batches: batches per rank.
        seed: of the draw.
        keep_columns: hand every column to the collator, not only those that a language model reads.
    """
    wanted = batch_size * num_batches * accelerator.num_processes
    shard = slice(accelerator.process_index, None, accelerator.num_processes)

    def collate_columns(rows: list[Any]) -> Mapping[str, Any]:
        return collate(rows if keep_columns else [{k: v for k, v in row.items() if k in _COLUMNS} for row in rows])

    generator = torch.Generator().manual_seed(seed)
    if hasattr(dataset, "__len__"):
        order = torch.randperm(len(dataset), generator=generator)[:wanted].tolist()
        examples: Any = Subset(dataset, order[shard])
    else:
        examples = list(itertools.islice(dataset, wanted))[shard]
    loader = DataLoader(examples, batch_size, collate_fn=collate_columns, generator=generator)
    for batch in loader:
        yield {
            name: value.to(accelerator.device) if isinstance(value, Tensor) else value for name, value in batch.items()
        }
