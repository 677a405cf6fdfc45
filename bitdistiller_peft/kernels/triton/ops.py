"""The Triton kernels behind the operators ``torch.ops.bitdistiller.triton_*``.

One token, or a few, are multiplied without a tensor core, since reading the weight is all that takes time; more go
through one; beyond `MANY_TOKENS` the weight is made dense once and the vendor's matrix product does the rest.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bitdistiller_peft.errors import StateError
from bitdistiller_peft.kernels.layout import Layout, check_weight
from bitdistiller_peft.kernels.operators import LIBRARY, define_pair
from bitdistiller_peft.kernels.tables import TableForm

FEW_TOKENS, MANY_TOKENS = 4, 512
LEAST_WIDTH, MOST_WIDTH = 32, 256  # of a tile, in weights: 32 is the least that whole words of every code width fill
FEW_ROWS, ROWS, MOST_TOKENS = 16, 64, 64  # of a tile
QUARTERS = 4  # the programs' kind of integers around zeros in quarter steps
PROGRAMS = 256  # that keep a large GPU busy; a narrower product is cut along its width


def packed_linear(inputs: Tensor, bias: Tensor | None, words: Tensor, scale: Tensor, *rest: Any) -> Tensor:
    """Multiply ``[..., in]`` (fp32, bf16 or fp16) by a packed ``[out, in]`` weight."""
    weight = _Weight(words, scale, rest[0], Layout(*rest[1:]), inputs.shape[-1])
    dtype = _computable(inputs.dtype, inputs.device)
    flat = inputs.detach().reshape(-1, weight.width).to(dtype).contiguous()
    bias = None if bias is None else bias.detach().to(dtype)
    shape = (*inputs.shape[:-1], weight.rows)
    if flat.shape[0] * weight.rows == 0:
        return inputs.new_empty(shape)
    if len(flat) > MANY_TOKENS:
        out = F.linear(flat, weight.dense(dtype), bias)
    else:
        out = weight.times_few(flat, bias) if len(flat) <= FEW_TOKENS else weight.times_many(flat, bias)
    return out.to(inputs.dtype).view(shape)


def dequantize(words: Tensor, scale: Tensor, *rest: Any) -> Tensor:
    """The dense weight ``[out, in]``, each value rounded once from fp32."""
    weight = _Weight(words, scale, rest[0], Layout(*rest[1:5]), rest[5])
    return weight.dense(_computable(rest[6], words.device)).to(rest[6])


def is_usable(device: torch.device) -> bool:
    """Whether the kernels can run for tensors on a device: with Triton, a GPU that it knows; or its interpreter."""
    programs = load()
    if programs is None:
        return False
    if device.type == "cpu":
        return bool(programs.triton.knobs.runtime.interpret)
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)


@lru_cache(maxsize=1)
def load() -> Any:
    """The module of the programs; `None` where Triton is not installed."""
    try:
        from bitdistiller_peft.kernels.triton import programs
    except ImportError:
        return None
    return programs


class _Weight:
    """A packed weight as the programs take it."""

    def __init__(self, words: Tensor, scale: Tensor, second: Tensor | None, layout: Layout, width: int) -> None:
        check_weight(words, scale, second, layout, width)
        if not is_usable(words.device):
            raise StateError(
                f"the Triton kernels do not run on device {str(words.device)!r}. Use use_backend('reference')."
            )
        form = layout.form()
        self.rows, self.width, self.device = words.shape[0], width, words.device
        self.groups = layout.num_groups(width)
        self.group_size = width if layout.group_size <= 0 else layout.group_size
        self.bk, self.groups_in_tile = tile_width(self.group_size, self.groups)
        words, scale = words.detach().contiguous(), scale.detach().contiguous()
        second = scale if second is None or form.second is None else second.detach().contiguous()
        a, b = _tables(form, str(self.device))
        self.tensors = (words, scale, second, a, b)
        kind = kind_of(form)
        start = form.a[0] if kind == QUARTERS else int(form.a[0])
        self.sizes = (words.shape[1], self.groups, second.shape[1], self.group_size, start)
        self.constants = {
            "BITS": layout.bits, "KIND": kind, "IS_SHARED": layout.group_size == 0, "BK": self.bk,
            "GROUPS": self.groups_in_tile,
        }  # fmt: skip

    def dense(self, dtype: torch.dtype) -> Tensor:
        out = torch.empty(self.rows, self.width, dtype=dtype, device=self.device)
        if out.numel():
            grid = (_cdiv(self.rows, FEW_ROWS), _cdiv(self.width, self.bk))
            with here(self.device):
                load().dequantize[grid](
                    out, *self.tensors, self.rows, self.width, *self.sizes, BN=FEW_ROWS, **self.constants
                )
        return out

    def times_few(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        steps, blocks = _cdiv(self.width, self.bk), _cdiv(self.rows, FEW_ROWS)
        parts = min(steps, max(1, PROGRAMS // (blocks * len(inputs))))
        steps = _cdiv(steps, parts)
        out = torch.empty(parts, len(inputs), self.rows, dtype=torch.float32, device=self.device)
        with here(self.device):
            load().multiply_few[blocks, len(inputs), parts](
                out, inputs, *self.tensors, self.rows, self.width, *self.sizes, steps, BN=FEW_ROWS, **self.constants
            )
        total = out.sum(0)
        return (total if bias is None else total + bias.float()).to(inputs.dtype)

    def times_many(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        bm = min(MOST_TOKENS, max(16, 1 << (len(inputs) - 1).bit_length()))
        out = torch.empty(len(inputs), self.rows, dtype=inputs.dtype, device=self.device)
        with here(self.device):
            load().multiply_many[_cdiv(self.rows, ROWS), _cdiv(len(inputs), bm)](
                out, inputs, inputs if bias is None else bias.contiguous(), *self.tensors,
                len(inputs), self.rows, self.width, *self.sizes, _cdiv(self.width, self.bk),
                HAS_BIAS=bias is not None, BN=ROWS, BM=bm, **self.constants,
            )  # fmt: skip
        return out


def here(device: torch.device) -> AbstractContextManager[object]:
    """Launch on this device, whichever is the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def tile_width(group_size: int, groups: int) -> tuple[int, int]:
    """Weights in a tile's row, a power of two, and how many groups they are; 0 groups where tiles cut through groups.

    Args:
        group_size: weights that share parameters.
        groups: of a row; where there is only one, any width will do.
    """
    if groups == 1:
        return 128, 1
    factor = group_size & -group_size  # the largest power of two that divides it
    if factor < LEAST_WIDTH:
        is_power = factor == group_size
        return (128, 128 // group_size) if is_power else (128, 0)
    if factor == group_size:
        width = min(MOST_WIDTH, max(128, group_size))
        return width, max(1, width // group_size)
    return min(MOST_WIDTH, factor), 1


def kind_of(form: TableForm) -> int:
    """Which of the five formulas of the programs a form is."""
    if form.second == "zero_point":
        return 1 if form.c == 1 else QUARTERS
    if form.second is not None:
        return 3
    levels = [form.a[0]]
    for level in form.a[1:]:
        if level <= levels[-1]:
            break  # what follows repeats, or stands for no code
        levels.append(level)
    is_even = all(level == levels[0] + code for code, level in enumerate(levels))
    return 0 if is_even and levels[0] == int(levels[0]) else 2


@lru_cache(maxsize=256)
def _tables(form: TableForm, device: str) -> tuple[Tensor, Tensor]:
    return torch.tensor(form.a, device=device), torch.tensor(form.b, device=device)


def _computable(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What programs are given: the interpreter cuts bf16 off where a GPU rounds, and multiplies it wrongly."""
    return torch.float32 if device.type == "cpu" and dtype == torch.bfloat16 else dtype


def _cdiv(total: int, size: int) -> int:
    return -(-total // size)


define_pair("triton_")
# without a device's name: for GPUs, and for the processor where Triton's interpreter is on
LIBRARY.impl("triton_packed_linear", packed_linear, "CompositeExplicitAutograd")
LIBRARY.impl("triton_dequantize", dequantize, "CompositeExplicitAutograd")
