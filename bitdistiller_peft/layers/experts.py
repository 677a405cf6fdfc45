"""Fused experts: modules whose weights are 3-D parameters ``[experts, out, in]``, used by a forward we do not own.

The forward belongs to the model, and reads ``self.gate_up_proj`` and its like. It is run on a light stand-in for the
module, which shares everything but shows dense tensors under those names. The module itself is not touched, so two
threads can run it at once, and no model's forward has to be rewritten.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from bitdistiller_peft.errors import TargetError
from bitdistiller_peft.kernels import compute_dtype, dequantize_packed
from bitdistiller_peft.layers.companions import fake_quantized, packed_params, quant_specs, register_packed
from bitdistiller_peft.layers.packed import keep_stored_dtypes
from bitdistiller_peft.quantizers import QuantSpec


def forward_with(
    module: nn.Module, weights: Mapping[str, Tensor], forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Run `forward` on a stand-in for `module` that shows `weights` in place of its parameters of those names."""
    stand_in = object.__new__(type(module))
    # an entry in the instance dictionary wins over `nn.Module.__getattr__`, which serves parameters
    stand_in.__dict__.update(module.__dict__)
    stand_in.__dict__.update(weights)
    return forward(stand_in, *args, **kwargs)


class _QuantExperts:
    """What packed and fake-quantized experts share: the original forward, on weights made for the occasion."""

    def _dense(self, name: str, inputs: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the model's own expert forward on dense weights ``[experts, out, in]``.

        Raises:
            TargetError: an adapter reparametrizes the experts: it would change codes, or bypass fake quantization.
        """
        if is_parametrized(self):  # type: ignore[arg-type]
            raise TargetError(
                "an adapter must not wrap quantized experts: it would see codes in place of weights. "
                "Name the linear layers in target_modules (PEFT's 'all-linear' takes the experts too)."
            )
        weights = {name: self._dense(name, hidden_states) for name in quant_specs(self)}  # type: ignore[arg-type]
        return forward_with(self, weights, super().forward.__func__, hidden_states, *args, **kwargs)  # type: ignore[arg-type, misc]


class PackedExperts(_QuantExperts):
    """Mixin for an experts class whose 3-D parameters are packed codes, one layer dense at a time."""

    in_features: dict[str, int]

    def _dense(self, name: str, inputs: Tensor) -> Tensor:
        words, spec = getattr(self, name), quant_specs(self)[name]  # type: ignore[arg-type]
        params = packed_params(self, name)  # type: ignore[arg-type]
        return dequantize_packed(words, params, spec, self.in_features[name], compute_dtype(inputs))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(keep_stored_dtypes(self, fn), recurse)  # type: ignore[arg-type, misc]


class FakeQuantExperts(_QuantExperts):
    """Mixin for an experts class that trains its 3-D parameters under fake quantization."""

    def _dense(self, name: str, inputs: Tensor) -> Tensor:
        return fake_quantized(self, name, compute_dtype(inputs))  # type: ignore[arg-type]


def with_mixin(module: nn.Module, mixin: type) -> None:
    """Put a mixin before the class of one module, which keeps its name."""
    cls = type(module)
    if not issubclass(cls, mixin):
        # same name: configs, error messages and weight conversions look at it
        module.__class__ = type(cls.__name__, (mixin, cls), {"__module__": cls.__module__})


def to_fake_quant_experts(module: nn.Module) -> None:
    """Let an experts module train under fake quantization, in place; specs come with `attach_learned_params`."""
    with_mixin(module, FakeQuantExperts)


def to_packed_experts(
    module: nn.Module, name: str, spec: QuantSpec, tensors: dict[str, Tensor], in_features: int
) -> None:
    """Replace one 3-D parameter of an experts module by its packed tensors, in place.

    Args:
        module: the experts module.
        name: the parameter, e.g. ``"gate_up_proj"``.
        spec: how it was quantized.
        tensors: as from `packed_tensors`.
        in_features: input width of the parameter.
    """
    with_mixin(module, PackedExperts)
    module.in_features = {**module.__dict__.get("in_features", {}), name: in_features}  # type: ignore[assignment]
    register_packed(module, name, spec, tensors)
