"""What the doctor measures: some rows of every quantized weight, looked at again whenever the trainer logs.

A look costs the same for every model: about `LOOK_WEIGHTS` weights in all, evenly spread over the rows of all layers.
On one CPU core that is a tenth of a second; what is kept between looks is three bytes for each of them.

Oscillation follows Nagel et al., "Overcoming Oscillations in Quantization-Aware Training" (arXiv 2203.11086): a code
oscillates where it changes in the direction opposite to its last change. They look at every step and average over time;
here, "time" is the log interval, and a code counts for `OSCILLATION_LOOKS` looks. So what swings faster than the log is
seen only in part.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitdistiller_peft.layers import SCALE, SCALE_NEGATIVE, companion, is_sharded, latent_weight, packed_params
from bitdistiller_peft.quantizers import QuantParams, QuantSpec, get_quantizer, store_learned_params, to_groups
from bitdistiller_peft.training.metrics import trained_weights

LOOK_WEIGHTS = 1 << 20
"""Weights looked at, in all: enough for shares that are right to a tenth of a percent."""
OSCILLATION_LOOKS = 4
"""For how many looks a code that flipped back counts as oscillating."""
MOST_LEVELS = 16
"""Levels up to which unused ones are counted; the tails of an 8-bit grid are rarely used, which means nothing."""
NEVER = 127  # looks since a code flipped back, where it never did; an int8
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Look:
    """Counts of one layer.

    Attributes:
        counts: name to how many of how many.
        drift: relative change of each scale since the start, on the CPU; may be empty.
    """

    counts: Mapping[str, tuple[float, float]]
    drift: Tensor


class Probe:
    """Some rows of one quantized weight.

    Args:
        module: holds it.
        name: of the parameter.
        spec: how it is quantized.
        num_weights: how many to look at, at least a row.
        expects_scales: whether scales should move: they are trained, and not at a learning rate of 0.
    """

    def __init__(
        self, module: nn.Module, name: str, *, spec: QuantSpec, num_weights: int, expects_scales: bool
    ) -> None:
        self._module, self._name, self._spec = module, name, spec
        weight = getattr(module, name)
        self._step = -(-weight.numel() // max(num_weights, weight.shape[-1]))
        scale = companion(module, name, SCALE)
        self._expects_scales = expects_scales and isinstance(scale, nn.Parameter) and scale.requires_grad
        groups, params = self._now()
        self._codes = self._round(groups, params)
        self._direction = torch.zeros_like(self._codes, dtype=torch.int8)
        self._since_back = torch.full_like(self._direction, NEVER)
        self._scales = self._raw_scales(params).clone()
        floor = torch.finfo(spec.scale_dtype).tiny
        # the scale of an absent sign is at its floor, and that of a group of zeros has no gradient
        self._is_comparable = self._scales > floor
        self._may_die = self._is_comparable | (not spec.grid.has_negative_scale)
        self._may_die &= groups.abs().amax(-1).repeat(len(self._scales) // len(groups), 1) > 0
        is_trained_in_half = weight.requires_grad and weight.dtype in HALF
        self._weights = groups.clone() if is_trained_in_half else None

    def look(self) -> Look:
        """Measure, and keep what the next look compares with."""
        groups, params = self._now()
        levels = self._levels(groups, params)
        codes = self._round(groups, params)
        is_clamped = _beyond(groups, levels)
        counts = {"oscillation": _share(self._swing(codes)), "clamped": _share(is_clamped)}
        if levels.shape[-1] <= MOST_LEVELS:
            used = torch.bincount(codes.flatten().int(), minlength=levels.shape[-1])
            counts["dead_levels"] = _share(used == 0)
        scales = self._raw_scales(params)
        if self._expects_scales:
            is_dead = (scales <= torch.finfo(self._spec.scale_dtype).tiny) | (scales == self._scales)
            counts["dead_scales"] = _share(is_dead, self._may_die)
        if self._weights is not None:
            counts["stuck_weights"] = _share(groups == self._weights, ~is_clamped)
            self._weights = groups.clone()
        drift = (scales / self._scales - 1).abs()[self._is_comparable]
        numbers = torch.stack([torch.stack(pair) for pair in counts.values()]).tolist()  # one wait for the device
        return Look({name: (part, whole) for name, (part, whole) in zip(counts, numbers, strict=True)}, drift.cpu())

    def _cut(self, tensor: Tensor) -> Tensor:
        """Every so many rows of a weight ``[..., out, in]`` or of its parameters; all rows may share one parameter."""
        return tensor.detach().flatten(0, -2)[:: self._step]

    def _now(self) -> tuple[Tensor, QuantParams]:
        """Groups ``[rows, groups, group]`` in fp32, and the parameters in force ``[rows, groups]``."""
        weight, spec = latent_weight(self._module, self._name), self._spec
        groups = to_groups(self._cut(weight).float(), spec.group_size)
        if companion(self._module, self._name, SCALE) is not None:
            learned = (None if p is None else self._cut(p) for p in packed_params(self._module, self._name))
            return groups, store_learned_params(QuantParams(*learned), spec)  # type: ignore[arg-type]
        is_shared = spec.group_size == "tensor"  # then the rows that are not looked at count too
        whole = to_groups(weight.detach().float(), "tensor") if is_shared else groups
        return groups, get_quantizer(spec.grid).find_params(whole, spec)

    def _round(self, groups: Tensor, params: QuantParams) -> Tensor:
        return get_quantizer(self._spec.grid).quantize(groups, params, self._spec).to(torch.uint8)

    def _levels(self, groups: Tensor, params: QuantParams) -> Tensor:
        """The values of all codes of every group, ascending: ``[rows, groups, levels]``."""
        codes = torch.arange(self._spec.grid.num_levels, device=groups.device)
        every = codes.expand(*groups.shape[:-1], len(codes))
        return get_quantizer(self._spec.grid).dequantize(every, params, self._spec).sort(-1).values

    def _raw_scales(self, params: QuantParams) -> Tensor:
        """The scales as they are trained, or else as they are stored, of both signs, one below the other."""
        found = []
        for suffix, stored in ((SCALE, params.scale), (SCALE_NEGATIVE, params.scale_negative)):
            learned = companion(self._module, self._name, suffix)
            tensor = stored if learned is None else self._cut(learned)
            found += [] if tensor is None else [tensor.float()]
        return torch.cat(found)

    def _swing(self, codes: Tensor) -> Tensor:
        """Which codes flipped back within the last looks."""
        change = (codes.short() - self._codes.short()).sign().to(torch.int8)
        is_back = (change != 0) & (change == -self._direction)
        self._since_back = torch.where(is_back, 0, self._since_back.clamp(max=NEVER - 1) + 1)
        self._direction = torch.where(change != 0, change, self._direction)
        self._codes = codes
        return self._since_back < OSCILLATION_LOOKS


def _share(chosen: Tensor, among: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """How many were chosen, and among how many."""
    among = torch.ones_like(chosen) if among is None else among
    return (chosen & among).sum(), among.sum()


def _beyond(groups: Tensor, levels: Tensor) -> Tensor:
    """Which weights lie beyond the outermost levels by more than half a step."""
    lowest = levels[..., :1] - (levels[..., 1:2] - levels[..., :1]) / 2
    highest = levels[..., -1:] + (levels[..., -1:] - levels[..., -2:-1]) / 2
    return (groups < lowest) | (groups > highest)


class Probes:
    """A probe in every quantized weight of a student; weights that are sharded (FSDP2) are not looked at.

    Args:
        model: the student.
        expects_scales: whether learned scales should move.
        num_weights: how many weights to look at, in all.
    """

    def __init__(self, model: nn.Module, *, expects_scales: bool = True, num_weights: int = LOOK_WEIGHTS) -> None:
        names = {id(module): name for name, module in model.named_modules()}
        weights = [entry for entry in trained_weights(model) if not is_sharded(getattr(entry[0], entry[1]))]
        each = num_weights // max(1, len(weights))
        with torch.no_grad():
            self._probes = {
                _short(f"{names[id(module)]}.{name}"): Probe(
                    module, name, spec=spec, num_weights=each, expects_scales=expects_scales
                )
                for module, name, spec in weights
            }
        self.by_layer: dict[str, dict[str, float]] = {}

    def look(self) -> dict[str, float]:
        """Shares over the whole model, each in [0, 1], and the drift of scales; the same by layer in `by_layer`.

        Returns:
            ``oscillation``, ``clamped``, ``dead_levels``, ``scale_drift`` (median), ``scale_drift_max``; and
            ``dead_scales`` where scales are trained, ``stuck_weights`` where master weights are in half precision.
        """
        with torch.no_grad():
            looks = {name: probe.look() for name, probe in self._probes.items()}
        self.by_layer = {name: _shares([look]) for name, look in looks.items()}
        return _shares(list(looks.values()))


def _short(name: str) -> str:
    """The name of a weight as it is in the full-precision model."""
    return re.sub(r"\.bitdistiller_(\w+)\.[^.]+\.weight$", r".\1", name).removeprefix("base_model.model.")


def _shares(looks: list[Look]) -> dict[str, float]:
    names = sorted({name for look in looks for name in look.counts})
    shares = {}
    for name in names:
        pairs = [look.counts[name] for look in looks if name in look.counts]
        count, total = (sum(pair[side] for pair in pairs) for side in (0, 1))
        shares[name] = count / total if total else 0.0
    drifts = [look.drift for look in looks if look.drift.numel()]
    if drifts:
        every = torch.cat(drifts)
        shares |= {"scale_drift": float(every.median()), "scale_drift_max": float(every.max())}
    return shares
