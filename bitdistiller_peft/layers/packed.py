"""A linear layer whose weight is packed codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bitdistiller_peft.errors import TargetError
from bitdistiller_peft.kernels import dequantize_packed, is_exact_product, packed_linear, packed_ternary_int8_linear
from bitdistiller_peft.layers.companions import (
    companion,
    companion_suffixes,
    packed_layout,
    packed_params,
    packed_tensors,
    quant_specs,
    register_packed,
)
from bitdistiller_peft.layers.inputs import NO_CHANGE, InputSpec, activation_bits, attach_inputs, normalized
from bitdistiller_peft.quantizers import QuantParams, QuantSpec, fake_quantize_activations


def keep_stored_dtypes(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Wrap a function given to `nn.Module._apply` so that `.to(dtype)` moves packed tensors but never casts them.

    A scale in another dtype would be another scale: the weights would change without a word.
    """
    stored = {
        id(companion(module, name, suffix))
        for name, spec in quant_specs(module).items()
        for suffix in ("", *companion_suffixes(spec))
    }

    def moved(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        return tensor.to(result.device) if id(tensor) in stored and result.dtype != tensor.dtype else result

    return moved


class PackedLinear(nn.Linear):
    """An `nn.Linear` that holds int32 codes under the name ``weight`` and dequantizes as it multiplies.

    It is a subclass, and the codes bear the float weight's name, on purpose: models that initialise or inspect
    ``module.weight`` keep working, LoRA attaches to it, and a checkpoint loaded without this library fails loudly.

    Args:
        in_features: input width.
        out_features: output width.
        spec: how the weight was quantized.
        bias: whether there is a bias.
        inputs: what happens to the inputs first: a `SubLN`, int8 activations.
        device: where to allocate; ``"meta"`` before loading.
        dtype: dtype of the bias.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        spec: QuantSpec,
        bias: bool = False,
        inputs: InputSpec = NO_CHANGE,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        layout = packed_layout(spec, (out_features, in_features))
        empty = {suffix: torch.empty(shape, dtype=stored, device=device) for suffix, (shape, stored) in layout.items()}
        register_packed(self, "weight", spec, empty)
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        attach_inputs(self, inputs)

    @classmethod
    def from_codes(
        cls, codes: Tensor, params: QuantParams, spec: QuantSpec, bias: Tensor | None = None
    ) -> PackedLinear:
        """Pack codes ``[out, in]`` and their stored parameters into a layer; the bias is taken over."""
        out_features, in_features = codes.shape
        layer = cls(in_features, out_features, spec=spec, device="meta")
        register_packed(layer, "weight", spec, packed_tensors(codes, params, spec))
        if bias is not None:
            layer.register_parameter("bias", nn.Parameter(bias.detach(), requires_grad=False))
        return layer

    @property
    def spec(self) -> QuantSpec:
        """How the weight was quantized."""
        return quant_specs(self)["weight"]

    def forward(self, input: Tensor) -> Tensor:
        """Multiply ``[..., in]``; the result has the dtype of the inputs (or autocast's).

        Raises:
            TargetError: the inputs are integers: the model casts them to the dtype of what it takes for a weight.
        """
        return self.multiply(input, self.bias)

    def multiply(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """As `forward`, with a bias that is handed over, as engines do that keep it themselves.

        Raises:
            TargetError: the inputs are integers.
        """
        if not input.is_floating_point():
            raise TargetError(
                f"the inputs of a packed layer must be floating point: got {input.dtype}. This model casts them to "
                "`weight.dtype`, as T5 does before `wo`; leave the layer out with exclude_modules or "
                "modules_to_not_convert."
            )
        input = normalized(self, input)
        if activation_bits(self) is not None:
            if is_exact_product(self.spec, self.in_features):
                return packed_ternary_int8_linear(input, self.weight, packed_params(self, "weight"), self.spec, bias)
            input = fake_quantize_activations(input)
        return packed_linear(input, self.weight, packed_params(self, "weight"), self.spec, bias)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight ``[out, in]`` that the codes stand for."""
        return dequantize_packed(self.weight, packed_params(self, "weight"), self.spec, self.in_features, dtype)

    def extra_repr(self) -> str:
        """Shape and grid, for `print(model)`."""
        spec = self.spec
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"grid={spec.grid.name!r}, bits={spec.grid.bits}, group_size={spec.group_size!r}"
            + ("" if activation_bits(self) is None else f", activation_bits={activation_bits(self)}")
        )

    def reset_parameters(self) -> None:
        """Do nothing: codes come from packing or from a checkpoint, never from a random generator."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(keep_stored_dtypes(self, fn), recurse)  # type: ignore[no-untyped-call]
