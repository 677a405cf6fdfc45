"""Fake quantization by a backend beside the reference's."""

from __future__ import annotations

import torch
from torch import Tensor

from bitdistiller_peft.kernels import fake_quantize, use_backend
from bitdistiller_peft.quantizers import REFERENCE_SWEEPS, QuantSpec, Sweeps, find_params, to_groups
from bitdistiller_peft.quantizers.affine import AffineQuantizer
from tests.quantizers.samples import hard_weight, normal


def results(backend: str, weight: Tensor, spec: QuantSpec, learned: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Values, and the gradients of the weight and of everything learned."""
    leaves = [weight.clone().requires_grad_(), *(t.clone().requires_grad_() for t in learned.values())]
    with use_backend(backend):
        values = fake_quantize(leaves[0], spec, **dict(zip(learned, leaves[1:], strict=True)))
        return values.detach(), list(torch.autograd.grad(values, leaves, normal(*weight.shape, seed=3)))


def shifted(weight: Tensor, spec: QuantSpec) -> dict[str, Tensor]:
    """Parameters of a narrower range, so that weights are clamped; every second one of another size."""
    params = find_params(weight, spec)._asdict()
    learned = {name: tensor.float() for name, tensor in params.items() if tensor is not None}
    for name, tensor in learned.items():
        tensor.mul_(0.83 if "scale" in name else 1.0)
        tensor.flatten()[::2].mul_(2.5 if name == "scale_residual" else 1.0)
    return learned


def assert_same(backend: str, weight: Tensor, spec: QuantSpec, learned: dict[str, Tensor]) -> None:
    """Values bit for bit, gradients to the order of summation."""
    (values, grads), (wanted, wanted_grads) = (results(b, weight, spec, learned) for b in (backend, "reference"))
    case = f"{spec}, {list(learned)}"
    assert torch.equal(values.view(torch.int32), wanted.view(torch.int32)), case
    for name, got, want in zip(("weight", *learned), grads, wanted_grads, strict=True):
        largest = 1e-30 + float(want.abs().max())
        assert float((got - want).abs().max()) <= 3e-6 * largest, f"{name}: {case}"
    if learned:
        assert torch.equal(grads[0], wanted_grads[0]), case  # no sum in it


def assert_asks_the_quantizer(sweeps: Sweeps) -> None:
    """A quantizer of one's own, which rounds in a way of its own, is asked itself."""

    class Downwards(AffineQuantizer):
        def quantize(self, groups, params, spec):  # type: ignore[no-untyped-def]
            return super().quantize(groups - 0.25 * params.scale.float().unsqueeze(-1), params, spec)

    spec, groups = QuantSpec.create("int", 2, group_size=12), to_groups(hard_weight(24), 12)
    params = Downwards().find_params(groups, spec)
    got = sweeps.values(Downwards(), groups, params, spec)
    assert torch.equal(got, REFERENCE_SWEEPS.values(Downwards(), groups, params, spec))
    assert not torch.equal(got, sweeps.values(AffineQuantizer(), groups, params, spec))
