"""A decoder as a row of blocks that can be run one at a time, whatever the architecture.

A block is an entry of the model's main `nn.ModuleList`. What the model passes to it besides the hidden states (masks,
position embeddings, ...) may differ from block to block and from batch to batch, and only the model's own code knows
how to make it. So that code is run, with the blocks replaced by stand-ins that note their arguments and return at
once: it costs next to nothing, and afterwards each block can be run alone on hidden states that are kept in memory.

Whether that is the whole truth about a model is tried out, not assumed: on a few tokens, the blocks run one by one must
end where the model itself ends. Models with shared, skipped or communicating blocks fail and get no `BlockRunner`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

PROBE_TOKENS = 8
_ABSENT = object()


class EarlyStop(Exception):
    """Raised inside a forward pass once nothing more is wanted from it; always caught in this package."""


@dataclass
class _Call:
    """The arguments of one block for one batch, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_name: str | None  # `None`: the first positional argument

    def with_hidden(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.hidden_name is None:
            return (hidden, *self.args), self.kwargs
        return self.args, {**self.kwargs, self.hidden_name: hidden}


def find_blocks(model: nn.Module, layers: Sequence[nn.Module]) -> tuple[str, list[nn.Module]] | None:
    """Find the decoder's blocks: the entries of the outermost `nn.ModuleList` that holds most of the layers.

    Args:
        model: the model.
        layers: the layers that matter, here the quantized ones.

    Returns:
        Its name and its entries, or `None` if no list holds any of the layers.
    """
    wanted = {id(layer) for layer in layers}
    best: tuple[int, str, list[nn.Module]] = (0, "", [])
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            count = sum(id(inner) in wanted for inner in module.modules())
            if count > best[0]:  # of lists inside one another, the outer one comes first and stays
                best = (count, name, list(module))
    return None if best[0] == 0 else best[1:]


def run_model(model: nn.Module, input_ids: Tensor) -> None:
    """Run a causal language model for what its modules do on the way; an `EarlyStop` ends it."""
    with suppress(EarlyStop):
        model(input_ids=input_ids, use_cache=False)


class BlockRunner:
    """Runs a decoder block by block on kept hidden states.

    Use `create`, then `record` to get what enters the first block, then `run` for one block after the other.

    Attributes:
        names: names of the blocks in the model.
        blocks: the blocks.
    """

    def __init__(self, model: nn.Module, names: list[str], blocks: list[nn.Module]) -> None:
        self.model, self.names, self.blocks = model, names, blocks
        self._calls: list[list[_Call]] = [[] for _ in blocks]  # [block][batch]
        self._extras: list[tuple[Any, ...] | None] = [None] * len(blocks)

    @classmethod
    def create(cls, model: nn.Module, layers: Sequence[nn.Module], batch: Tensor) -> BlockRunner | None:
        """Find the blocks and try them out.

        Args:
            model: a causal language model in eval mode.
            layers: the layers that matter.
            batch: some token ids ``[batch, time]``.

        Returns:
            The runner, or `None` if the model cannot be run block by block.
        """
        found = find_blocks(model, layers)
        if found is None:
            return None
        name, blocks = found
        runner = cls(model, [f"{name}.{index}" for index in range(len(blocks))], blocks)
        return runner if runner._works(batch[:1, :PROBE_TOKENS]) else None

    @torch.no_grad()
    def record(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """Note the arguments of every block for every batch of token ids.

        Returns:
            The hidden states that enter the first block, batch by batch.
        """
        entering: list[Tensor] = []
        self._calls = [[] for _ in self.blocks]
        for batch in batches:
            calls: list[_Call] = []
            with ExitStack() as stack:
                for index in range(len(self.blocks)):
                    stack.enter_context(_forward_of(self.blocks[index], self._noting(index, calls, entering)))
                run_model(self.model, batch)
            for of_block, call in zip(self._calls, calls, strict=True):
                _share(call, of_block[0] if of_block else None)
                of_block.append(call)
        return entering

    def run(self, index: int, batch: int, hidden: Tensor) -> Tensor:
        """Run one block.

        Args:
            index: which block.
            batch: which of the recorded batches' arguments it gets.
            hidden: hidden states ``[batch, time, width]``, on the device of the block.

        Returns:
            The hidden states that leave it.
        """
        args, kwargs = send_to_device(self._calls[index][batch].with_hidden(hidden), hidden.device)
        output = self.blocks[index](*args, **kwargs)
        leaving: Tensor = output if isinstance(output, Tensor) else output[0]
        return leaving

    def run_before(self, batch: Tensor) -> None:
        """Run what comes before the first block, embeddings above all, on token ids."""

        def stop(*args: Any, **kwargs: Any) -> Any:
            raise EarlyStop

        with _forward_of(self.blocks[0], stop):
            run_model(self.model, batch)

    def run_after(self, batch: Tensor, hidden: Tensor) -> None:
        """Run what comes after the last block, the output head above all.

        Args:
            batch: token ids.
            hidden: the hidden states that left the last block for them.
        """
        with ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                is_last = index == len(self.blocks) - 1
                stack.enter_context(_forward_of(block, self._passing(index, hidden if is_last else None)))
            run_model(self.model, batch)

    # ------------------------------------------------------------------------------------------------ stand-ins

    def _noting(self, index: int, calls: list[_Call], entering: list[Tensor]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            call, hidden = _take_hidden(args, kwargs)
            calls.append(call)
            if index == 0:
                entering.append(hidden)
            if index == len(self.blocks) - 1:
                raise EarlyStop
            return self._as_output(index, hidden)

        return forward

    def _passing(self, index: int, leaving: Tensor | None) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._as_output(index, _take_hidden(args, kwargs)[1] if leaving is None else leaving)

        return forward

    def _as_output(self, index: int, hidden: Tensor) -> Any:
        extras = self._extras[index]
        return hidden if extras is None else (hidden, *extras)

    # ------------------------------------------------------------------------------------------------ trying out

    @torch.no_grad()
    def _works(self, tokens: Tensor) -> bool:
        seen: list[tuple[int, Tensor, Any]] = []
        with ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                stack.enter_context(_watched(block, index, seen))
            run_model(self.model, tokens)
        if [index for index, _, _ in seen] != list(range(len(self.blocks))):
            return False  # skipped, shared, or in another order
        for index, entered, output in seen:
            first = output[0] if isinstance(output, tuple) and output else output
            if not isinstance(entered, Tensor) or not isinstance(first, Tensor):
                return False
            self._extras[index] = output[1:] if isinstance(output, tuple) else None
        hidden, *more = self.record([tokens])
        if more or any(len(calls) != 1 for calls in self._calls):
            return False
        for index, entered, output in seen:
            if not _same(entered, hidden):
                return False
            hidden = self.run(index, 0, hidden)
            if not _same(output if isinstance(output, Tensor) else output[0], hidden):
                return False
        return True


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-2, atol=1e-3, equal_nan=True)


def _take_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[_Call, Tensor]:
    """Split a block's arguments into the hidden states, which come first, and the rest."""
    if args:
        return _Call(tuple(args[1:]), dict(kwargs), None), args[0]
    name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs), "")
    rest = {key: value for key, value in kwargs.items() if key != name}
    return _Call((), rest, name), kwargs.get(name)  # type: ignore[return-value]


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module run another function; one that sits on the instance already (accelerate's) comes back after."""
    own = module.__dict__.get("forward", _ABSENT)
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is _ABSENT:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


@contextmanager
def _watched(block: nn.Module, index: int, seen: list[tuple[int, Tensor, Any]]) -> Iterator[None]:
    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.append((index, _take_hidden(args, kwargs)[1], output))

    handle = block.register_forward_hook(after, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _share(call: _Call, like: _Call | None) -> None:
    """Keep one copy of tensors that are equal in all batches, as masks and position embeddings are."""
    if like is not None:
        call.args = _shared(call.args, like.args)
        call.kwargs = _shared(call.kwargs, like.kwargs)


def _shared(value: Any, like: Any) -> Any:
    if isinstance(value, Tensor):
        fits = isinstance(like, Tensor) and value.shape == like.shape and value.dtype == like.dtype
        return like if fits and torch.equal(value, like) else value
    if type(value) in (tuple, list) and type(like) is type(value) and len(like) == len(value):
        return type(value)(_shared(v, w) for v, w in zip(value, like, strict=True))
    if type(value) is dict and type(like) is dict:
        return {key: _shared(item, like.get(key)) for key, item in value.items()}
    return value
