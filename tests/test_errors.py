"""Every error of the house is also the built-in that a caller would catch, and keeps its kind when a place is added."""

from __future__ import annotations

import inspect

import pytest

from bitdistiller_peft import errors

CLASSES = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and issubclass(value, errors.BitDistillerError) and value is not errors.BitDistillerError
]
each_class = pytest.mark.parametrize("error", CLASSES, ids=lambda error: error.__name__)


@each_class
def test_each_error_is_also_a_built_in(error: type[errors.BitDistillerError]) -> None:
    built_ins = {base for base in error.__mro__ if base.__module__ == "builtins"}
    assert built_ins & {ValueError, RuntimeError}


@each_class
def test_each_error_stands_in_the_tree_at_the_top_of_the_file(error: type[errors.BitDistillerError]) -> None:
    parent = error.__bases__[0].__name__
    tree = inspect.getdoc(errors).splitlines()
    line = next(line for line in tree if f"─ {error.__name__} " in line)
    above = [other for other in tree[: tree.index(line)] if other.find("─ ") < line.find("─ ")]
    assert above[-1].split("─ ")[-1].split(" ")[0] == parent


def test_what_a_caller_would_catch_catches() -> None:
    assert issubclass(errors.ConfigError, ValueError)
    assert issubclass(errors.GroupSizeError, errors.ConfigError)
    assert issubclass(errors.UnknownNameError, errors.ConfigError)
    assert issubclass(errors.ScaleRangeError, errors.WeightError)
    assert issubclass(errors.ChecksumError, errors.CheckpointError)
    assert issubclass(errors.StateError, RuntimeError)
    assert issubclass(errors.TrainingError, RuntimeError)


@pytest.mark.parametrize(
    "error",
    [
        errors.WeightError("the weight must be finite"),
        errors.GroupSizeError(48, 100),
        errors.UnknownNameError("grid", "in", ["int", "nf"]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_place_is_added_in_front_and_the_kind_stays(error: errors.BitDistillerError) -> None:
    moved = errors.add_location(error, "layer 'model.layers.0.mlp.down_proj'")
    assert type(moved) is type(error)
    assert str(moved) == f"In layer 'model.layers.0.mlp.down_proj': {error}"
    assert str(errors.add_location(moved, "file 'a'")) == f"In file 'a': {moved}"


def test_an_unknown_name_lists_the_known_ones_sorted_and_guesses() -> None:
    assert str(errors.UnknownNameError("grid", "itn", ["nf", "int"])) == (
        "`grid` must be one of ['int', 'nf']: got grid='itn'. Did you mean 'int'?"
    )
    assert str(errors.UnknownNameError("grid", None, {"nf": 1})) == "`grid` must be one of ['nf']: got grid=None."
