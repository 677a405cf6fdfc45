"""A spec holds everything that changes the result, survives being written down, and refuses what cannot work."""

from __future__ import annotations

import re

import pytest
import torch

from bitdistiller_peft.errors import ConfigError, GroupSizeError, UnknownNameError
from bitdistiller_peft.grids import get_grid
from bitdistiller_peft.quantizers import SCALE_DTYPES, QuantSpec, fake_quantize, find_params
from tests.quantizers.samples import each_grid, each_scale_dtype, normal

BASE = {"grid": "int", "bits": 2, "group_size": 16, "scale_dtype": "float16", "zero_point_range": None}


@each_grid
@each_scale_dtype
@pytest.mark.parametrize("group_size", [-1, 64, "tensor"])
def test_a_spec_comes_back_from_its_plain_values(grid: str, bits: int, scale_dtype: str, group_size: int | str) -> None:
    spec = QuantSpec.create(grid, bits, group_size=group_size, scale_dtype=scale_dtype)
    assert QuantSpec.create(**spec.to_dict()) == spec
    assert spec.scale_dtype == SCALE_DTYPES[scale_dtype]
    assert spec.scale_dtype_name == scale_dtype


def test_a_zero_point_range_comes_back_from_json() -> None:
    spec = QuantSpec.create("int", 2, zero_point_range=(1, 2))
    assert spec.to_dict()["zero_point_range"] == [1, 2]
    assert QuantSpec.create(**spec.to_dict()) == spec


def test_defaults_are_those_of_the_documentation() -> None:
    spec = QuantSpec.create("int", 2)
    assert (spec.group_size, spec.scale_dtype, spec.zero_point_range, spec.gradient) == (
        128,
        torch.float16,
        None,
        "exact",
    )


def test_parameters_have_one_entry_per_group() -> None:
    def shape(group_size: int | str, *weight: int) -> tuple[int, ...]:
        return QuantSpec.create("int", 2, group_size=group_size).param_shape(weight)

    assert shape(4, 5, 12) == (5, 3)
    assert shape(-1, 5, 12) == (5, 1)
    assert shape("tensor", 5, 12) == (1, 1)
    assert shape(4, 7, 5, 12) == (7, 5, 3)
    assert shape("tensor", 7, 5, 12) == (7, 1, 1)
    with pytest.raises(GroupSizeError):
        shape(5, 5, 12)


@each_grid
@pytest.mark.parametrize("group_size", [-1, 4, "tensor"])
def test_found_parameters_have_the_shape_that_the_spec_says(grid: str, bits: int, group_size: int | str) -> None:
    spec = QuantSpec.create(grid, bits, group_size=group_size)
    for weight in (normal(5, 12), normal(2, 5, 12)):
        params = find_params(weight, spec)
        assert {tuple(tensor.shape) for tensor in params if tensor is not None} == {spec.param_shape(weight.shape)}
        assert (params.zero_point is not None) == spec.grid.has_zero_point
        assert (params.scale_negative is not None) == spec.grid.has_negative_scale
        assert (params.scale_residual is not None) == spec.grid.has_residual_scale


@pytest.mark.parametrize(
    "change",
    [
        {"grid": "int_sym"},
        {"grid": "nf"},
        {"grid": "nf_sym"},
        {"grid": "fp", "bits": 3},
        {"grid": "fp_sym", "bits": 3},
        {"grid": "ternary"},
        {"grid": "r2q"},
        {"bits": 3},
        {"group_size": 8},
        {"group_size": -1},
        {"group_size": "tensor"},
        {"scale_dtype": "bfloat16"},
        {"scale_dtype": "float32"},
        {"zero_point_range": (1, 1)},
    ],
    ids=str,
)
def test_every_setting_changes_the_result(change: dict[str, object]) -> None:
    weight = normal(4, 32)
    base = fake_quantize(weight, QuantSpec.create(**BASE))
    assert not torch.equal(fake_quantize(weight, QuantSpec.create(**{**BASE, **change})), base)


def test_the_gradient_setting_changes_the_gradient_and_nothing_else() -> None:
    values, grads = [], []
    for gradient in ("exact", "ste"):
        weight = normal(4, 32).requires_grad_()
        value = fake_quantize(weight, QuantSpec.create(**BASE, gradient=gradient))
        value.square().sum().backward()
        values.append(value.detach())
        grads.append(weight.grad)
    assert torch.equal(*values)
    assert not torch.equal(*grads)


TEMPLATE = re.compile(r"`(\w+)` must .+: got .*\b\1=.+\. \S.*[.?]")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"grid": "nf33"}, "got grid='nf33'. Did you mean 'nf"),
        ({"grid": "int-sym"}, "Did you mean 'int_sym'?"),
        ({"grid": ["int"]}, "got grid=['int']"),
        ({"bits": 5}, "`bits` must be one of [2, 3, 4, 8] for grid='int': got bits=5. Use bits=2"),
        ({"bits": 0}, "got bits=0"),
        ({"bits": 1.58}, "`bits` must be an integer: got bits=1.58"),
        ({"bits": "2"}, "got bits='2'"),
        ({"bits": True}, "got bits=True"),
        ({"grid": "nf", "bits": 8}, "`bits` must be one of [2, 3, 4] for grid='nf'"),
        ({"group_size": 0}, "got group_size=0"),
        ({"group_size": 12.5}, "got group_size=12.5"),
        ({"scale_dtype": "float8"}, "got scale_dtype='float8'. Use 'float16'"),
        ({"scale_dtype": torch.float16}, "got scale_dtype=torch.float16"),
        ({"scale_dtype": ["float16"]}, "got scale_dtype=['float16']"),
        ({"gradient": "lsq"}, "got gradient='lsq'. Use 'exact'."),
        ({"gradient": None}, "got gradient=None"),
        ({"zero_point_range": (2, 1)}, "within 0..3: got zero_point_range=(2, 1). Use (1, 2)"),
        ({"zero_point_range": (0, 4)}, "got zero_point_range=(0, 4)"),
        ({"zero_point_range": (-1, 2)}, "got zero_point_range=(-1, 2)"),
        ({"zero_point_range": (1, 2, 3)}, "two integers"),
        ({"zero_point_range": (1.0, 2.0)}, "two integers"),
        ({"zero_point_range": (False, True)}, "two integers"),
        ({"zero_point_range": 1}, "two integers"),
        ({"grid": "int_sym", "zero_point_range": (1, 2)}, "must be None for a grid without integer zero points"),
        ({"grid": "nf", "zero_point_range": [1, 2]}, "got zero_point_range=[1, 2], grid='nf'. Use grid='int'."),
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused_by_name_with_a_way_out(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        QuantSpec.create(**{"grid": "int", "bits": 2, **wrong})
    message = str(refusal.value)
    assert says in message
    if wrong.get("grid") != ["int"]:  # nothing is near to it
        assert TEMPLATE.fullmatch(message), message


def test_an_unknown_grid_is_an_unknown_name() -> None:
    with pytest.raises(UnknownNameError, match=r"`grid` must be one of \['fp', 'fp_sym', 'int', .*\]"):
        get_grid("nonsense", 2)
