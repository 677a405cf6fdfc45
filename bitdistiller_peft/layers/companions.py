"""The tensors that stand beside a quantized weight, and how modules keep and find them.

A quantized parameter keeps its own name, ``weight`` in a linear layer, ``gate_up_proj`` in fused experts; what belongs
to it has that name plus a suffix. `module.quant_specs` maps each quantized parameter's name to its `QuantSpec`. Layers,
packing, checkpoints and summaries all go through these functions, so the naming has one home.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bitdistiller_peft.kernels import fake_quantize, quantize
from bitdistiller_peft.layers.kept import find_kept, keep
from bitdistiller_peft.layers.low_rank import latent_sources, latent_weight
from bitdistiller_peft.packing import num_words, pack_codes, pack_row, row_words
from bitdistiller_peft.quantizers import QuantParams, QuantSpec, find_params, get_quantizer, store_learned_params

SCALE = "_scale"
ZERO_POINT = "_zero_point"
SCALE_NEGATIVE = "_scale_negative"
SCALE_RESIDUAL = "_scale_residual"
SUFFIXES = (SCALE, ZERO_POINT, SCALE_NEGATIVE, SCALE_RESIDUAL)  # in the order of the fields of `QuantParams`


def quant_specs(module: nn.Module) -> dict[str, QuantSpec]:
    """The specs of a module's own quantized parameters, by parameter name; empty for ordinary modules."""
    specs: dict[str, QuantSpec] = module.__dict__.get("quant_specs", {})
    return specs


def iter_quantized(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, QuantSpec]]:
    """Walk over all quantized parameters: module name, module, parameter name, spec."""
    for module_name, module in model.named_modules():
        for name, spec in quant_specs(module).items():
            yield module_name, module, name, spec


def companion(module: nn.Module, name: str, suffix: str) -> Tensor | None:
    """The tensor `name + suffix` of a module, or `None`."""
    key = name + suffix
    tensor: Tensor | None = module._parameters.get(key)  # `getattr` takes its time with what is not there
    if tensor is None and (key in module._buffers or key in module.__dict__):
        tensor = getattr(module, key)
    return tensor


def companion_suffixes(spec: QuantSpec) -> tuple[str, ...]:
    """The suffixes that a grid needs: always a scale, a zero point or a second scale where the grid has one."""
    return (
        SCALE,
        *((ZERO_POINT,) if spec.grid.has_zero_point else ()),
        *((SCALE_NEGATIVE,) if spec.grid.has_negative_scale else ()),
        *((SCALE_RESIDUAL,) if spec.grid.has_residual_scale else ()),
    )


# ---------------------------------------------------------------------------------------------- fake quantization


def attach_learned_params(
    module: nn.Module,
    name: str,
    spec: QuantSpec,
    *,
    learn_scale: bool,
    learn_zero_point: bool,
    params: QuantParams | None = None,
) -> None:
    """Register what fake quantization of `module.name` trains beside the weight, started from the weight's own.

    Learned tensors are fp32 parameters; a zero point that is not learned is a uint8 buffer. Without `learn_scale`
    nothing is registered, and the parameters are recomputed from the weight on every forward.

    Args:
        module: holds the float parameter.
        name: the parameter's name.
        spec: how to quantize it.
        learn_scale: train the scale(s).
        learn_zero_point: train the zero point, in code steps.
        params: start values in place of min-max.

    Raises:
        WeightError: the weight holds NaN or Inf.
        ScaleRangeError: a scale does not fit `spec.scale_dtype`.
        GroupSizeError: the group size does not divide the input width.
    """
    module.quant_specs = {**quant_specs(module), name: spec}  # type: ignore[assignment]
    weight = getattr(module, name)
    if weight.is_meta:
        params = empty_params(spec, weight.shape, weight.device)
    elif params is None:
        params = find_params(weight, spec)  # also refuses, early, what could not be packed
    if not learn_scale:
        return
    floor = torch.finfo(spec.scale_dtype).tiny  # an absent sign's scale is 0; a learned one must be able to grow
    _register(module, name + SCALE, params.scale.float().clamp(min=floor))
    if params.scale_negative is not None:
        _register(module, name + SCALE_NEGATIVE, params.scale_negative.float().clamp(min=floor))
    if params.scale_residual is not None:
        _register(module, name + SCALE_RESIDUAL, params.scale_residual.float())
    if params.zero_point is not None and learn_zero_point:
        _register(module, name + ZERO_POINT, params.zero_point.float())
    elif params.zero_point is not None:
        module.register_buffer(name + ZERO_POINT, params.zero_point)


def set_learned_params(module: nn.Module, name: str, params: QuantParams) -> None:
    """Overwrite learned parameters in place, for example with calibrated ones."""
    with torch.no_grad():
        for suffix, value in zip(SUFFIXES, params, strict=True):
            target = companion(module, name, suffix)
            if target is not None and value is not None:
                target.copy_(value)


def fake_quantized(module: nn.Module, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values that the packed parameter will hold, differentiable; rounded once from fp32 to `dtype`.

    They share their memory with other calls while `KeptValues` keeps them: do not write into them.
    """
    learned = [companion(module, name, suffix) for suffix in SUFFIXES]
    sources = [*latent_sources(module, name), *learned]
    known = find_kept(module, name, dtype, sources)
    scale, zero_point, negative, residual = learned
    values = fake_quantize(
        latent_weight(module, name),
        quant_specs(module)[name],
        scale=scale,
        zero_point=zero_point,
        scale_negative=negative,
        scale_residual=residual,
        dtype=dtype,
        known=known,
    )
    if known is None:
        keep(module, name, values, sources)
    return values


def quantized(module: nn.Module, name: str) -> tuple[Tensor, QuantParams]:
    """The codes (uint8, shape of the weight) and stored parameters that `fake_quantized` stands for.

    Raises:
        WeightError: the weight holds NaN or Inf.
        ScaleRangeError: a scale does not fit its storage dtype.
    """
    weight, spec = latent_weight(module, name), quant_specs(module)[name]
    if companion(module, name, SCALE) is None:
        params = find_params(weight, spec)
    else:
        params = store_learned_params(packed_params(module, name), spec)
        get_quantizer(spec.grid).check(params)
    return quantize(weight, params, spec), params


# ---------------------------------------------------------------------------------------------------- packed state


def packed_tensors(codes: Tensor, params: QuantParams, spec: QuantSpec) -> dict[str, Tensor]:
    """Codes and parameters as a checkpoint stores them, by suffix (``""`` is the weight itself)."""
    tensors = {"": pack_row(codes, spec.grid.bits, spec.packing), SCALE: params.scale.contiguous()}
    if params.zero_point is not None:
        tensors[ZERO_POINT] = pack_codes(params.zero_point, spec.grid.bits)
    if params.scale_negative is not None:
        tensors[SCALE_NEGATIVE] = params.scale_negative.contiguous()
    if params.scale_residual is not None:
        tensors[SCALE_RESIDUAL] = params.scale_residual.contiguous()
    return tensors


def packed_layout(
    spec: QuantSpec, weight_shape: torch.Size | tuple[int, ...]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every stored tensor of a weight ``[..., out, in]``, by suffix."""
    *rows, in_features = weight_shape
    *param_rows, groups = spec.param_shape(weight_shape)
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "": ((*rows, row_words(in_features, spec.grid.bits, spec.packing)), torch.int32)
    }
    for suffix in companion_suffixes(spec):
        if suffix == ZERO_POINT:
            layout[suffix] = ((*param_rows, num_words(groups, spec.grid.bits)), torch.int32)
        else:
            layout[suffix] = ((*param_rows, groups), spec.scale_dtype)
    return layout


def packed_bytes(spec: QuantSpec, weight_shape: torch.Size | tuple[int, ...]) -> int:
    """The bytes that all stored tensors of a weight ``[..., out, in]`` take together."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in packed_layout(spec, weight_shape).values())


def register_packed(module: nn.Module, name: str, spec: QuantSpec, tensors: dict[str, Tensor]) -> None:
    """Put packed tensors into a module as frozen parameters, in place of the float one."""
    module.quant_specs = {**quant_specs(module), name: spec}  # type: ignore[assignment]
    for suffix, tensor in tensors.items():
        _register(module, name + suffix, tensor, requires_grad=False)


def packed_params(module: nn.Module, name: str) -> QuantParams:
    """The parameters that stand beside a weight: learned ones, or those of a packed weight (zero points as words)."""
    return QuantParams(*(companion(module, name, suffix) for suffix in SUFFIXES))  # type: ignore[arg-type]


def empty_params(spec: QuantSpec, weight_shape: torch.Size, device: torch.device) -> QuantParams:
    """Parameters without values, for modules built before their checkpoint is read."""
    shape = spec.param_shape(weight_shape)
    grid = spec.grid
    return QuantParams(
        torch.empty(shape, dtype=spec.scale_dtype, device=device),
        torch.empty(shape, dtype=torch.uint8, device=device) if grid.has_zero_point else None,
        torch.empty(shape, dtype=spec.scale_dtype, device=device) if grid.has_negative_scale else None,
        torch.empty(shape, dtype=spec.scale_dtype, device=device) if grid.has_residual_scale else None,
    )


def _register(module: nn.Module, name: str, tensor: Tensor, *, requires_grad: bool = True) -> None:
    module._parameters.pop(name, None)
    module.register_parameter(name, nn.Parameter(tensor, requires_grad=requires_grad))
