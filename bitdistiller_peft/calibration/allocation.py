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
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bitdistiller_peft.calibration.api import calibrate
from bitdistiller_peft.calibration.problem import Problem
from bitdistiller_peft.calibration.slots import Display, Slot, find_student
from bitdistiller_peft.calibration.texts import batches_of, check_length, token_windows
from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.hub.file_size import check_no_experts
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
        embedding_bits: width of the embedding (and of a head tied to it); `None` for full precision.
        head_bits: width of a head of its own.
    """

    bits: dict[str, int]
    num_bytes: int
    bits_per_weight: float
    divergence: dict[str, dict[int, float]]
    predicted: float
    embedding_bits: int | None = None
    head_bits: int | None = None

    def apply(self, config: BitDistillerConfig) -> BitDistillerConfig:
        """A copy of a config with these widths: the commonest as `bits`, the others as `overrides`.

        Args:
            config: the one that the widths were chosen for.
        """
        widths = list(self.bits.values())
        common = max(sorted(set(widths)), key=widths.count)
        others = {re.escape(name): {"bits": bits} for name, bits in self.bits.items() if bits != common}
        return dataclasses.replace(
            config,
            bits=common,
            overrides=others,
            target_modules=sorted(self.bits),
            embedding_bits=self.embedding_bits,
            head_bits=self.head_bits,
        )

    def __str__(self) -> str:
        widths = list(self.bits.values())
        shares = ", ".join(f"{widths.count(bits)} layers at {bits} bits" for bits in sorted(set(widths)))
        for name, width in (("embedding", self.embedding_bits), ("head", self.head_bits)):
            shares += "" if width is None else f", {name} at {width} bits"
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
    table_choices: Sequence[int] = (),
    num_samples: int = 4,
    seq_len: int = 256,
    show_progress: bool = True,
) -> BitAllocation:
    """Choose a width for every layer, so that the file fits a budget and the model suffers least.

    Args:
        model: the full-precision model; it is given back as it was.
        tokenizer: the model's tokenizer; `None` for token ids.
        texts: as for `calibrate`.
        config: grid, group size and targets; its `bits` and `overrides` are replaced. Its `embedding_bits` and
            `head_bits` are kept, unless `table_choices` are given.
        bits_per_weight: the budget: bits of the file for each weight of the model, embeddings and head included. Either
            this or `num_bytes`.
        num_bytes: the budget in bytes.
        choices: widths to choose from; the grid must have them.
        table_choices: widths to choose from for the embedding and the head, e.g. `(4, 8)`; they then are quantized.
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
    tables: set[str] = set()
    with borrowed(model):
        wanted = [model(input_ids=ids, use_cache=False).logits for ids in batches]
        for trial in _trials(config, widths, table_choices):
            student = get_bitdistiller_model(model, trial.config)
            try:
                measured = _measure(student, batches, wanted, found, trial, show_progress)
            finally:
                student.unload()
            specs.setdefault(trial.bits, {}).update(measured)
            tables |= measured.keys() if trial.is_of_tables else set()
    norms = {name for name in specs[widths[0]] if name not in tables and config.inputs(name).norm_eps is not None}
    problem = Problem(model, specs, found, norms)
    bits_of = problem.solve(limit)
    if bits_of is None:
        least = problem.file_bytes(problem.smallest())
        raise ConfigError(
            f"the budget must leave room for {widths[0]} bits everywhere, {least:,} bytes or "
            f"{8 * least / weights:.3f} bits per weight: got {limit:,} bytes. Raise it, or quantize more layers."
        )
    size, predicted = problem.file_bytes(bits_of), problem.cost(bits_of)
    of_tables = [_width_of(model, kind, bits_of, tables) for kind in ("input", "output")]
    layers = {name: bits for name, bits in bits_of.items() if name not in tables}
    return BitAllocation(layers, size, 8 * size / weights, found, predicted, *of_tables)


@dataclass(frozen=True)
class _Trial:
    """One width, for the layers or for embedding and head."""

    config: BitDistillerConfig
    bits: int
    is_of_tables: bool


def _trials(config: BitDistillerConfig, widths: Sequence[int], table_widths: Sequence[int]) -> Iterator[_Trial]:
    plain = dataclasses.replace(config, overrides={}, embedding_bits=None, head_bits=None)
    for bits in widths:
        yield _Trial(dataclasses.replace(plain, bits=bits), bits, False)
    if table_widths:
        for bits in sorted(set(table_widths)):
            yield _Trial(dataclasses.replace(plain, embedding_bits=bits, head_bits=bits), bits, True)
        return
    if config.embedding_bits is not None:
        yield _Trial(dataclasses.replace(plain, embedding_bits=config.embedding_bits), config.embedding_bits, True)
    if config.head_bits is not None:
        yield _Trial(dataclasses.replace(plain, head_bits=config.head_bits), config.head_bits, True)


def _width_of(model: nn.Module, kind: str, bits_of: Mapping[str, int], tables: Collection[str]) -> int | None:
    get = getattr(model, f"get_{kind}_embeddings", None)
    table = None if get is None else get()
    return next((bits_of[name] for name in tables if model.get_submodule(name) is table), None)


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
    student: Any,
    batches: list[Tensor],
    wanted: list[Tensor],
    found: dict[str, dict[int, float]],
    trial: _Trial,
    show: bool,
) -> dict[str, QuantSpec]:
    """Quantize one group of layers after the other; the rest shows its full-precision weights."""
    base, every = find_student(student)
    tables = student.peft_config[student.active_adapter].table_bits
    slots = [slot for slot in every if (slot.layer_name in tables) == trial.is_of_tables]
    check_no_experts({slot.layer_name: slot.layer.base_layer for slot in slots})
    if all(_is_searchable(slot) for slot in slots):
        skip = {re.escape(slot.layer_name) for slot in every} - {re.escape(slot.layer_name) for slot in slots}
        calibrate(student, None, None, objective="weight", skip=skip, show_progress=False)
    groups: dict[str, list[Slot]] = {}
    for slot in slots:
        groups.setdefault(_fused_name(slot.layer_name, {other.layer_name for other in slots}), []).append(slot)
    with (
        borrowed(student),
        Display() as display,
        tqdm(total=len(groups), desc=f"{trial.bits} bits", disable=not show) as bar,
    ):
        for slot in every:
            display.show(slot, slot.layer.base_weight(slot.parameter))
        for group, members in groups.items():
            display.hide(members)
            divergences = [
                forward_kl(base(input_ids=ids, use_cache=False).logits[0].float(), expected[0].float()).mean()
                for ids, expected in zip(batches, wanted, strict=True)
            ]
            found.setdefault(group, {})[trial.bits] = float(torch.stack(divergences).mean())
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
