"""Every gradient is the one that plain fp64 autograd finds for the written-out formula; clamped weights get none."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from bitdistiller_peft.grids import AffineGrid, ResidualGrid, TernaryGrid
from bitdistiller_peft.quantizers import QuantSpec, fake_quantize, find_params
from tests.quantizers.samples import GRIDS, LOPSIDED, RESIDUAL_OPTIONS, each_grid, normal
from tests.reference.fake_quantize import Params, formula

SPECS = [QuantSpec.create(grid, bits, group_size=16, scale_dtype="float32") for grid, bits in GRIDS]
SPECS += [QuantSpec(LOPSIDED, 16, torch.float32)]
SPECS += [QuantSpec.create("r2q", 2, group_size=16, scale_dtype="float32", **options) for options in RESIDUAL_OPTIONS]


def name_of(spec: QuantSpec) -> str:
    is_tied = "-tied" if isinstance(spec.grid, ResidualGrid) and spec.grid.is_tied else ""
    return f"{spec.grid.name}{spec.grid.bits}{is_tied}" + (f"-{spec.refine}" if spec.refine else "")


each_spec = pytest.mark.parametrize("spec", SPECS, ids=name_of)


# ------------------------------------------------------------------------------------------------------------- helpers


def differentiable(params: Params, dtype: torch.dtype) -> Params:
    return {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in params.items()}


def gradients(value: Tensor, upstream: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(value, inputs, upstream.to(value.dtype)))


def assert_gradients_agree(weight: Tensor, spec: QuantSpec, params: Params | None = None) -> list[Tensor]:
    """Values and gradients are those of the formula; returns the package's, the weight's first."""
    ours, theirs = weight.clone().requires_grad_(), weight.double().requires_grad_()
    our_params, their_params = (differentiable(params or {}, dtype) for dtype in (torch.float32, torch.float64))
    got, wanted = fake_quantize(ours, spec, **our_params), formula(theirs, spec, their_params or None)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)  # the two rounded alike
    upstream = normal(*weight.shape, seed=9)
    got_grads = gradients(got, upstream, [ours, *our_params.values()])
    wanted_grads = gradients(wanted, upstream, [theirs, *their_params.values()])
    for got_grad, wanted_grad in zip(got_grads, wanted_grads, strict=True):
        torch.testing.assert_close(got_grad.double(), wanted_grad, rtol=1e-4, atol=1e-4)
    return got_grads


def weights_with_both_extremes(spec: QuantSpec) -> Tensor:
    """Mixed, one-signed and lopsided groups. A symmetric grid's extreme is a tie: it is put where fp32 is exact."""
    weight = normal(6, 32).clamp(-1.9, 1.9)
    weight[1], weight[2] = weight[1].abs() + 0.01, -weight[2].abs() - 0.01
    weight[3] *= torch.where(weight[3] > 0, 4.0, 1.0)
    if isinstance(spec.grid, AffineGrid) and not isinstance(spec.grid, TernaryGrid) and not spec.grid.has_zero_point:
        extreme = (spec.grid.num_levels - 1) / 2  # two steps of 2**k each to its half
        weight = weight / 8 * extreme
        weight[:, 0], weight[:, 16] = extreme, -extreme
    return weight


def learned(spec: QuantSpec, shrink: float) -> Params:
    """Parameters of a range `shrink` times the weights' own, so that a smaller one clamps the outer weights."""
    found = find_params(normal(6, 32).clamp(-1.9, 1.9), spec)
    params = {"scale": found.scale * shrink}
    if found.scale_negative is not None:
        params["scale_negative"] = found.scale_negative * shrink
    if found.scale_residual is not None:
        params["scale_residual"] = found.scale_residual * shrink
    if found.zero_point is not None:
        params["zero_point"] = found.zero_point.float()
    return params


# --------------------------------------------------------------------------------------------------------------- tests


@each_spec
def test_the_exact_gradient_follows_minimum_and_maximum(spec: QuantSpec) -> None:
    assert_gradients_agree(weights_with_both_extremes(spec), spec)


@each_spec
def test_the_straight_through_gradient_does_not(spec: QuantSpec) -> None:
    spec = dataclasses.replace(spec, gradient="ste")
    (grad,) = assert_gradients_agree(weights_with_both_extremes(spec), spec)
    upstream = normal(*grad.shape, seed=9)
    assert bool(((grad == upstream) | (grad == 0)).all())


@pytest.mark.parametrize("bounds", [(1, 2), (1, 1), (2, 2)])
def test_the_exact_gradient_follows_the_side_that_set_a_bounded_scale(bounds: tuple[int, int]) -> None:
    spec = QuantSpec.create("int", 2, group_size=16, scale_dtype="float32", zero_point_range=bounds)
    weight = normal(6, 32)
    weight[3] *= torch.where(weight[3] > 0, 4.0, 1.0)
    weight[4] *= torch.where(weight[4] > 0, 1.0, 4.0)
    assert_gradients_agree(weight, spec)


@pytest.mark.parametrize("order", [1.0, -1.0], ids=["high-first", "low-first"])
@pytest.mark.parametrize("bits", [2, 4])
def test_of_two_extremes_of_one_size_the_first_moves_a_symmetric_scale(bits: int, order: float) -> None:
    # a power of two of steps, so that no rounding error decides
    size = (2**bits - 1) / 2
    weight = order * torch.tensor([[0.25, size, -size, 0.5]])
    spec = QuantSpec.create("int_sym", bits, group_size=-1, scale_dtype="float32")
    assert_gradients_agree(weight, spec)
    first = weight.clone().requires_grad_()
    fake_quantize(first, spec)[0, 3].backward()  # far from both ends: only the scale carries it there
    assert first.grad[0, 1] != 0 == first.grad[0, 2]


@pytest.mark.parametrize(("bounds", "sign"), [((3, 3), 1.0), ((0, 0), -1.0)])
def test_a_constant_scale_passes_no_gradient_to_the_extremes(bounds: tuple[int, int], sign: float) -> None:
    # the zero point leaves no codes on the side where the weights are: nothing sets the scale, it is 1
    weight = (sign * torch.tensor([[0.1, 0.3, 0.45, 2.0]])).requires_grad_()
    spec = QuantSpec.create("int", 2, group_size=-1, scale_dtype="float32", zero_point_range=bounds)
    fake_quantize(weight, spec).sum().backward()
    assert weight.grad.tolist() == [[1.0, 1.0, 1.0, 0.0]]


@each_spec
@pytest.mark.parametrize("shrink", [0.6, 0.97, 1.3])
def test_learned_parameters_get_the_gradient_of_lsq(spec: QuantSpec, shrink: float) -> None:
    grads = assert_gradients_agree(normal(6, 32).clamp(-1.9, 1.9), spec, learned(spec, shrink))
    assert bool((grads[1] != 0).any())


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.grid.name != "r2q"], ids=name_of)  # nothing is clamped
def test_clamped_weights_get_no_gradient(spec: QuantSpec) -> None:
    params = learned(spec, 0.5)
    weight = torch.full((6, 32), 0.01)
    weight[:, 3], weight[:, 7] = 100.0, -100.0
    grad, *_ = assert_gradients_agree(weight, spec, params)
    clamped = weight.abs() > 1
    assert not bool(grad[clamped].any())
    assert bool((grad[~clamped] != 0).all())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_learned_zero_point_moves_only_through_clamped_weights(bits: int) -> None:
    spec = QuantSpec.create("int", bits, group_size=16, scale_dtype="float32")
    weight = normal(6, 32).clamp(-1.9, 1.9)
    params = learned(spec, 1.3)
    *_, inside = assert_gradients_agree(weight, spec, params)
    assert not bool(inside.any())
    weight[2, 5] = 50.0
    *_, outside = assert_gradients_agree(weight, spec, params)
    assert outside.nonzero().tolist() == [[2, 0]]
    assert outside[2, 0] == -params["scale"][2, 0] * normal(6, 32, seed=9)[2, 5]


def test_a_fixed_zero_point_is_served_without_a_gradient() -> None:
    spec = QuantSpec.create("int", 2, group_size=16)
    weight = normal(2, 32).requires_grad_()
    params = find_params(weight, spec)
    scale = params.scale.float().requires_grad_()
    fake_quantize(weight, spec, scale=scale, zero_point=params.zero_point).sum().backward()
    assert scale.grad is not None
    assert weight.grad is not None


@pytest.mark.parametrize(("kept", "moved"), [(1.0, "scale"), (-1.0, "scale_negative")])
def test_each_sign_moves_only_its_own_scale(kept: float, moved: str) -> None:
    spec = QuantSpec.create("nf", 3, group_size=16, scale_dtype="float32")
    params = differentiable(learned(spec, 0.8), torch.float32)
    weight = kept * normal(6, 32).abs()
    fake_quantize(weight, spec, **params).square().sum().backward()
    other = {"scale": "scale_negative", "scale_negative": "scale"}[moved]
    assert bool((params[moved].grad != 0).all())
    assert not bool(params[other].grad.any())


def test_a_scale_below_its_floor_still_gets_a_gradient() -> None:
    spec = QuantSpec.create("int_sym", 2, group_size=-1)
    scale = torch.tensor([[-0.5]], requires_grad=True)
    value = fake_quantize(torch.tensor([[1.0, -1.0, 0.5]]), spec, scale=scale)
    value.sum().backward()
    assert value.isfinite().all()
    assert scale.grad.tolist() == [[1.0 - 2.0 + 1.0]]  # the codes at which the three are clamped
    value = fake_quantize(torch.tensor([[1.0, 1.0]]), spec, scale=scale)
    (grad,) = torch.autograd.grad(value.sum(), scale)
    assert grad.item() == 2.0


@each_grid
@pytest.mark.parametrize("gradient", ["exact", "ste"])
def test_a_group_of_zeros_passes_its_gradient_through(grid: str, bits: int, gradient: str) -> None:
    spec = QuantSpec.create(grid, bits, group_size=-1, gradient=gradient)
    weight = torch.zeros(2, 8, requires_grad=True)
    fake_quantize(weight, spec).sum().backward()
    assert torch.equal(weight.grad, torch.ones(2, 8))


@each_grid
@pytest.mark.parametrize("group_size", [-1, 4, "tensor"])
def test_a_stack_of_matrices_gets_the_gradients_of_its_matrices(grid: str, bits: int, group_size: int | str) -> None:
    spec = QuantSpec.create(grid, bits, group_size=group_size)
    stack, upstream = normal(3, 5, 12), normal(3, 5, 12, seed=1)

    def grad_of(weight: Tensor, upstream: Tensor) -> Tensor:
        weight = weight.clone().requires_grad_()
        return gradients(fake_quantize(weight, spec), upstream, [weight])[0]

    wanted = torch.stack([grad_of(*pair) for pair in zip(stack, upstream, strict=True)])
    assert torch.equal(grad_of(stack, upstream), wanted)


@each_grid
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gradients_come_in_the_dtype_of_what_they_belong_to(grid: str, bits: int, dtype: torch.dtype) -> None:
    spec = QuantSpec.create(grid, bits, group_size=4)
    weight = normal(3, 8).to(dtype).requires_grad_()
    same = weight.detach().float().requires_grad_()
    for tensor in (weight, same):
        fake_quantize(tensor, spec).square().sum().backward()
    assert weight.grad.dtype == dtype
    assert torch.equal(weight.grad, same.grad.to(dtype))
    params = {
        name: tensor.float().requires_grad_()
        for name, tensor in find_params(weight, spec)._asdict().items()
        if tensor is not None
    }
    fake_quantize(weight, spec, **params).square().sum().backward()
    assert {param.grad.dtype for param in params.values()} == {torch.float32}


def test_a_weight_that_is_frozen_lets_its_scale_train_alone() -> None:
    spec = QuantSpec.create("nf", 3, group_size=4)
    params = find_params(normal(3, 8), spec)
    scale = params.scale.float().requires_grad_()
    fake_quantize(normal(3, 8), spec, scale=scale, scale_negative=params.scale_negative.float()).sum().backward()
    assert scale.grad is not None


def test_there_is_no_second_derivative() -> None:
    weight = normal(1, 8).requires_grad_()
    value = fake_quantize(weight, QuantSpec.create("int", 2, group_size=-1)).square().sum()
    (grad,) = torch.autograd.grad(value, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_few_steps_of_training_bring_the_quantized_weight_to_its_target() -> None:
    spec = QuantSpec.create("int", 2, group_size=8)
    target = fake_quantize(normal(4, 16), spec)
    weight = normal(4, 16, seed=5).requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=0.1)

    def distance() -> Tensor:
        return (fake_quantize(weight, spec) - target).square().mean()

    start = distance().item()
    for _ in range(100):
        optimizer.zero_grad()
        distance().backward()
        optimizer.step()
    assert distance().item() < 0.6 * start


def test_the_formula_tells_a_wrong_gradient_from_a_right_one() -> None:
    exact = normal(2, 16).double().requires_grad_()
    (grad,) = torch.autograd.grad(formula(exact, SPECS[0]).square().sum(), exact)
    through = QuantSpec(SPECS[0].grid, 16, torch.float32, gradient="ste")
    ours = normal(2, 16).requires_grad_()
    fake_quantize(ours, through).square().sum().backward()
    assert not torch.allclose(ours.grad.double(), grad, atol=1e-3)
