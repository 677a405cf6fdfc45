"""What a student is trained to minimize, as one frozen value: which divergences, how much of each, how warm.

Per target token, with D over the distributions at `temperature` and CE at temperature 1:

    loss = sum_k weight_k * D_k * (temperature ** 2 if rescale_temperature else 1)  +  ce_weight * CE

`cakld` is no divergence of its own here: it hands `gamma` of its weight to `reverse_kl` and the rest to `forward_kl`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Literal

from torch import Tensor

from bitdistiller_peft.errors import ConfigError, UnknownNameError
from bitdistiller_peft.losses.cakld import GAMMA_ADVICE
from bitdistiller_peft.losses.divergences import check_unit_interval
from bitdistiller_peft.losses.registry import divergence_names


@dataclass(frozen=True)
class Objective:
    """What to minimize.

    Attributes:
        loss_type: `"cakld"`, `"forward_kl"`, `"reverse_kl"`, `"jsd"`, `"ce"`, the name of a registered divergence, or
            `"mixture"`, which takes its parts from `weights`.
        gamma: for a loss with a `cakld` part: the teacher's confidence in [0, 1], 1 being reverse KL, or `"per_token"`
            for its probability of each label in turn. It has no default: estimate it on the training data.
        temperature: both sides' logits are divided by it before they are compared; positive. Cross-entropy,
            confidence, agreement and entropies stay at 1.
        rescale_temperature: multiply divergences by `temperature ** 2`, which keeps their gradients at the size that
            they have at temperature 1 (Hinton et al., 2015). Statistics are never rescaled.
        ce_weight: how much cross-entropy with the labels to add; not negative.
        jsd_beta: the teacher's share of the mixture in `jsd`, in [0, 1]; see `jensen_shannon`.
        largest_gamma: what `gamma` may be at most; above 1, the weight of forward KL turns negative, as it can in
            BitDistiller's released code.
        weights: for `loss_type="mixture"`: part to weight, not negative, e.g. ``{"cakld": 1.0, "ce": 0.1}``. A part of
            weight 0 is measured and not trained.

    Raises:
        ConfigError: a setting that cannot work; all of them are named at once.
        UnknownNameError: a loss type or part that nobody registered.

    Example:
        >>> Objective("cakld", gamma=0.37, ce_weight=0.1).terms
        {'cakld': 1.0, 'ce': 0.1}
    """

    loss_type: str
    gamma: float | Literal["per_token"] | None = None
    temperature: float = 1.0
    rescale_temperature: bool = True
    ce_weight: float = 0.0
    jsd_beta: float = 0.5
    weights: Mapping[str, float] | None = field(default=None, hash=False)
    largest_gamma: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what cannot work, and keep a copy of `weights` of one's own."""
        known = {*divergence_names(), "cakld", "ce"}
        if self.loss_type not in {*known, "mixture"}:
            raise UnknownNameError("loss_type", self.loss_type, {*known, "mixture"})
        for part in self.weights or ():
            if part not in known:
                raise UnknownNameError("weights", part, known)
        faults = [*self._number_faults(), *self._weight_faults(), *self._gamma_faults()]
        if faults:
            raise ConfigError("\n".join(faults))
        if self.weights is not None:
            object.__setattr__(self, "weights", dict(self.weights))

    @property
    def terms(self) -> dict[str, float]:
        """Every part and its weight, `cakld` and `ce` included; zeros only where `weights` asked for them."""
        weights = {self.loss_type: 1.0} if self.weights is None else self.weights
        terms = {part: float(weight) for part, weight in weights.items()}
        if self.ce_weight:
            terms["ce"] = self.ce_weight
        return terms

    @property
    def needs_teacher(self) -> bool:
        """Whether anything but cross-entropy is asked for."""
        return any(part != "ce" for part in self.terms)

    @property
    def divergence_factor(self) -> float:
        """What every divergence is multiplied by on its way into the loss."""
        return self.temperature**2 if self.rescale_temperature else 1.0

    def parted(self) -> tuple[Objective, Objective]:
        """Split into the divergences and the cross-entropy, each with its weights, to take them over other tokens."""
        terms = self.terms
        divergences = {part: weight for part, weight in terms.items() if part != "ce"}
        return (
            replace(self, loss_type="mixture", weights=divergences, ce_weight=0.0),
            replace(self, loss_type="mixture", weights={"ce": terms.get("ce", 0.0)}, ce_weight=0.0, gamma=None),
        )

    def coefficients(self, confidence: Tensor) -> dict[str, float | Tensor]:
        """Resolve `cakld` into its two directions.

        Args:
            confidence: the teacher's probability of each label, `[tokens]`.

        Returns:
            Divergence to weight: a number, or `[tokens]` where `gamma` is `"per_token"`. Without `ce`.
        """
        resolved: dict[str, float | Tensor] = {k: v for k, v in self.terms.items() if k not in ("cakld", "ce")}
        weight = self.terms.get("cakld")
        if weight is not None and self.gamma is not None:
            gamma = confidence if isinstance(self.gamma, str) else self.gamma
            resolved["reverse_kl"] = resolved.get("reverse_kl", 0.0) + weight * gamma
            resolved["forward_kl"] = resolved.get("forward_kl", 0.0) + weight * (1 - gamma)
        return resolved

    def _number_faults(self) -> list[str]:
        faults = []
        if not (_is_number(self.temperature) and self.temperature > 0):
            faults.append(
                f"`temperature` must be positive: got temperature={self.temperature!r}. Use 1.0 to compare as is."
            )
        if not (_is_number(self.ce_weight) and self.ce_weight >= 0):
            faults.append(f"`ce_weight` must not be negative: got ce_weight={self.ce_weight!r}. Use 0.0 for none.")
        return faults + _unit_faults("jsd_beta", self.jsd_beta, "Use 0.5 for the symmetric divergence.")

    def _weight_faults(self) -> list[str]:
        if (self.loss_type == "mixture") != (self.weights is not None):
            return [
                "`weights` must be given for loss_type='mixture', and only there: got "
                f"loss_type={self.loss_type!r}, weights={self.weights!r}. "
                "Use Objective('mixture', weights={'forward_kl': 1.0, 'reverse_kl': 1.0})."
            ]
        faults = []
        if self.ce_weight and (self.loss_type == "ce" or "ce" in (self.weights or ())):
            faults.append(f"`ce_weight` must be 0 where the loss names 'ce' itself: got ce_weight={self.ce_weight!r}.")
        if self.weights is not None:
            values = list(self.weights.values())
            if not all(_is_number(value) and value >= 0 for value in values) or not any(values):
                faults.append(
                    "`weights` must not be negative, and one must be positive: got "
                    f"weights={dict(self.weights)}. Leave out what the loss has no part of."
                )
        return faults

    def _gamma_faults(self) -> list[str]:
        has_cakld = self.loss_type == "cakld" or "cakld" in (self.weights or ())
        if has_cakld and self.gamma is None:
            return ["`gamma` must be given for 'cakld': got gamma=None. " + GAMMA_ADVICE]
        if not has_cakld and self.gamma is not None:
            return [
                f"`gamma` must be left out where the loss has no 'cakld' part: got gamma={self.gamma!r}, "
                f"loss_type={self.loss_type!r}. Use loss_type='cakld', or gamma=None."
            ]
        if self.gamma is None or self.gamma == "per_token":
            return []
        if _is_number(self.gamma) and 1 < float(self.gamma) <= self.largest_gamma:
            return []
        return _unit_faults("gamma", self.gamma, GAMMA_ADVICE + " Or gamma='per_token'.")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _unit_faults(name: str, value: object, advice: str) -> list[str]:
    try:
        check_unit_interval(name, value, advice)
    except ConfigError as fault:
        return [str(fault)]
    return []
