"""`SubLN`: a root mean square norm on the inputs of a quantized linear layer.

    y = x / sqrt(mean(x ** 2) + eps) * gain

BitNet Distillation (arXiv 2510.13998, equations 4 and 5) puts one before the output projections of attention and MLP;
its released code puts one before every quantized layer. Gains start at one and are trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bitdistiller_peft.errors import ConfigError, UnknownNameError

SUBLN_PLACEMENTS = ("none", "output", "all")
SUBLN_EPS = 1e-8
"""The released code's; the paper gives none."""


def check_subln(placement: object, eps: object) -> None:
    """Refuse placements that do not exist and an `eps` that would not serve.

    Raises:
        UnknownNameError: another placement.
        ConfigError: `eps` is not a positive number.
    """
    if placement not in SUBLN_PLACEMENTS:
        raise UnknownNameError("subln", placement, SUBLN_PLACEMENTS)
    if not isinstance(eps, float) or not 0 < eps < math.inf:
        raise ConfigError(f"`subln_eps` must be a positive number: got subln_eps={eps!r}. Use 1e-8 or 1e-6.")


class SubLN(nn.Module):
    """Normalizes the last axis in fp32; the gain is fp32, and `.to(dtype)` moves but never casts it.

    Args:
        features: width of the last axis.
        eps: added to the mean square.
        device: where to allocate; ``"meta"`` before loading.
    """

    weight: nn.Parameter

    def __init__(self, features: int, eps: float = SUBLN_EPS, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(features, dtype=torch.float32, device=device))

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``[..., features]``; the result has the dtype of the input, rounded once."""
        wide = input.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(input.dtype)

    def extra_repr(self) -> str:
        """Width and eps, for `print(model)`."""
        return f"{self.weight.shape[0]}, eps={self.eps}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # a gain in another dtype would be another gain: the reloaded model would differ from the trained one
        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
