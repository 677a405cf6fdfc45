"""The verbs on whole weights: find parameters, quantize, dequantize, and fake-quantize with gradients.

`fake_quantize(w)` is `dequantize(quantize(w))`, by the same functions that pack a model: the two cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitdistiller_peft.errors import WeightError
from bitdistiller_peft.grids import ResidualGrid
from bitdistiller_peft.quantizers.base import REFERENCE_SWEEPS, Sweeps
from bitdistiller_peft.quantizers.grouping import to_groups
from bitdistiller_peft.quantizers.registry import get_quantizer
from bitdistiller_peft.quantizers.rounding import round_scale_nearest
from bitdistiller_peft.quantizers.spec import TIED_SPARE_BITS, QuantParams, QuantSpec


def find_params(weight: Tensor, spec: QuantSpec) -> QuantParams:
    """Compute the parameters of a weight from its min-max or mean and refuse what cannot be stored.

    Args:
        weight: ``[..., out, in]``, floating point.
        spec: how to quantize.

    Returns:
        Parameters in their storage dtypes, shape `spec.param_shape(weight.shape)`.

    Raises:
        WeightError: the weight is not floating point, or holds NaN or Inf.
        ScaleRangeError: a scale overflows or is subnormal in `spec.scale_dtype`.
        GroupSizeError: the group size does not divide ``in``.
    """
    _check_weight(weight)
    _check_finite(weight)
    quantizer = get_quantizer(spec.grid)
    params = quantizer.find_params(to_groups(weight.detach().float(), spec.group_size), spec)
    quantizer.check(params)
    return params


def store_learned_params(learned: QuantParams, spec: QuantSpec) -> QuantParams:
    """Round trained (fp32) parameters to what is stored: scales to nearest, zero points to integer codes.

    Args:
        learned: what training holds; a zero point that is not learned comes as uint8 and stays.
        spec: the grid and how scales are stored.
    """
    zero_point, negative, residual = learned.zero_point, learned.scale_negative, learned.scale_residual
    if zero_point is not None and zero_point.is_floating_point():
        top = (1 << spec.grid.bits) - 1
        low, high = spec.zero_point_range or (0, top)
        zero_point = zero_point.detach().round().clamp(low, high).to(torch.uint8)
    is_tied = isinstance(spec.grid, ResidualGrid) and spec.grid.is_tied
    return QuantParams(
        round_scale_nearest(learned.scale, spec.scale_dtype, spare_bits=TIED_SPARE_BITS if is_tied else 0),
        zero_point,
        None if negative is None else round_scale_nearest(negative, spec.scale_dtype),
        None if residual is None else round_scale_nearest(residual, spec.scale_dtype, floor=0.0),
    )


def quantize(weight: Tensor, params: QuantParams, spec: QuantSpec) -> Tensor:
    """Round a weight to codes.

    Args:
        weight: ``[..., out, in]``, finite.
        params: from `find_params` or `store_learned_params`.
        spec: how to quantize.

    Returns:
        uint8 codes, shape of `weight`.

    Raises:
        WeightError: the weight is not floating point, or holds NaN or Inf.
    """
    _check_weight(weight)
    _check_finite(weight)
    groups = to_groups(weight.detach().float(), spec.group_size)
    return get_quantizer(spec.grid).quantize(groups, params, spec).to(torch.uint8).reshape(weight.shape)


def dequantize(codes: Tensor, params: QuantParams, spec: QuantSpec) -> Tensor:
    """Return the fp32 weight that codes stand for, shape of `codes` ``[..., out, in]``."""
    groups = to_groups(codes, spec.group_size)
    return get_quantizer(spec.grid).dequantize(groups, params, spec).reshape(codes.shape)


def fake_quantize(
    weight: Tensor,
    spec: QuantSpec,
    *,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    scale_negative: Tensor | None = None,
    scale_residual: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    sweeps: Sweeps = REFERENCE_SWEEPS,
    known: Tensor | None = None,
) -> Tensor:
    """Round a weight to the values that its codes can hold; the student's view of it.

    Without `scale`, the parameters are the weight's own (of its min-max or mean, as the grid has it), recomputed on
    every call. With it, they are the given trained (or fixed) ones.

    Args:
        weight: master weight ``[..., out, in]``, any floating dtype.
        spec: how to quantize.
        scale: learned scale, fp32, ``spec.param_shape(weight.shape)``.
        zero_point: learned (floating) or fixed (uint8) zero point, same shape, where the grid has one.
        scale_negative: learned scale of negative weights, same shape, where the grid has one.
        scale_residual: learned scale of the residual, same shape, where the grid has one.
        dtype: of the values.
        sweeps: who passes over the weight.
        known: what an earlier call returned for the same arguments, detached; it is not computed again, and shared.

    Returns:
        Shape of `weight`, rounded once from fp32 to `dtype`; in fp32 equal to `dequantize(quantize(weight))` bit for
        bit. Differentiable with
        respect to the weight and the learned tensors; clamped weights get no gradient.

    Source:
        The gradient through min and max is the closed form of BitDistiller's autograd graph; the learned one is LSQ
        (arXiv 1902.08153) and LSQ+ (arXiv 2004.09576).
    """
    values: Tensor = _FakeQuantize.apply(  # type: ignore[no-untyped-call]
        weight, _Call(spec, dtype, sweeps, known), scale, zero_point, scale_negative, scale_residual
    )
    return values


def _check_weight(weight: Tensor) -> None:
    if not weight.is_floating_point():
        raise WeightError(
            f"the weight must be floating point: got dtype={weight.dtype}. Dequantize the model first, or load it "
            "in float32, bfloat16 or float16."
        )
    if weight.is_meta:
        raise WeightError("the weight must be in memory: got a meta tensor. Load the model without offloading.")


def _check_finite(weight: Tensor) -> None:
    if not bool(torch.isfinite(weight).all()):
        raise WeightError("the weight must be finite: got NaN or Inf in it. Load an undamaged checkpoint.")


class _Call(NamedTuple):
    """What a call of fake quantization is given beside tensors to differentiate."""

    spec: QuantSpec
    dtype: torch.dtype
    sweeps: Sweeps
    known: Tensor | None


class _FakeQuantize(torch.autograd.Function):
    """Saves only the weight and the parameters; everything else is recomputed in the backward pass."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, call: _Call, *learned: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, *learned)
        ctx.call = call
        if call.known is not None:
            return call.known.detach()  # another tensor on the same memory, for a graph of its own
        spec, sweeps = call.spec, call.sweeps
        groups = to_groups(weight.detach().float(), spec.group_size)
        params = _params(groups, learned, call)
        return sweeps.values(get_quantizer(spec.grid), groups, params, spec).reshape(weight.shape).to(call.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *learned = ctx.saved_tensors
        spec, sweeps = ctx.call.spec, ctx.call.sweeps
        quantizer = get_quantizer(spec.grid)
        groups = to_groups(weight.detach().float(), spec.group_size)
        params = _params(groups, learned, ctx.call)
        upstream = to_groups(grad.float(), spec.group_size)
        scale, zero_point, negative, residual = learned
        if scale is None:
            own = quantizer.own_gradient(upstream, groups, params, spec, sweeps)
            return (own.reshape(weight.shape).to(weight.dtype), None, None, None, None, None)
        grads = sweeps.gradients(quantizer, upstream, groups, params, spec)
        return (
            grads.weight.reshape(weight.shape).to(weight.dtype),
            None,
            _like(grads.scale, scale),
            _like(grads.zero_point, zero_point),
            _like(grads.scale_negative, negative),
            _like(grads.scale_residual, residual),
        )


def _params(groups: Tensor, learned: Sequence[Tensor | None], call: _Call) -> QuantParams:
    """The parameters of a forward pass; `learned` has the fields of `QuantParams`, all `None` if nothing is learned."""
    scale, *others = learned
    if scale is None:
        return get_quantizer(call.spec.grid).find_params(groups, call.spec, call.sweeps)
    return store_learned_params(QuantParams(scale, *others), call.spec)


def _like(grad: Tensor | None, param: Tensor | None) -> Tensor | None:
    if grad is None or param is None or not param.is_floating_point():
        return None
    return grad.reshape(param.shape).to(param.dtype)
