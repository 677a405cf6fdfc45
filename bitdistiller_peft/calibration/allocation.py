"""Different widths for different layers, under a limit on the size of the file.

How much a layer suffers is measured: it alone is quantized, at each width, and the divergence of the predictions from
those of the full-precision model is taken. Layers that serving engines fuse (queries, keys and values; gate and up)
stay at one width. Then the widths with the smallest sum of divergences are chosen whose file fits: scales, zero points,
norms, embeddings, head and header included. That divergences add up is an assumption, and what is trained afterwards
makes up for part of each; the size is not: it is what `save_pretrained` writes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bitdistiller_peft.calibration.api import calibrate
from bitdistiller_peft.calibration.knapsack import choose
from bitdistiller_peft.calibration.slots import Display, Slot, find_student
from bitdistiller_peft.calibration.texts import batches_of, check_length, token_windows
from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.hub.file_size import check_no_experts, packed_file_bytes
from bitdistiller_peft.hub.modules import weight_shape
from bitdistiller_peft.layers import packed_bytes
from bitdistiller_peft.losses import forward_kl
from bitdistiller_peft.quantizers import QuantSpec
from bitdistiller_peft.tuner import BitDistillerConfig, borrowed, get_bitdistiller_model

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("w1", "w3"))


@dataclass(frozen=True)
class BitAllocation:
    """Widths for layers, and what they were chosen by.

    Attributes:
        bits: width of each quantized layer, by module name.
        num_bytes: size of the weights' file.
        bits_per_weight: the same, divided by all weights of the model, embeddings and head included.
        divergence: for each group of layers (names joined by commas), mean KL in nats per token at each width.
        predicted: sum of the divergences of the chosen widths.
    """

    bits: dict[str, int]
    num_bytes: int
    bits_per_weight: float
    divergence: dict[str, dict[int, float]]
    predicted: float

    def apply(self, config: BitDistillerConfig) -> BitDistillerConfig:
        """A copy of a config with these widths: the commonest as `bits`, the others as `overrides`.

        Args:
            config: the one that the widths were chosen for.
        """
        widths = list(self.bits.values())
        common = max(sorted(set(widths)), key=widths.count)
        others = {re.escape(name): {"bits": bits} for name, bits in self.bits.items() if bits != common}
        return dataclasses.replace(config, bits=common, overrides=others, target_modules=sorted(self.bits))

    def __str__(self) -> str:
        widths = list(self.bits.values())
        shares = ", ".join(f"{widths.count(bits)} layers at {bits} bits" for bits in sorted(set(widths)))
        return f"{shares}: {self.num_bytes:,} bytes, {self.bits_per_weight:.3f} bits per weight"


def allocate_bits(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str] | Tensor,
    config: BitDistillerConfig,
    *,
    bits_per_weight: float | None = None,
    num_bytes: int | None = None,
    choices: Sequence[int] = (2, 3, 4),
    num_samples: int = 4,
    seq_len: int = 256,
    show_progress: bool = True,
) -> BitAllocation:
    """Choose a width for every layer, so that the file fits a budget and the model suffers least.

    Args:
        model: the full-precision model; it is given back as it was.
        tokenizer: the model's tokenizer; `None` for token ids.
        texts: as for `calibrate`.
        config: grid, group size and targets; its `bits` and `overrides` are replaced.
        bits_per_weight: the budget: bits of the file for each weight of the model, embeddings and head included. Either
            this or `num_bytes`.
        num_bytes: the budget in bytes.
        choices: widths to choose from; the grid must have them.
        num_samples: windows to measure on; each width of each group costs a forward pass over them.
        seq_len: tokens in a window.
        show_progress: show a bar with the time left.

    Returns:
        The allocation; `apply` makes a config of it.

    Raises:
        ConfigError: no budget or two, one that even the smallest widths exceed, or a width that the grid has not.
        DataError: too little text.
        StateError, TargetError, GroupSizeError, WeightError: the model does not suit (fused experts do not); the layer
            is named.

    Example:
        >>> widths = allocate_bits(model, tokenizer, texts, config, bits_per_weight=4.0)  # doctest: +SKIP
        >>> student = get_bitdistiller_model(model, widths.apply(config))  # doctest: +SKIP
    """
    widths = _checked(choices, config)
    weights = sum(parameter.numel() for parameter in model.parameters())
    limit = _limit(bits_per_weight, num_bytes, weights)
    windows = token_windows(texts, tokenizer, num_samples, seq_len)
    check_length(model, windows.shape[1])
    batches = batches_of(windows, 1, next(model.parameters()).device)
    found: dict[str, dict[int, float]] = {}
    specs: dict[int, dict[str, QuantSpec]] = {}
    with borrowed(model):
        wanted = [model(input_ids=ids, use_cache=False).logits for ids in batches]
        for bits in widths:
            student = get_bitdistiller_model(model, dataclasses.replace(config, bits=bits, overrides={}))
            try:
                specs[bits] = _measure(student, batches, wanted, found, bits, show_progress)
            finally:
                student.unload()
    problem = _Problem(model, config, widths, specs, found)
    bits_of = problem.solve(limit)
    if bits_of is None:
        least = problem.file_bytes(dict.fromkeys(specs[widths[0]], widths[0]))
        raise ConfigError(
            f"the budget must leave room for {widths[0]} bits everywhere, {least:,} bytes or "
            f"{8 * least / weights:.3f} bits per weight: got {limit:,} bytes. Raise it, or quantize more layers."
        )
    size = problem.file_bytes(bits_of)
    predicted = sum(costs[bits_of[group.split(",")[0]]] for group, costs in found.items())
    return BitAllocation(bits_of, size, 8 * size / weights, found, predicted)


@dataclass(frozen=True)
class _Problem:
    """What is known when widths are to be chosen."""

    model: nn.Module
    config: BitDistillerConfig
    widths: list[int]
    specs: dict[int, dict[str, QuantSpec]]
    costs: dict[str, dict[int, float]]

    def file_bytes(self, bits: dict[str, int]) -> int:
        """The size of the file with these widths."""
        norms = {name for name in bits if self.config.inputs(name).norm_eps is not None}
        return packed_file_bytes(self.model, {name: self.specs[width][name] for name, width in bits.items()}, norms)

    def solve(self, limit: int) -> dict[str, int] | None:
        """The widths that cost least and fit, or None."""
        sizes = [[self._group_bytes(group, bits) for bits in self.widths] for group in self.costs]
        costs = [[prices[bits] for bits in self.widths] for prices in self.costs.values()]
        least = self.file_bytes(dict.fromkeys(self.specs[self.widths[0]], self.widths[0]))
        room = limit - least + sum(row[0] for row in sizes)
        while (picked := choose(sizes, costs, room)) is not None:
            pairs = zip(self.costs, picked, strict=True)
            bits = {name: self.widths[index] for group, index in pairs for name in group.split(",")}
            excess = self.file_bytes(bits) - limit
            if excess <= 0:
                return bits
            room -= excess  # a few digits more in the header
        return None

    def _group_bytes(self, group: str, bits: int) -> int:
        shapes = {name: weight_shape(self.model.get_submodule(name)) for name in group.split(",")}
        return sum(packed_bytes(self.specs[bits][name], shape) for name, shape in shapes.items())


def _checked(choices: Sequence[int], config: BitDistillerConfig) -> list[int]:
    widths = sorted(set(choices))
    if len(widths) < 2:
        raise ConfigError(f"`choices` must hold two widths or more: got choices={list(choices)!r}. Use (2, 3, 4).")
    for bits in widths:
        dataclasses.replace(config, bits=bits, overrides={})  # refuses a width that the grid has not
    return widths


def _limit(bits_per_weight: float | None, num_bytes: int | None, weights: int) -> int:
    if (bits_per_weight is None) == (num_bytes is None):
        raise ConfigError(
            f"`bits_per_weight` or `num_bytes` must be given, and not both: got bits_per_weight={bits_per_weight!r}, "
            f"num_bytes={num_bytes!r}. Use bits_per_weight=3.0."
        )
    return int(num_bytes) if num_bytes is not None else int((bits_per_weight or 0) * weights / 8)


def _measure(
    student: Any, batches: list[Tensor], wanted: list[Tensor], found: dict[str, dict[int, float]], bits: int, show: bool
) -> dict[str, QuantSpec]:
    """Quantize one group of layers after the other; the rest shows its full-precision weights."""
    base, slots = find_student(student)
    check_no_experts({slot.layer_name: slot.layer.base_layer for slot in slots})
    if all(_is_searchable(slot) for slot in slots):
        calibrate(student, None, None, objective="weight", show_progress=False)
    groups: dict[str, list[Slot]] = {}
    for slot in slots:
        groups.setdefault(_fused_name(slot.layer_name, {other.layer_name for other in slots}), []).append(slot)
    with borrowed(student), Display() as display, tqdm(total=len(groups), desc=f"{bits} bits", disable=not show) as bar:
        for slot in slots:
            display.show(slot, slot.layer.base_weight(slot.parameter))
        for group, members in groups.items():
            display.hide(members)
            divergences = [
                forward_kl(base(input_ids=ids, use_cache=False).logits[0].float(), expected[0].float()).mean()
                for ids, expected in zip(batches, wanted, strict=True)
            ]
            found.setdefault(group, {})[bits] = float(torch.stack(divergences).mean())
            for slot in members:
                display.show(slot, slot.layer.base_weight(slot.parameter))
            bar.update()
    return {slot.layer_name: slot.spec for slot in slots}


def _is_searchable(slot: Slot) -> bool:
    try:
        slot.check_searchable()
    except ConfigError:
        return False
    return True


def _fused_name(name: str, all_names: set[str]) -> str:
    parent, _, own = name.rpartition(".")
    for family in FUSED:
        if own in family:
            return ",".join(full for part in family if (full := f"{parent}.{part}") in all_names)
    return name
