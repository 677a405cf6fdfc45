"""One training step on every grid, width, grouping, dtype and choice of learned parameters: the gradients of fp64.

Every trainable tensor gets a finite gradient, equal to that of the formula written out in fp64 (`tests.reference`), and
not zero where that is not; a combination that does not exist is refused with its reason.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.layers import SUFFIXES, FakeQuantWeight, Trained, companion
from bitdistiller_peft.quantizers import QuantSpec, find_params, store_learned_params, to_groups
from bitdistiller_peft.quantizers.spec import QuantParams
from tests.quantizers.samples import RESIDUAL_OPTIONS, WIDTHS, normal
from tests.reference.fake_quantize import formula

OUT, IN = 5, 128
GROUP_SIZES = (32, 64, -1, "tensor")
DTYPES = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}  # master weights, and their last digit
LEARN = ({"learn_scale": False}, {"learn_scale": True}, {"learn_scale": True, "learn_zero_point": True})
OPTIONS = {"r2q": ({}, *RESIDUAL_OPTIONS)}


def one_signed_and_mixed(spec: QuantSpec) -> Tensor:
    """Rows with both signs, one sign, a heavy tail. No weight is a tie, or one that fp32 and fp64 see alike."""
    weight = normal(OUT, IN, seed=5, std=0.05)
    weight[1], weight[2] = weight[1].abs() + 1e-3, -weight[2].abs() - 1e-3
    weight[3] *= torch.where(torch.arange(IN) % 16 == 0, 6.0, 1.0)
    if spec.grid.name == "int_sym":  # whose extreme is a tie: in every group, where the scale is then 1
        extreme = (spec.grid.num_levels - 1) / 2
        weight *= 0.95 * extreme / weight.abs().max()
        first = to_groups(weight, spec.group_size)[..., 0]  # a view
        first.copy_(extreme * first.sign())
    return weight


def trained(spec: QuantSpec, dtype: torch.dtype, learn: dict[str, bool]) -> tuple[FakeQuantWeight, Tensor]:
    """A step: forward in the weight's dtype, loss, backward; and the gradient at the fake-quantized weight."""
    module = FakeQuantWeight(
        one_signed_and_mixed(spec).to(dtype),
        spec,
        Trained(learn["learn_scale"], learn.get("learn_zero_point", False)),
    )
    if learn["learn_scale"]:  # elsewhere than at the start, so that weights are clamped
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if "_scale" in name:
                    parameter.mul_(0.83)
                elif name.endswith("_zero_point"):
                    parameter.add_(0.2)
    values = module()
    values.retain_grad()
    outputs = F.linear(normal(7, IN, seed=6).to(dtype), values.to(dtype))
    (outputs.float() - 0.1).square().mean().backward()
    assert values.grad is not None
    return module, values.grad


def wanted(module: FakeQuantWeight, spec: QuantSpec, upstream: Tensor) -> dict[str, Tensor]:
    """The fp64 formula's gradients by suffix, at the stored scales."""
    weight = module.weight.detach().double().requires_grad_()
    learned = {
        name: companion(module, "weight", suffix) for name, suffix in zip(QuantParams._fields, SUFFIXES, strict=True)
    }
    if learned["scale"] is None:
        value = formula(weight, spec, stored=find_params(module.weight.detach(), spec))
        (grad,) = torch.autograd.grad(value, weight, upstream.double())
        return {"": grad}
    stored = store_learned_params(QuantParams(**learned), spec)._asdict()
    leaves = {name: t.double().requires_grad_() for name, t in stored.items() if t is not None}
    value = formula(weight, spec, leaves)
    grads = torch.autograd.grad(value, [weight, *leaves.values()], upstream.double())
    return {"": grads[0], **{SUFFIXES[QuantParams._fields.index(n)]: g for n, g in zip(leaves, grads[1:], strict=True)}}


@pytest.mark.parametrize("scale_dtype", ["float32", "float16"])
@pytest.mark.parametrize(("grid", "bits"), [(grid, bits) for grid in WIDTHS for bits in (2, 3, 4, 8)])
def test_a_step_gives_every_trainable_tensor_the_gradient_of_fp64(grid: str, bits: int, scale_dtype: str) -> None:
    if bits not in WIDTHS[grid]:
        with pytest.raises(ConfigError, match=rf"`bits` must be one of .* for grid='{grid}': got bits={bits}"):
            QuantSpec.create(grid, bits)
        return
    settings = itertools.product(GROUP_SIZES, DTYPES, LEARN, ("exact", "ste"), OPTIONS.get(grid, ({},)))
    for group_size, dtype, learn, gradient, options in settings:
        spec = QuantSpec.create(
            grid, bits, group_size=group_size, scale_dtype=scale_dtype, gradient=gradient, **options
        )
        if learn["learn_scale"] and gradient == "ste":
            continue  # says how to follow parameters that are not learned
        if "learn_zero_point" in learn and not spec.grid.has_zero_point:
            continue  # refused with its reason by the configs
        if spec.refine and scale_dtype != "float32":
            continue  # the formula neglects how scales are rounded between one round and the next
        module, upstream = trained(spec, dtype, learn)
        expected = wanted(module, spec, upstream)
        for name, parameter in module.named_parameters():
            grad, want = parameter.grad, expected[name.removeprefix("weight")]
            case = f"{name}: {spec}, {dtype}, {learn}"
            assert grad is not None, case
            assert bool(grad.isfinite().all()), case
            tolerance = DTYPES[dtype] if name == "weight" else 1e-4  # sums, in which much cancels
            error = float((grad.double() - want).abs().max())
            assert error <= tolerance * float(want.abs().max()), f"{case}: off by {error}"
            assert bool(want.any()) == bool(grad.any()), case
            assert bool(grad.any()) or name.endswith("_zero_point"), case
