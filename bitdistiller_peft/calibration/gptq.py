"""GPTQ with any grid: each rounding error is made up for by the inputs that are still to be rounded.

The output error of a layer is ``d H d`` for every output channel, with ``d = Q(w) - w`` and ``H = X X^T``, the Gram
matrix of the layer's inputs. Round input after input; the best reaction of the inputs not yet rounded to an error ``e``
at input ``j`` is to move by ``-e H^-1[j, rest] / H^-1[j, j]``, where ``H`` is that of the inputs from ``j`` on. All of
these rows together are the upper Cholesky factor ``U`` of ``H^-1 = U^T U``, computed once. Errors reach the inputs of
the same block at once, all others when the block is done, which changes the order of additions and nothing else.

Nothing here knows a grid: a group's parameters are placed, and an input is rounded, by the quantizer of its family.
The weight *before* it was rounded is what is kept. With the group's parameters its code is the one that was chosen, so
a student that takes both over shows exactly these codes, and has a latent weight to train on.

Source: GPTQ (arXiv 2210.17323), algorithm 1. Differences: inputs that are always zero keep their weights (published:
zero), since another text may use them; an output channel for which plain rounding happens to be better is rounded
plainly, so no channel is ever worse than that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bitdistiller_peft.calibration.clip import check_searchable, group_width, search_range
from bitdistiller_peft.calibration.options import GptqOptions
from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.quantizers import (
    QuantParams,
    QuantSpec,
    find_params,
    get_quantizer,
    store_learned_params,
    to_groups,
)


class Compensated(NamedTuple):
    """What GPTQ made of one weight, or of the weights of several experts.

    Attributes:
        weight: each weight as it was when it was rounded, in the dtype of the original, ``[..., out, in]``.
        params: the parameters of every group; `weight` has with them the codes that were chosen.
        values: what these codes stand for, fp32, shape of `weight`.
        error_before: output error of min-max and rounding to nearest, ``[..., out]``.
        error_after: output error of `values`.
        energy: mean squared output of the original, what the errors are relative to.
    """

    weight: Tensor
    params: QuantParams
    values: Tensor
    error_before: Tensor
    error_after: Tensor
    energy: Tensor


def compensate(weight: Tensor, gram: Tensor, spec: QuantSpec, options: GptqOptions) -> Compensated:
    """Quantize a weight so that errors make up for one another in the layer's output.

    Args:
        weight: ``[out, in]``, or ``[experts, out, in]``.
        gram: mean Gram matrix of all inputs, ``[in, in]``, or ``[experts, in, in]``; zeros stand for no inputs, and
            then the weight is rounded to nearest.
        spec: how to quantize.
        options: how to go about it.

    Raises:
        WeightError: the weight holds NaN or Inf.
        ScaleRangeError: a scale cannot be stored in `spec.scale_dtype`.
        ConfigError: too little damping for so few inputs, or a clip search on a grid whose scales follow from no range.
    """
    if weight.ndim == 3:
        parts = [compensate(one, its_gram, spec, options) for one, its_gram in zip(weight, gram, strict=True)]
        params = _map_params(lambda *tensors: torch.stack(tensors), *(part.params for part in parts))
        names = [name for name in Compensated._fields if name != "params"]
        return Compensated(params=params, **{name: torch.stack([getattr(p, name) for p in parts]) for name in names})
    if options.clip_search:
        _check_searchable(spec)
    gram = gram.float()
    plain = _plain(weight, spec)
    kept, params, values = _Work(weight.detach(), gram, spec, options).run()
    get_quantizer(spec.grid).check(params)
    original = weight.detach().float()
    before, after = (quadratic(shown - original, gram) for shown in (plain.values, values))
    better = after <= before
    if spec.group_size == "tensor":
        better = (after.sum() <= before.sum()).expand_as(after)  # all channels share the parameters
    column = better.unsqueeze(-1)
    groups = better[:1].unsqueeze(-1) if spec.group_size == "tensor" else column
    return Compensated(
        torch.where(column, kept, plain.weight),
        _map_params(lambda ours, theirs: torch.where(groups, ours, theirs), params, plain.params),
        torch.where(column, values, plain.values),
        before,
        torch.where(better, after, before),
        quadratic(original, gram),
    )


@dataclass(frozen=True)
class _Quantized:
    weight: Tensor
    params: QuantParams
    values: Tensor


def _plain(weight: Tensor, spec: QuantSpec) -> _Quantized:
    """Min-max and rounding to nearest, as a student with learned scales stores it."""
    weight = weight.detach()
    params = store_learned_params(find_params(weight, spec), spec)  # an absent sign's scale is not 0 any more
    quantizer = get_quantizer(spec.grid)
    codes = quantizer.quantize(to_groups(weight.float(), spec.group_size), params, spec)
    return _Quantized(weight, params, quantizer.dequantize(codes, params, spec).reshape(weight.shape))


def _check_searchable(spec: QuantSpec) -> None:
    try:
        check_searchable(spec, clamp_weight=False)
    except ConfigError as error:
        raise ConfigError(
            f"{error} Or pass clip_search=False, and GPTQ takes the scales as the grid has them."
        ) from None


def plain_values(weight: Tensor, spec: QuantSpec) -> Tensor:
    """What a fresh student with learned scales shows in place of a weight: min-max, rounded to nearest, fp32.

    Raises:
        WeightError, ScaleRangeError: see `find_params`.
    """
    return _plain(weight, spec).values


class _Work:
    """One weight ``[out, in]`` at work. Rows of `self.rows` are its columns, the inputs, in the order of rounding."""

    def __init__(self, weight: Tensor, gram: Tensor, spec: QuantSpec, options: GptqOptions) -> None:
        self.spec, self.options, self.dtype = spec, options, weight.dtype
        self.width = group_width(spec, weight.shape[1])
        self.gram, self.quantizer = gram, get_quantizer(spec.grid)
        self.original = weight.float()
        self.order: Tensor | None = None
        if options.act_order:
            self.order = torch.argsort(gram.diagonal(), descending=True, stable=True)
            gram = gram[self.order][:, self.order]
        self.factor = _inverse_factor(gram, options.damping)
        rows = self.original if self.order is None else self.original[:, self.order]
        self.rows = rows.T.contiguous().clone()

    def run(self) -> tuple[Tensor, QuantParams, Tensor]:
        """The weights as they were rounded, all parameters, and the values of the codes."""
        kept, values = torch.empty_like(self.rows), torch.empty_like(self.rows)
        # in another order than that of the inputs, a group is met in pieces, so all are placed at the start
        placed = [] if self.order is None else [self._place(self.original, group) for group in self._groups()]
        for start, stop in self._blocks():
            errors = torch.empty_like(self.rows[start:stop])
            for row in range(start, stop):
                if self.order is None and row % self.width == 0:
                    placed.append(self._place(self.rows.T, row // self.width))
                group = (row if self.order is None else int(self.order[row])) // self.width
                kept[row] = self.rows[row].to(self.dtype).float()  # as the master weight will hold it
                values[row] = self._round(kept[row], placed[group])
                errors[row - start] = (self.rows[row] - values[row]) / self.factor[row, row]
                self.rows[row + 1 : stop].addr_(self.factor[row, row + 1 : stop], errors[row - start], alpha=-1)
            self.rows[stop:].addmm_(self.factor[start:stop, stop:].T, errors, alpha=-1)
        params = _map_params(lambda *tensors: torch.cat(tensors, -1), *placed)
        return self._in_order(kept).to(self.dtype), params, self._in_order(values)

    def _groups(self) -> range:
        return range(self.original.shape[1] // self.width)

    def _blocks(self) -> Iterator[tuple[int, int]]:
        """Runs of inputs whose errors are passed on together; a group begins at the beginning of one, or within."""
        width, size = self.width, self.options.block_size
        inputs = len(self.rows)
        if self.order is not None or width <= size:
            step = size if self.order is not None else width * (size // width)
            yield from ((start, min(start + step, inputs)) for start in range(0, inputs, step))
            return
        for group in range(0, inputs, width):
            yield from ((at, min(at + size, group + width)) for at in range(group, group + width, size))

    def _place(self, weight: Tensor, group: int) -> QuantParams:
        """The parameters of one group of inputs, ``[out, 1]``, from what its weights are now."""
        span = slice(group * self.width, (group + 1) * self.width)
        part = weight[:, span].contiguous()
        if self.options.clip_search:
            found = search_range(part, self.gram[span, span][None], self.spec, factors=self.options.factors)
            params = self.quantizer.params_from_range(found.low, found.high, self.spec)
        else:
            params = self.quantizer.find_params(to_groups(part, self.spec.group_size), self.spec)
        return store_learned_params(params, self.spec)

    def _round(self, row: Tensor, params: QuantParams) -> Tensor:
        codes = self.quantizer.quantize(row[:, None, None], params, self.spec)
        return self.quantizer.dequantize(codes, params, self.spec).flatten()

    def _in_order(self, rows: Tensor) -> Tensor:
        if self.order is None:
            return rows.T.contiguous()
        return rows[torch.argsort(self.order)].T.contiguous()


def _inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """The upper factor ``U`` of ``(H + damping * mean(diag H))^-1 = U^T U``, fp32; identity for inputs never seen."""
    precise = gram.float() if gram.device.type == "mps" else gram.double()
    damp = damping * precise.diagonal().mean()
    eye = torch.eye(len(precise), dtype=precise.dtype, device=precise.device)
    if not bool(damp > 0):
        return eye.float()
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(precise + damp * eye))
        upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # not in torch's __all__
        raise ConfigError(
            f"`damping` must make the Gram matrix of the inputs invertible: got damping={damping}. Use 0.01 or "
            "more, or give more text."
        ) from None
    return upper.float()


def quadratic(moved: Tensor, gram: Tensor) -> Tensor:
    """``d H d`` for every row of ``d`` ``[out, in]``."""
    return (moved @ gram).mul_(moved).sum(-1).clamp_(min=0)


def _map_params(function: Callable[..., Tensor], *params: QuantParams) -> QuantParams:
    """Apply a function to each tensor of parameters, or to each tuple of tensors of several."""
    mapped = (None if column[0] is None else function(*column) for column in zip(*params, strict=True))
    return QuantParams(*mapped)  # type: ignore[arg-type]  # a scale is always there
