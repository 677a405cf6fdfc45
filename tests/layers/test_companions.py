"""What stands beside a quantized weight: named, shaped and started as the checkpoint says, for every setting."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bitdistiller_peft.errors import GroupSizeError, ScaleRangeError, WeightError
from bitdistiller_peft.layers import (
    SUFFIXES,
    FakeQuantWeight,
    Trained,
    attach_learned_params,
    companion,
    companion_suffixes,
    fake_quantized,
    iter_quantized,
    packed_layout,
    packed_params,
    packed_tensors,
    quant_specs,
    quantized,
    register_packed,
    set_learned_params,
)
from bitdistiller_peft.packing import pack_codes
from bitdistiller_peft.quantizers import QuantSpec, dequantize, fake_quantize, find_params, quantize
from tests.quantizers.samples import each_grid, each_scale_dtype, hard_weight, normal

each_group_size = pytest.mark.parametrize("group_size", [-1, 4, "tensor"])


COMPANIONS = {
    "int": ["_scale", "_zero_point"],
    "int_fine": ["_scale", "_zero_point"],
    "nf": ["_scale", "_scale_negative"],
    "fp": ["_scale", "_scale_negative"],
    "r2q": ["_scale", "_scale_residual"],
}


class Holder(nn.Module):
    """Any module with a float parameter that is not called `weight`."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.kernel = nn.Parameter(tensor)


def attached(weight: Tensor, spec: QuantSpec, **options: object) -> Holder:
    holder = Holder(weight)
    attach_learned_params(holder, "kernel", spec, **{"learn_scale": True, "learn_zero_point": True, **options})
    return holder


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


# ------------------------------------------------------------------------------------------------------------ training


@each_grid
def test_each_grid_gets_the_companions_it_needs(grid: str, bits: int) -> None:
    spec = QuantSpec.create(grid, bits, group_size=4)
    holder = attached(normal(3, 8), spec)
    wanted = COMPANIONS.get(grid, ["_scale"])
    assert list(companion_suffixes(spec)) == wanted
    assert set(own_tensors(holder)) == {"kernel", *("kernel" + suffix for suffix in wanted)}
    assert quant_specs(holder) == {"kernel": spec}


@each_grid
@each_scale_dtype
def test_learning_starts_exactly_where_min_max_is(grid: str, bits: int, scale_dtype: str) -> None:
    spec = QuantSpec.create(grid, bits, group_size=-1, scale_dtype=scale_dtype)
    weight = hard_weight()
    assert torch.equal(fake_quantized(attached(weight, spec), "kernel"), fake_quantize(weight, spec))


def test_learned_tensors_are_fp32_parameters_and_a_fixed_zero_point_is_a_buffer() -> None:
    spec = QuantSpec.create("int", 2, group_size=4)
    both = attached(normal(3, 8).bfloat16(), spec)
    assert isinstance(both.kernel_zero_point, nn.Parameter)
    assert both.kernel_scale.dtype == both.kernel_zero_point.dtype == torch.float32
    fixed = attached(normal(3, 8), spec, learn_zero_point=False)
    assert [name for name, _ in fixed.named_buffers()] == ["kernel_zero_point"]
    assert fixed.kernel_zero_point.dtype == torch.uint8
    assert torch.equal(fixed.kernel_zero_point, find_params(fixed.kernel, spec).zero_point)


@each_grid
def test_without_learning_nothing_is_registered_and_the_weight_decides(grid: str, bits: int) -> None:
    spec = QuantSpec.create(grid, bits, group_size=4)
    holder = attached(normal(3, 8), spec, learn_scale=False, learn_zero_point=False)
    assert set(own_tensors(holder)) == {"kernel"}
    with torch.no_grad():
        holder.kernel.mul_(3)
    assert torch.equal(fake_quantized(holder, "kernel"), fake_quantize(normal(3, 8) * 3, spec))


def test_learned_parameters_stay_when_the_weight_moves() -> None:
    spec = QuantSpec.create("int", 2, group_size=4)
    holder = attached(normal(3, 8), spec)
    before = find_params(normal(3, 8), spec)
    with torch.no_grad():
        holder.kernel.mul_(3)
    codes, params = quantized(holder, "kernel")
    assert torch.equal(params.scale, before.scale)
    assert torch.equal(params.zero_point, before.zero_point)
    assert torch.equal(codes, quantize(normal(3, 8) * 3, before, spec))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@each_scale_dtype
def test_the_scale_of_an_absent_sign_starts_from_a_small_positive_floor(sign: float, scale_dtype: str) -> None:
    spec = QuantSpec.create("nf", 3, group_size=-1, scale_dtype=scale_dtype)
    weight = sign * (normal(2, 8).abs() + 0.1)
    holder = attached(weight, spec)
    absent = holder.kernel_scale_negative if sign > 0 else holder.kernel_scale
    assert bool((absent == torch.finfo(spec.scale_dtype).tiny).all())
    assert torch.equal(fake_quantized(holder, "kernel"), fake_quantize(weight, spec))
    quantized(holder, "kernel")  # and it can be packed
    with torch.no_grad():
        holder.kernel.neg_()
    fake_quantized(holder, "kernel").sum().backward()
    assert bool((absent.grad != 0).all())  # it learns as soon as its sign appears


@each_grid
@each_group_size
@pytest.mark.parametrize("learn_zero_point", [False, True])
def test_a_module_without_values_gets_companions_of_the_same_shapes_and_dtypes(
    grid: str, bits: int, group_size: int | str, learn_zero_point: bool
) -> None:
    spec = QuantSpec.create(grid, bits, group_size=group_size)
    for shape in ((3, 8), (2, 3, 8)):
        real = attached(normal(*shape), spec, learn_zero_point=learn_zero_point)
        meta = attached(torch.empty(*shape, device="meta"), spec, learn_zero_point=learn_zero_point)
        assert {tensor.device.type for tensor in own_tensors(meta).values()} == {"meta"}
        for name, tensor in own_tensors(real).items():
            twin = own_tensors(meta)[name]
            assert (twin.shape, twin.dtype, twin.requires_grad) == (tensor.shape, tensor.dtype, tensor.requires_grad)
        meta.load_state_dict(real.state_dict(), assign=True)
        assert torch.equal(fake_quantized(meta, "kernel"), fake_quantized(real, "kernel"))


def test_given_start_values_replace_min_max() -> None:
    spec = QuantSpec.create("int", 2, group_size=4)
    start = find_params(normal(3, 8, std=0.5, seed=3), spec)
    holder = attached(normal(3, 8), spec, params=start)
    codes, params = quantized(holder, "kernel")
    assert torch.equal(params.scale, start.scale)
    assert torch.equal(params.zero_point, start.zero_point)
    assert torch.equal(codes, quantize(normal(3, 8), start, spec))


@each_grid
@pytest.mark.parametrize("learn_zero_point", [False, True])
def test_calibrated_values_can_be_set_later_without_a_new_parameter(
    grid: str, bits: int, learn_zero_point: bool
) -> None:
    spec = QuantSpec.create(grid, bits, group_size=4)
    holder = attached(normal(3, 8), spec, learn_zero_point=learn_zero_point)
    before = own_tensors(holder)
    calibrated = find_params(normal(3, 8, std=0.5, seed=3), spec)
    set_learned_params(holder, "kernel", calibrated)
    codes, params = quantized(holder, "kernel")
    assert torch.equal(codes, quantize(holder.kernel, calibrated, spec))
    for got, want in zip(params, calibrated, strict=True):
        if want is not None and want.is_floating_point():
            want = want.clamp(min=torch.finfo(spec.scale_dtype).tiny)  # where a sign is absent
        assert (got is None and want is None) or torch.equal(got, want)
    assert all(own_tensors(holder)[name] is tensor for name, tensor in before.items())


def test_setting_values_of_what_is_not_learned_changes_nothing() -> None:
    spec = QuantSpec.create("nf", 3, group_size=4)
    holder = attached(normal(3, 8), spec, learn_scale=False)
    set_learned_params(holder, "kernel", find_params(normal(3, 8, seed=3), spec))
    assert torch.equal(fake_quantized(holder, "kernel"), fake_quantize(normal(3, 8), spec))


@pytest.mark.parametrize("learn_scale", [False, True])
def test_what_cannot_be_packed_is_refused_before_training(learn_scale: bool) -> None:
    def attach(weight: Tensor, group_size: int) -> None:
        attached(weight, QuantSpec.create("int", 2, group_size=group_size), learn_scale=learn_scale)

    with pytest.raises(WeightError, match="NaN"):
        attach(torch.full((2, 8), torch.nan), 4)
    with pytest.raises(ScaleRangeError, match="float32"):
        attach(normal(2, 8) * 1e-7, 4)
    with pytest.raises(GroupSizeError, match="group_size=3, in_features=8"):
        attach(normal(2, 8), 3)


def test_a_scale_that_training_made_too_large_is_refused_when_packed() -> None:
    holder = attached(normal(2, 8), QuantSpec.create("int", 2, group_size=4))
    with torch.no_grad():
        holder.kernel_scale[0, 0] = 1e6
    with pytest.raises(ScaleRangeError, match="at most"):
        quantized(holder, "kernel")


@each_grid
def test_a_scale_that_a_step_made_negative_is_still_usable(grid: str, bits: int) -> None:
    spec = QuantSpec.create(grid, bits, group_size=4)
    holder = attached(normal(3, 8), spec)
    scales = [parameter for name, parameter in holder.named_parameters() if "_scale" in name]
    optimizer = torch.optim.SGD(scales, lr=1.0)
    (fake_quantized(holder, "kernel").square().sum() + sum(1e4 * scale.sum() for scale in scales)).backward()
    optimizer.step()
    assert all(bool((scale < 0).all()) for scale in scales)
    values = fake_quantized(holder, "kernel")
    assert values.isfinite().all()
    codes, params = quantized(holder, "kernel")
    assert torch.equal(dequantize(codes, params, spec), values)
    values.sum().backward()
    assert holder.kernel_scale.grad.isfinite().all()


@each_grid
@pytest.mark.parametrize("learn_scale", [False, True])
def test_what_is_packed_is_what_was_trained(grid: str, bits: int, learn_scale: bool) -> None:
    spec = QuantSpec.create(grid, bits, group_size=4)
    holder = attached(normal(3, 8), spec, learn_scale=learn_scale)
    optimizer = torch.optim.Adam(holder.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        (fake_quantized(holder, "kernel") - 0.2).square().sum().backward()
        optimizer.step()
    codes, params = quantized(holder, "kernel")
    assert torch.equal(dequantize(codes, params, spec), fake_quantized(holder, "kernel"))
    assert params.scale.dtype == spec.scale_dtype


@pytest.mark.parametrize(
    ("grid", "options"),
    [
        ("int", {"learn_zero_point": False}),
        ("int", {"learn_scale": False}),
        ("int_sym", {}),
        ("nf", {}),
        ("nf_sym", {}),
        ("fp", {}),
        ("fp_sym", {}),
    ],
    ids=str,
)
def test_whatever_can_be_learned_gets_a_gradient(grid: str, options: dict[str, bool]) -> None:
    holder = attached(normal(3, 8), QuantSpec.create(grid, 3, group_size=4), **options)
    fake_quantized(holder, "kernel").square().sum().backward()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in holder.parameters())


@pytest.mark.parametrize(("grid", "options"), [("ternary", {}), ("r2q", {}), ("r2q", {"tied": True})], ids=str)
@pytest.mark.parametrize("learn_scale", [False, True])
def test_whatever_two_bit_grids_learn_gets_a_gradient(grid: str, options: dict[str, bool], learn_scale: bool) -> None:
    holder = attached(normal(3, 8), QuantSpec.create(grid, 2, group_size=4, **options), learn_scale=learn_scale)
    fake_quantized(holder, "kernel").square().sum().backward()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in holder.parameters())


def test_a_tied_residual_scale_is_neither_learned_nor_stored() -> None:
    spec = QuantSpec.create("r2q", 2, group_size=4, tied=True)
    holder = attached(normal(3, 8), spec)
    assert set(own_tensors(holder)) == {"kernel", "kernel_scale"}
    codes, params = quantized(holder, "kernel")
    assert list(packed_tensors(codes, params, spec)) == ["", "_scale"]
    assert torch.equal(dequantize(codes, params, spec), fake_quantized(holder, "kernel"))


def test_several_parameters_of_one_module_are_quantized_side_by_side() -> None:
    holder = Holder(normal(3, 8))
    holder.other = nn.Parameter(normal(2, 4, 8, seed=1))
    specs = {"kernel": QuantSpec.create("int", 2, group_size=4), "other": QuantSpec.create("nf", 3, group_size=8)}
    for name, spec in specs.items():
        attach_learned_params(holder, name, spec, learn_scale=True, learn_zero_point=False)
    model = nn.Sequential(nn.ReLU(), holder)
    found = [(path, module, name, spec) for path, module, name, spec in iter_quantized(model)]
    assert found == [("1", holder, name, spec) for name, spec in specs.items()]
    assert quant_specs(model[0]) == {}


@each_grid
def test_a_lone_weight_presents_itself_fake_quantized(grid: str, bits: int) -> None:
    spec = QuantSpec.create(grid, bits, group_size=4)
    weight = normal(2, 3, 8)
    for learn_scale in (False, True):
        module = FakeQuantWeight(weight.clone(), spec, Trained(scale=learn_scale))
        assert torch.equal(module(), fake_quantize(weight, spec))
        assert module.weight.requires_grad
        assert (
            len(list(module.parameters()))
            == (1 + len(companion_suffixes(spec)) - spec.grid.has_zero_point) ** learn_scale
        )


# -------------------------------------------------------------------------------------------------------------- packed


@each_grid
@each_scale_dtype
@each_group_size
def test_stored_tensors_have_the_layout_that_was_announced(
    grid: str, bits: int, scale_dtype: str, group_size: int | str
) -> None:
    spec = QuantSpec.create(grid, bits, group_size=group_size, scale_dtype=scale_dtype)
    for weight in (normal(5, 44), normal(2, 5, 44)):
        params = find_params(weight, spec)
        tensors = packed_tensors(quantize(weight, params, spec), params, spec)
        got = {suffix: (tuple(tensor.shape), tensor.dtype) for suffix, tensor in tensors.items()}
        assert got == packed_layout(spec, weight.shape)
        assert list(tensors) == ["", *companion_suffixes(spec)]
        assert all(tensor.is_contiguous() for tensor in tensors.values())


def test_the_layout_is_the_documented_one() -> None:
    def shapes(spec: QuantSpec, *weight: int) -> dict[str, tuple[int, ...]]:
        return {suffix: shape for suffix, (shape, _) in packed_layout(spec, weight).items()}

    three = QuantSpec.create("int", 3, group_size=4)
    # 100 codes of 3 bits are 300 bits: 10 words; 25 zero points of 3 bits are 75: 3 words
    assert shapes(three, 7, 100) == {"": (7, 10), "_scale": (7, 25), "_zero_point": (7, 3)}
    assert shapes(QuantSpec.create("nf", 2, group_size=-1), 7, 100) == {
        "": (7, 7),
        "_scale": (7, 1),
        "_scale_negative": (7, 1),
    }
    assert shapes(QuantSpec.create("int", 2, group_size="tensor"), 3, 7, 100) == {
        "": (3, 7, 7),
        "_scale": (3, 1, 1),
        "_zero_point": (3, 1, 1),
    }


def test_registered_tensors_take_the_place_of_the_float_ones_frozen() -> None:
    spec = QuantSpec.create("int", 2, group_size=4)
    holder = attached(normal(3, 8), spec, learn_scale=False)
    params = find_params(holder.kernel, spec)
    tensors = packed_tensors(quantize(holder.kernel, params, spec), params, spec)
    register_packed(holder, "kernel", spec, tensors)
    assert {name: tensor.dtype for name, tensor in holder.named_parameters()} == {
        "kernel": torch.int32,
        "kernel_scale": torch.float16,
        "kernel_zero_point": torch.int32,
    }
    assert not any(parameter.requires_grad for parameter in holder.parameters())
    stored = packed_params(holder, "kernel")
    assert torch.equal(stored.scale, params.scale)
    assert torch.equal(stored.zero_point, pack_codes(params.zero_point, 2))
    assert stored.scale_negative is None
    assert [companion(holder, "kernel", suffix) is None for suffix in SUFFIXES] == [False, False, True, True]
