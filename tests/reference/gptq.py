"""GPTQ from its derivation, slowly, in fp64: no factors, no blocks; the inverse Hessian shrinks input by input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bitdistiller_peft.quantizers import QuantParams, QuantSpec, get_quantizer

Place = Callable[[Tensor, slice], QuantParams]  # a group's weights [out, group] and its inputs -> parameters


class Rounded(NamedTuple):
    """Codes and values ``[out, in]``, and how clearly each code won: the gap to the second nearest level, in steps."""

    codes: Tensor
    values: Tensor
    margin: Tensor


def gptq(
    weight: Tensor, inputs: Tensor, spec: QuantSpec, place: Place, *, damping: float, order: Sequence[int] | None = None
) -> Rounded:
    """Round ``[out, in]`` input after input; each error moves the inputs that are left so that outputs move least.

    Args:
        weight: ``[out, in]``.
        inputs: ``[tokens, in]``.
        spec: the grid and its groups.
        place: gives the parameters of a group.
        damping: relative to the mean of the diagonal.
        order: the order of the inputs; all groups are then placed first.
    """
    work = weight.double().clone()
    in_features = work.shape[1]
    width = spec.group_size if isinstance(spec.group_size, int) and spec.group_size > 0 else in_features
    hessian = inputs.double().T @ inputs.double() / len(inputs)
    hessian += damping * hessian.diagonal().mean() * torch.eye(in_features, dtype=torch.float64)
    inverse = torch.linalg.inv(hessian)
    spans = [slice(start, start + width) for start in range(0, in_features, width)]
    placed = {} if order is None else {i: place(work[:, span].float(), span) for i, span in enumerate(spans)}
    found = Rounded(torch.zeros(work.shape, dtype=torch.int64), torch.zeros_like(work), torch.zeros_like(work))
    for j in range(in_features) if order is None else order:
        group = j // width
        if group not in placed:
            placed[group] = place(work[:, spans[group]].float(), spans[group])
        codes, values, margin = _nearest(work[:, j], placed[group], spec)
        found.codes[:, j], found.values[:, j], found.margin[:, j] = codes, values, margin
        error = (work[:, j] - values) / inverse[j, j]
        work -= torch.outer(error, inverse[j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]  # j is settled
    return found


def _nearest(column: Tensor, params: QuantParams, spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor]:
    codes = torch.arange(spec.grid.num_levels).expand(len(column), 1, -1)
    levels = get_quantizer(spec.grid).dequantize(codes, params, spec)[:, 0].double()  # [out, levels]
    distance, order = (levels - column[:, None]).abs().sort(-1)
    step = (levels.amax(-1) - levels.amin(-1)) / (spec.grid.num_levels - 1)
    chosen = order[:, 0]
    return chosen, levels.gather(-1, order[:, :1])[:, 0], (distance[:, 1] - distance[:, 0]) / step
