"""Look-ahead: what becomes of a block's output in the full-precision blocks behind it.

A block's own output weighs every direction of the hidden states alike; the blocks behind it do not. Sending output and
target on through one of them, and comparing again there, tells errors that matter from errors that do not, at the price
of a forward and a backward pass through frozen blocks.

Source: related to CBQ (arXiv 2312.07950), which trains neighbouring blocks together; here one block is
trained, and those behind it are in full precision and stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from bitdistiller_peft.calibration.blocks import BlockRunner
from bitdistiller_peft.tuner import full_precision


class LookAhead:
    """The blocks behind one block.

    Args:
        runner: all blocks.
        number: of the block at work.
        depth: how many of those behind it; fewer where the decoder ends.

    Attributes:
        blocks: they themselves.
    """

    def __init__(self, runner: BlockRunner, number: int, depth: int) -> None:
        self._runner = runner
        self._numbers = range(number + 1, min(number + 1 + depth, len(runner.blocks)))
        self._targets: dict[int, Tensor] = {}
        self.blocks: list[nn.Module] = [runner.blocks[behind] for behind in self._numbers]

    @contextmanager
    def in_full_precision(self) -> Iterator[None]:
        """Have them in full precision."""
        with ExitStack() as stack:
            for block in self.blocks:
                stack.enter_context(full_precision(block))
            yield

    def __call__(self, index: int, states: Tensor) -> Tensor:
        """Send hidden states ``[batch, time, width]`` of a batch on; they have to be `in_full_precision`."""
        for behind in self._numbers:
            states = self._runner.run(behind, index, states)
        return states

    def target(self, index: int, target: Tensor, device: torch.device) -> Tensor:
        """Send the target of a batch on, once; it is kept where it was."""
        if index not in self._targets:
            with torch.no_grad():
                self._targets[index] = self(index, target.to(device)).to(target.device)
        return self._targets[index].to(device)
