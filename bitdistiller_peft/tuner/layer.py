"""The overlay: a frozen base layer, and beside it one trainable fake-quantized weight per adapter.

`disable_adapter()` therefore is the full-precision teacher, exactly. The base layer may be a linear layer, a `Conv1D`
(GPT-2; its weight is stored transposed), fused experts (several 3-D parameters), or an embedding with a tied head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bitdistiller_peft.errors import ConfigError, StateError, WeightError
from bitdistiller_peft.hub.modules import expert_parameters
from bitdistiller_peft.kernels import compute_dtype
from bitdistiller_peft.layers import (
    NO_CHANGE,
    FakeQuantWeight,
    InputSpec,
    SubLN,
    Trained,
    forward_with,
    linear,
    quant_specs,
    weight_dtype,
)
from bitdistiller_peft.quantizers import QuantSpec

PREFIX = "bitdistiller_"
NORM = PREFIX + "subln"  # a name ending in "norm" would be taken for one by `modules_to_save=["norm"]`


class BitDistillerLayer(nn.Module, BaseTunerLayer):
    """What both overlays share. Each quantized parameter ``p`` has a `ModuleDict` ``bitdistiller_p`` keyed by adapter.

    ``bitdistiller_subln`` holds the `SubLN` of each adapter that has one.

    Args:
        base_layer: the layer to stand for; its parameters stay as they are.
        parameter_names: its parameters to quantize, e.g. ``("weight",)``.
    """

    def __init__(self, base_layer: nn.Module, parameter_names: tuple[str, ...]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.parameter_names = parameter_names
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._before_merge: dict[str, Tensor] = {}
        for name in parameter_names:
            setattr(self, PREFIX + name, nn.ModuleDict())
        setattr(self, NORM, nn.ModuleDict())
        self.activation_bits: dict[str, int | None] = {}
        self.adapter_layer_names = (*(PREFIX + name for name in parameter_names), NORM)

    def base_weight(self, name: str) -> Tensor:
        """The full-precision weight ``[..., out, in]`` (a view, transposed for `Conv1D`), also while one is merged."""
        weight = self._before_merge.get(name, getattr(self.base_layer, name).detach())
        return weight.T if isinstance(self.base_layer, Conv1D) else weight

    def student(self, name: str, adapter_name: str) -> FakeQuantWeight:
        """The trainable weight of a parameter under an adapter."""
        module: FakeQuantWeight = getattr(self, PREFIX + name)[adapter_name]
        return module

    def update_layer(
        self,
        adapter_name: str,
        spec: QuantSpec,
        *,
        trained: Trained,
        inputs: InputSpec = NO_CHANGE,
        master_dtype: torch.dtype | None = torch.float32,
        inference_mode: bool = False,
    ) -> None:
        """Add an adapter: a copy of the base weights to train, and the learned parameters started from min-max.

        Args:
            adapter_name: its name.
            spec: how the weights are quantized.
            trained: which of its tensors are trained.
            inputs: what happens to the inputs first: a `SubLN` with trained gains, int8 activations.
            master_dtype: dtype of the copies; `None` keeps the base layer's.
            inference_mode: whether the adapter starts frozen.

        Raises:
            WeightError: a base weight is offloaded, not floating point, or not finite.
            GroupSizeError, ScaleRangeError: see `attach_learned_params`.
        """
        for name in self.parameter_names:
            with gather_params_ctx(getattr(self.base_layer, name)):
                start = self._start_weight(name, master_dtype)
                student = FakeQuantWeight(start, spec, trained)
            getattr(self, PREFIX + name)[adapter_name] = student
        self.activation_bits[adapter_name] = inputs.activation_bits
        if inputs.norm_eps is not None:
            device = getattr(self.base_layer, self.parameter_names[0]).device
            getattr(self, NORM)[adapter_name] = SubLN(self.in_features, inputs.norm_eps, device)  # type: ignore[arg-type]
        self.set_adapter(list(self.active_adapters), inference_mode=inference_mode)  # type: ignore[arg-type]

    def _start_weight(self, name: str, dtype: torch.dtype | None) -> Tensor:
        weight = self.base_weight(name)
        if _allocates_on_meta():  # PEFT's low_cpu_mem_usage: the values come from a checkpoint
            return torch.empty_like(weight, device="meta", dtype=dtype)
        if weight.is_meta:
            raise WeightError(
                f"the base weight must be in memory: got {name!r} on the meta device (offloaded or not loaded). "
                "Load the model without a device_map that offloads."
            )
        return weight.to(dtype or weight.dtype, copy=True, memory_format=torch.contiguous_format)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own version also casts to the base layer's dtype, which would round fp32 master weights to bf16
        target = device or getattr(self.base_layer, self.parameter_names[0]).device
        for holders in self.holders():
            if adapter_name in holders and not any(p.is_meta for p in holders.parameters()):
                holders[adapter_name].to(target)

    def holders(self) -> list[nn.ModuleDict]:
        """The students of each quantized parameter, and the norms, by adapter."""
        return [getattr(self, name) for name in self.adapter_layer_names]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate one adapter; a second one at the same time has no meaning, since each is a whole weight."""
        if not isinstance(adapter_names, str) and len(adapter_names) > 1:
            raise ConfigError(
                f"`adapter_names` must be one name: got {list(adapter_names)}. Each adapter is a whole weight; "
                "activate them in turn with set_adapter()."
            )
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._freeze_untrained()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Thaw or freeze adapters; what an adapter does not train stays frozen."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze_untrained()

    def _freeze_untrained(self) -> None:
        # PEFT thaws whatever an adapter holds
        for holder in self.holders():
            for student in holder.values():
                if isinstance(student, FakeQuantWeight):
                    student.freeze_untrained()

    def enable_adapters(self, enabled: bool) -> None:
        """Switch between student and teacher; what is trainable stays so.

        PEFT's own version makes the active adapter trainable whenever it is switched on, also a frozen one.
        """
        self._disable_adapters = not enabled

    def active_student(self, name: str) -> FakeQuantWeight | None:
        """The active adapter's weight, or `None` where the base layer speaks for itself."""
        students: nn.ModuleDict = getattr(self, PREFIX + name)
        active: list[str] = list(self.active_adapters)  # type: ignore[arg-type]
        adapters = [a for a in active if a in students]
        if self.disable_adapters or self.merged or not adapters:
            return None
        return self.student(name, adapters[0])

    @property
    def active_name(self) -> str:
        """The name of the active adapter."""
        names: list[str] = list(self.active_adapters)  # type: ignore[arg-type]
        return names[0]

    def input_norm(self, adapter_name: str) -> SubLN | None:
        """The `SubLN` that an adapter puts before the layer, or `None`."""
        norms: nn.ModuleDict = getattr(self, NORM)
        # a `ModuleDict` has no `get`
        return norms[adapter_name] if adapter_name in norms else None  # type: ignore[return-value]  # noqa: SIM401

    def check_mergeable(self, adapter_name: str) -> None:
        """Refuse to fold into a weight what happens to the inputs.

        Raises:
            StateError: the adapter has a `SubLN` or int8 activations here.
        """
        if self.input_norm(adapter_name) is not None or self.activation_bits.get(adapter_name) is not None:
            raise StateError(
                f"an adapter with SubLN or int8 activations must not be merged: got adapter {adapter_name!r}. A float "
                "model has no place for them and would compute something else. Use pack_and_unload(), which keeps "
                "them."
            )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the fake-quantized weights into the base layer.

        Args:
            safe_merge: refuse to write values that are not finite.
            adapter_names: at most one name; the active adapter by default.

        Raises:
            StateError: another adapter is merged already, several are given, or it changes the inputs as well.
            WeightError: `safe_merge`, and NaN or Inf would be written.
        """
        known: list[str] = self._all_available_adapter_names()  # type: ignore[operator]
        adapters = [a for a in check_adapters_to_merge(self, adapter_names) if a in known]
        if not adapters:
            return
        if self.merged or len(adapters) > 1:
            raise StateError(
                f"only one adapter can be merged: got {[*self.merged_adapters, *adapters]}. "
                "Call unmerge_adapter() first."
            )
        self.check_mergeable(adapters[0])
        merged = {name: self.student(name, adapters[0])().detach() for name in self.parameter_names}
        if safe_merge and not all(bool(torch.isfinite(values).all()) for values in merged.values()):
            raise WeightError(f"merged weights must be finite: got NaN or Inf in adapter {adapters[0]!r}.")
        for name, values in merged.items():
            base = getattr(self.base_layer, name)
            self._before_merge[name] = base.data
            base.data = self._as_base(values).to(base.dtype)
        self.merged_adapters.append(adapters[0])

    def unmerge(self) -> None:
        """Give the base layer its own weights back, exactly; on the device and in the dtype it has now."""
        for name, values in self._before_merge.items():
            base = getattr(self.base_layer, name)
            base.data = values.to(base)
        self._before_merge.clear()
        self.merged_adapters.clear()

    def _as_base(self, values: Tensor) -> Tensor:
        return values.T.contiguous() if isinstance(self.base_layer, Conv1D) else values

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base layer with the active adapter's fake-quantized weights, or as it is if there is none."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        students = {name: self.active_student(name) for name in self.parameter_names}
        if any(student is None for student in students.values()):
            return self.base_layer(*args, **kwargs)
        return self._forward_quantized({n: s for n, s in students.items() if s is not None}, *args, **kwargs)

    def _forward_quantized(self, students: dict[str, FakeQuantWeight], *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class BitDistillerLinear(BitDistillerLayer):
    """Overlay of a linear layer or a `Conv1D`."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer, ("weight",))
        if isinstance(base_layer, Conv1D):
            self.in_features, self.out_features = base_layer.weight.shape
        else:
            self.out_features, self.in_features = base_layer.out_features, base_layer.in_features

    def _forward_quantized(self, students: dict[str, FakeQuantWeight], *args: Any, **kwargs: Any) -> Any:
        (inputs,) = (*args, *kwargs.values())
        adapter_name, student = self.active_name, students["weight"]
        norm, bits = self.input_norm(adapter_name), self.activation_bits[adapter_name]
        inputs = inputs if norm is None else norm(inputs)
        weight = student(weight_dtype(inputs, bits))
        return linear(inputs, weight, self.bias, quant_specs(student)["weight"], bits)  # type: ignore[arg-type]


class BitDistillerExperts(BitDistillerLayer):
    """Overlay of fused experts."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer, expert_parameters(base_layer))

    def _forward_quantized(self, students: dict[str, FakeQuantWeight], *args: Any, **kwargs: Any) -> Any:
        dtype = compute_dtype(args[0] if args else next(iter(kwargs.values())))
        dense = {name: student(dtype) for name, student in students.items()}
        return forward_with(self.base_layer, dense, type(self.base_layer).forward, *args, **kwargs)


def _allocates_on_meta() -> bool:
    """Whether new parameters land on the meta device right now (accelerate's `init_empty_weights`)."""
    probe = nn.Module()
    probe.register_parameter("probe", nn.Parameter(torch.empty(0)))
    return bool(probe.probe.is_meta)
