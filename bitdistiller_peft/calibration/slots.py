"""The quantized parameters of a student, one by one, and what each shows to the layer that uses it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitdistiller_peft.calibration.clip import check_searchable
from bitdistiller_peft.errors import BitDistillerError, StateError, add_location
from bitdistiller_peft.kernels import fake_quantize
from bitdistiller_peft.layers import (
    SCALE,
    SUFFIXES,
    FakeQuantWeight,
    companion,
    has_update,
    quant_specs,
    quantized,
    set_learned_params,
)
from bitdistiller_peft.quantizers import QuantParams, QuantSpec, find_params, get_quantizer, to_groups
from bitdistiller_peft.tuner import BitDistillerEmbedding, BitDistillerLayer, BitDistillerModel


@dataclass(frozen=True)
class Slot:
    """One quantized parameter of the active student.

    Attributes:
        name: name of the parameter in the base model, e.g. ``"model.layers.0.mlp.up_proj.weight"``.
        layer_name: name of the layer that holds it.
        layer: the overlay.
        parameter: name of the parameter in the layer.
        student: its trainable weight.
    """

    name: str
    layer_name: str
    layer: BitDistillerLayer
    parameter: str
    student: FakeQuantWeight

    @property
    def spec(self) -> QuantSpec:
        """How the parameter is quantized."""
        return quant_specs(self.student)["weight"]

    @property
    def is_table(self) -> bool:
        """Whether it is an embedding's, whose rows are looked up and multiplied by nothing."""
        return isinstance(self.layer, BitDistillerEmbedding)

    @property
    def weight(self) -> Tensor:
        """The master weight ``[..., out, in]``."""
        return self.student.weight.detach()

    @property
    def has_learned_scale(self) -> bool:
        """Whether scales are trained, and therefore can be set; otherwise they follow from the weight."""
        return companion(self.student, "weight", SCALE) is not None

    def trained_tensors(self) -> dict[str, Tensor]:
        """The master weight and its companions, by suffix; the tensors themselves, not copies."""
        found = {suffix: companion(self.student, "weight", suffix) for suffix in ("", *SUFFIXES)}
        return {suffix: tensor.detach() for suffix, tensor in found.items() if tensor is not None}

    def check(self) -> None:
        """Refuse a weight that min-max could not quantize.

        Raises:
            WeightError, ScaleRangeError: NaN, Inf, or a scale out of range; the layer is named.
        """
        try:
            find_params(self.weight, self.spec)
        except BitDistillerError as error:
            raise add_location(error, f"layer {self.layer_name!r}") from None

    def check_searchable(self) -> None:
        """Refuse a grid whose scales do not follow from a range.

        Raises:
            ConfigError: see `clip.check_searchable`; the layer is named.
        """
        try:
            check_searchable(self.spec, clamp_weight=not self.has_learned_scale)
        except BitDistillerError as error:
            raise add_location(error, f"layer {self.layer_name!r}") from None

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor, *, clip_weight: bool) -> None:
        """Quantize within a range from now on.

        With learned scales, they (and the zero points) are set from the range; the master weight is clamped to the
        outermost levels only with `clip_weight`, which changes no quantized value. Without learned scales the master
        weight is always clamped to the range, since its min-max is what quantizes it.

        Args:
            low: lower ends, ``spec.param_shape(weight.shape)``.
            high: upper ends, same shape.
            clip_weight: also clamp the master weight.
        """
        if not self.has_learned_scale:
            self._clamp(low, high)
            return
        quantizer = get_quantizer(self.spec.grid)
        params = quantizer.params_from_range(low, high, self.spec)
        set_learned_params(self.student, "weight", params)
        if clip_weight:
            self._clamp(*self.outermost(params))

    @torch.no_grad()
    def quantized_in(self, low: Tensor, high: Tensor) -> Tensor:
        """What the student will show after `set_range`: fp32 values ``[..., out, in]``."""
        if not self.has_learned_scale:
            return fake_quantize(self.clipped(low, high), self.spec)
        params = get_quantizer(self.spec.grid).params_from_range(low, high, self.spec)
        return fake_quantize(
            self.weight,
            self.spec,
            scale=params.scale.float(),
            zero_point=params.zero_point,
            scale_negative=None if params.scale_negative is None else params.scale_negative.float(),
            scale_residual=params.scale_residual,
        )

    @torch.no_grad()
    def step_size(self) -> float:
        """Mean distance between neighbouring levels, in weight units."""
        _, params = quantized(self.student, "weight")
        lowest, highest = self.outermost(params)
        return float((highest - lowest).mean()) / (self.spec.grid.num_levels - 1)

    @torch.no_grad()
    def set_quantized(self, weight: Tensor, params: QuantParams, *, clip_weight: bool) -> None:
        """Take over a master weight and the parameters that quantize it, where scales are learned.

        Args:
            weight: the master weight.
            params: the parameters of each group.
            clip_weight: clamp the master weight to the outermost levels.
        """
        self.student.weight.copy_(weight)
        set_learned_params(self.student, "weight", params)
        if clip_weight:
            self._clamp(*self.outermost(params))

    def reset_params(self) -> None:
        """Where scales are learned, start them anew from the master weight.

        Raises:
            WeightError, ScaleRangeError: the weight cannot be quantized; the layer is named.
        """
        self.check()
        set_learned_params(self.student, "weight", find_params(self.weight, self.spec))

    def outermost(self, params: QuantParams) -> tuple[Tensor, Tensor]:
        """The lowest and the highest level of each group."""
        lowest = torch.zeros(params.scale.shape, device=params.scale.device).unsqueeze(-1)
        highest = lowest + (self.spec.grid.num_levels - 1)
        quantizer = get_quantizer(self.spec.grid)
        low, high = (quantizer.dequantize(codes, params, self.spec).squeeze(-1) for codes in (lowest, highest))
        return low, high

    def min_max(self) -> tuple[Tensor, Tensor]:
        """Each group's smallest and largest weight, zero included; shapes as for `set_range`."""
        low, high = torch.aminmax(to_groups(self.weight.float(), self.spec.group_size), dim=-1)
        return low.clamp(max=0), high.clamp(min=0)

    def clipped(self, low: Tensor, high: Tensor) -> Tensor:
        """The master weight clamped to a range; a new tensor."""
        groups = to_groups(self.weight, self.spec.group_size)
        low, high = (end.to(groups.dtype).unsqueeze(-1) for end in (low, high))
        return torch.clamp(groups, low, high).reshape(self.weight.shape)

    def _clamp(self, low: Tensor, high: Tensor) -> None:
        self.student.weight.copy_(self.clipped(low, high))


def find_student(model: nn.Module) -> tuple[nn.Module, list[Slot]]:
    """Find the active student of a model.

    Args:
        model: the `PeftModel` from `get_bitdistiller_model`, or its `BitDistillerModel`.

    Returns:
        The transformers model with the overlays in it, and all quantized parameters in the order of their modules.

    Raises:
        StateError: it is not such a model, or its adapter is merged, disabled or not active in some layer.
    """
    tuner = model if isinstance(model, BitDistillerModel) else getattr(model, "base_model", None)
    if not isinstance(tuner, BitDistillerModel):
        raise StateError(
            f"`model` must come from get_bitdistiller_model(): got {type(model).__name__}. Wrap the full-precision "
            "model first; a packed one cannot be calibrated any more."
        )
    layers = tuner.student_layers()
    if not layers:
        raise StateError("`model` must hold trained layers: got none. It was packed, merged or unloaded before.")
    return tuner.model, [slot for name, layer in layers for slot in slots_of(name, layer)]


def slots_of(name: str, layer: BitDistillerLayer) -> Iterator[Slot]:
    """The quantized parameters of one layer.

    Args:
        name: of the layer.
        layer: its overlay.

    Raises:
        StateError: its student is not in force, not in memory, or trained already.
    """
    if layer.merged:
        raise StateError(f"the adapter must not be merged: layer {name!r} is. Call unmerge_adapter() first.")
    if layer.disable_adapters:
        raise StateError(f"the adapter must be enabled: layer {name!r} is not. Leave disable_adapter() first.")
    for parameter in layer.parameter_names:
        student = layer.active_student(parameter)
        if student is None:
            raise StateError(
                f"the active adapter must cover every layer: layer {name!r} lacks {layer.active_adapters}. "
                "Choose another one with set_adapter()."
            )
        if student.weight.is_meta:
            raise StateError(f"the student must be in memory: layer {name!r} is on the meta device. Load its weights.")
        if has_update(student, "weight"):
            raise StateError(
                f"a student must be calibrated before it is trained with trainable='lora': layer {name!r} holds an "
                "update already. Call calibrate() first."
            )
        yield Slot(f"{name}.{parameter}", name, layer, parameter, student)


class Display:
    """Lets students show other weights than their own for a while; leaving the `with` block takes all of that back.

    Showing a quantized weight that was made once also saves quantizing it again on every forward pass.
    """

    def __init__(self) -> None:
        self._shown: dict[int, FakeQuantWeight] = {}

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *error: object) -> None:
        self.clear()

    def show(self, slot: Slot, weight: Tensor) -> None:
        """Present `weight` in place of the slot's fake-quantized one."""
        self._shown[id(slot.student)] = slot.student
        slot.student.__dict__["forward"] = lambda dtype=torch.float32: weight.to(dtype)

    def hide(self, slots: Iterable[Slot]) -> None:
        """Let some students speak for themselves again."""
        for slot in slots:
            self._shown.pop(id(slot.student), slot.student).__dict__.pop("forward", None)

    def clear(self) -> None:
        """Let all students speak for themselves again."""
        for student in self._shown.values():
            student.__dict__.pop("forward", None)
        self._shown.clear()
