"""From last hidden states to logits and back, in fp32 whatever the inputs are.

As training succeeds, the difference between student and teacher falls below the resolution of a bf16 logit: with an
8-bit student, bf16 logits leave a gradient that is 90 % rounding (docs/measurements.md). So products of half-precision
inputs are summed and kept in fp32. CUDA does that natively. Elsewhere both factors are widened first, the head a few
thousand rows at a time, so that no fp32 copy of it ever exists.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bitdistiller_peft.errors import ConfigError

_WIDENED_ELEMENTS = 1 << 22
"""How much of a half-precision head is widened at once: 16 MiB in fp32."""


@dataclass(frozen=True, eq=False)
class Head:
    """How one model turns its last hidden state into logits: `softcap(logit_scale * (hidden @ weight.T + bias))`.

    Attributes:
        weight: `[vocab, hidden]`. For a quantized head: the weight it computes with, not the one it stores.
        bias: `[vocab]`, or None. `-inf` there switches an entry of a padded vocabulary off.
        logit_scale: multiplies the logits (Cohere, Granite, Falcon-H1); 1 for most models.
        logit_softcap: bounds them, `c * tanh(logits / c)`, after the scale (Gemma 2); None for most models.

    Raises:
        ConfigError: shapes that do not fit, a scale that is not finite, a cap that is not positive.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if self.weight.dim() != 2:
            raise ConfigError(f"`weight` must be [vocab, hidden]: got weight={list(self.weight.shape)}.")
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ConfigError(
                f"`bias` must be [vocab]: got bias={list(self.bias.shape)}, weight={list(self.weight.shape)}."
            )
        if not math.isfinite(self.logit_scale):
            raise ConfigError(f"`logit_scale` must be finite: got logit_scale={self.logit_scale!r}. Use 1.0 for none.")
        if self.logit_softcap is not None and not 0 < self.logit_softcap < math.inf:
            raise ConfigError(
                f"`logit_softcap` must be positive: got logit_softcap={self.logit_softcap!r}. Use None for no cap."
            )


def project(hidden: Tensor, head: Head, dtype: torch.dtype) -> Tensor:
    """Compute logits.

    Args:
        hidden: `[tokens, hidden]`.
        head: the model's output projection.
        dtype: fp32 or fp64, what the logits are summed and kept in.

    Returns:
        A new `[tokens, vocab]` tensor.
    """
    weight = head.weight
    if _has_wide_sums(hidden, weight, dtype):
        logits = torch.mm(hidden, weight.t(), out_dtype=dtype)
    else:
        logits = hidden.new_empty(len(hidden), len(weight), dtype=dtype)
        wide = hidden.to(dtype)
        for rows in _row_chunks(weight, dtype):
            # into its place: a product on its way there would be as large as a tile
            torch.mm(wide, weight[rows].to(dtype).t(), out=logits[:, rows])
    if head.bias is not None:
        logits += head.bias
    if head.logit_scale != 1:
        logits *= head.logit_scale
    if head.logit_softcap is not None:
        logits.div_(head.logit_softcap).tanh_().mul_(head.logit_softcap)
    return logits


def pull_back(logit_grad: Tensor, logits: Tensor, head: Head) -> Tensor:
    """Carry a gradient from the logits to `hidden @ weight.T + bias`, in place.

    Args:
        logit_grad: `[tokens, vocab]`, overwritten.
        logits: what `project` returned.
        head: the head it was called with.
    """
    if head.logit_softcap is not None:
        slope = (logits / head.logit_softcap).square_().neg_().add_(1)
        logit_grad *= slope
    if head.logit_scale != 1:
        logit_grad *= head.logit_scale
    return logit_grad


def hidden_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """Multiply a gradient `[tokens, vocab]` by the head: `[tokens, hidden]`, in the dtype of the gradient."""
    if _can_narrow(grad, weight):
        return torch.mm(grad.to(weight.dtype), weight, out_dtype=grad.dtype)
    total = grad.new_zeros(len(grad), weight.shape[1])
    for rows in _row_chunks(weight, grad.dtype):
        total.addmm_(grad[:, rows], weight[rows].to(grad.dtype))
    return total


def add_weight_gradient(total: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """Add `grad.T @ hidden` to the head's gradient so far.

    Args:
        total: `[vocab, hidden]`, fp32 or fp64, changed in place.
        grad: `[tokens, vocab]`, same dtype.
        hidden: `[tokens, hidden]`, any floating dtype.
    """
    if _can_narrow(grad, hidden):
        total += torch.mm(grad.to(hidden.dtype).t(), hidden, out_dtype=grad.dtype)
    else:
        total.addmm_(grad.t(), hidden.to(grad.dtype))


def _has_wide_sums(left: Tensor, right: Tensor, dtype: torch.dtype) -> bool:
    """Whether the device multiplies these half-precision tensors with fp32 sums and an fp32 result."""
    is_half = left.dtype == right.dtype and left.dtype in (torch.bfloat16, torch.float16)
    return is_half and left.is_cuda and torch.version.hip is None and dtype == torch.float32


def _can_narrow(grad: Tensor, factor: Tensor) -> bool:
    """Whether a gradient may be rounded to its factor's dtype first, so that the device's fast product applies.

    Its entries are differences of probabilities, already taken in fp32. bf16 keeps them to 0.2 % at any size; fp16
    would flush those below 6e-8 to zero, and with a large vocabulary that is most of them.
    """
    return factor.dtype == torch.bfloat16 and _has_wide_sums(factor, factor, grad.dtype)


def _row_chunks(weight: Tensor, dtype: torch.dtype) -> Iterator[slice]:
    """Rows of the head to widen at once: all of them where nothing needs widening."""
    num_rows, width = weight.shape
    step = num_rows if weight.dtype == dtype else max(1, _WIDENED_ELEMENTS // max(1, width))
    for start in range(0, num_rows, max(1, step)):
        yield slice(start, start + step)
