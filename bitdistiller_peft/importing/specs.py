"""What imported weights have in common, as the settings of a `BitDistillerConfig`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.importing.formats import ImportedWeight
from bitdistiller_peft.quantizers import SCALE_DTYPES, QuantParams, QuantSpec

SYMMETRIC, ASYMMETRIC = "int_sym", "int"
_COMMON = ("bits", "group_size", "grid", "scale_dtype")


def on_asked_grids(
    weights: Mapping[str, ImportedWeight], *, grid: str | None, scale_dtype: str | None
) -> dict[str, ImportedWeight]:
    """The same weights on as few grids as hold them, or on those that were asked for.

    Integers around a common zero point also lie on the grid with one per group. Where every row is one group, its width
    does not matter.

    Raises:
        ConfigError: the grid or the dtype that was asked for does not hold them.
    """
    names = {weight.spec.grid.name for weight in weights.values()}
    is_mixed = {SYMMETRIC, ASYMMETRIC} <= names
    is_row = all(weight.params.scale.shape[1] == 1 for weight in weights.values())
    found = {}
    for layer, weight in weights.items():
        if grid not in (None, weight.spec.grid.name) and (weight.spec.grid.name, grid) != (SYMMETRIC, ASYMMETRIC):
            raise ConfigError(
                f"`grid` must hold the codes of layer {layer!r}, which are of grid {weight.spec.grid.name!r}: got "
                f"grid={grid!r}. Leave it out."
            )
        if weight.spec.grid.name == SYMMETRIC and (is_mixed or grid == ASYMMETRIC):
            weight = _asymmetric(weight)
        if scale_dtype is not None:
            weight = _with_scales(layer, weight, scale_dtype)
        found[layer] = replace(weight, spec=replace(weight.spec, group_size=-1)) if is_row else weight
    return found


def described(weights: Mapping[str, ImportedWeight]) -> dict[str, Any]:
    """Settings that mean exactly these weights: the commonest spec, and overrides for the rest."""
    values = {layer: weight.spec.to_dict() for layer, weight in weights.items()}
    specs = Counter(weight.spec for weight in weights.values())
    common = specs.most_common(1)[0][0].to_dict()
    return {
        **{key: common[key] for key in _COMMON},
        "target_modules": sorted(weights),
        "overrides": {
            re.escape(layer): {key: own[key] for key in _COMMON if own[key] != common[key]}
            for layer, own in values.items()
            if own != common
        },
    }


def _asymmetric(weight: ImportedWeight) -> ImportedWeight:
    spec, scale = weight.spec, weight.params.scale
    wider = QuantSpec.create(ASYMMETRIC, spec.grid.bits, group_size=spec.group_size, scale_dtype=spec.scale_dtype_name)
    middle = torch.full(scale.shape, 1 << (spec.grid.bits - 1), dtype=torch.uint8)
    return ImportedWeight(wider, weight.codes, QuantParams(scale, middle))


def _with_scales(layer: str, weight: ImportedWeight, name: str) -> ImportedWeight:
    dtype = SCALE_DTYPES.get(name)
    if dtype is None:
        raise ConfigError(f"`scale_dtype` must be one of {list(SCALE_DTYPES)}: got scale_dtype={name!r}.")
    scale = weight.params.scale.to(dtype)
    is_exact = torch.equal(scale.double(), weight.params.scale.double())
    if not is_exact or float(scale.min()) < torch.finfo(dtype).tiny:
        raise ConfigError(
            f"`scale_dtype` must hold the scales of layer {layer!r}, which are {weight.spec.scale_dtype_name}: got "
            f"scale_dtype={name!r}, which would round them. Leave it out, or use 'float32'."
        )
    return replace(weight, spec=replace(weight.spec, scale_dtype=dtype), params=weight.params._replace(scale=scale))
