"""What enters the quantized layers, kept as Gram matrices: bounded memory, whatever the number of tokens.

Layers that read the same tensor (queries, keys and values; gate and up) share a stage: their input is looked at once.
Stages come in the order in which the model reaches them, so that a stage can be captured with the earlier ones already
quantized, by a forward pass that ends as soon as it gets there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from bitdistiller_peft.calibration.blocks import EarlyStop
from bitdistiller_peft.calibration.clip import group_width
from bitdistiller_peft.calibration.ranks import add_up, add_up_count
from bitdistiller_peft.calibration.slots import Slot
from bitdistiller_peft.errors import DataError
from bitdistiller_peft.kernels import compute_dtype
from bitdistiller_peft.layers import SubLN, forward_with

Run = Callable[[int], object]  # runs the forward pass of one batch


class Gram:
    """Running sum of ``x x^T`` for every group of inputs.

    Products are fp32 within a batch and added up in fp64 where the device has it.

    Args:
        width: inputs in a group.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.tokens = 0
        self._sum: Tensor | None = None
        self._magnitudes: Tensor | None = None

    @torch.no_grad()
    def add(self, inputs: Tensor) -> None:
        """Take in ``[..., in]``."""
        groups = inputs.detach().reshape(-1, inputs.shape[-1] // self.width, self.width).float().transpose(0, 1)
        if groups.shape[1] == 0:
            return
        self._begin(len(groups), groups.device)
        self._sum += groups.transpose(1, 2) @ groups  # type: ignore[operator]  # begun above
        self._magnitudes += groups.abs().sum(1)  # type: ignore[operator]
        self.tokens += groups.shape[1]

    def _begin(self, groups: int, device: torch.device) -> None:
        if self._sum is None:
            dtype = torch.float64 if device.type != "mps" else torch.float32
            self._sum = torch.zeros(groups, self.width, self.width, dtype=dtype, device=device)
            self._magnitudes = torch.zeros(groups, self.width, dtype=dtype, device=device)

    def add_up(self, groups: int, device: torch.device) -> None:
        """Add what all processes have seen; collective.

        Args:
            groups: groups of inputs.
            device: where to add, also where no token came by.
        """
        tokens = add_up_count(self.tokens, device)
        if tokens:
            self._begin(groups, device)
            add_up([self._sum, self._magnitudes])  # type: ignore[list-item]
        self.tokens = tokens

    def mean(self) -> Tensor | None:
        """The mean over the tokens, fp32 ``[groups, width, width]``, or `None` if none came by."""
        return None if self._sum is None else (self._sum / self.tokens).float()

    def magnitude(self) -> Tensor | None:
        """The mean of ``|x|`` of every input over the tokens, fp32 ``[in]``, or `None` if none came by."""
        return None if self._magnitudes is None else (self._magnitudes / self.tokens).float().flatten()


@dataclass
class Stage:
    """Slots that read the same input, and what is known of it.

    Attributes:
        slots: the slots; the first one's layer is where the input is caught.
        is_whole: keep one Gram matrix of all inputs, not one for each group of them.
        grams: Gram matrices by width; for experts, one for each expert.
    """

    slots: list[Slot]
    is_whole: bool = False
    grams: dict[int, list[Gram]] = field(default_factory=dict)

    def width(self, slot: Slot) -> int:
        """Inputs that share a Gram matrix."""
        inputs = slot.weight.shape[-1]
        return inputs if self.is_whole else group_width(slot.spec, inputs)

    def clear(self) -> None:
        """Begin anew."""
        widths = {self.width(slot) for slot in self.slots}
        experts = self.slots[0].weight.shape[0] if is_fused(self.slots[0]) else 1
        self.grams = {width: [Gram(width) for _ in range(experts)] for width in widths}

    def add(self, inputs: Tensor, expert: int = 0) -> None:
        """Take in inputs ``[..., in]``."""
        for grams in self.grams.values():
            grams[expert].add(inputs)

    def add_up(self) -> None:
        """Add what all processes have seen; collective."""
        weight = self.slots[0].weight
        inputs = {self.width(slot): slot.weight.shape[-1] for slot in self.slots}
        for width, grams in self.grams.items():
            for gram in grams:
                gram.add_up(inputs[width] // width, weight.device)

    def magnitude(self) -> Tensor | None:
        """The mean of ``|x|`` of every input, fp32 ``[in]``, or `None` if no token came; not for experts."""
        return next(iter(self.grams.values()))[0].magnitude()

    def gram_of(self, slot: Slot) -> tuple[Tensor | None, int]:
        """The slot's Gram matrices ``[..., groups, width, width]``, and how many of its experts saw no token.

        Experts without tokens get zeros: no candidate is better than min-max for them. `None` if no token came at all.

        Raises:
            DataError: an activation was NaN or infinite; the layer is named.
        """
        means = [gram.mean() for gram in self.grams[self.width(slot)]]
        present = [mean for mean in means if mean is not None]
        if not present:
            return None, len(means)
        if not all(bool(torch.isfinite(mean).all()) for mean in present):
            raise DataError(
                f"activations must be finite: got NaN or Inf in the input of layer {slot.layer_name!r}. Load the model "
                'in bfloat16 or float32 (dtype="bfloat16"), and check that its weights are undamaged.'
            )
        if not is_fused(slot):
            return present[0], 0
        empty = torch.zeros_like(present[0])
        return torch.stack([empty if mean is None else mean for mean in means]), means.count(None)


def is_fused(slot: Slot) -> bool:
    """Whether the slot is a parameter of fused experts."""
    return slot.weight.ndim == 3


def find_stages(slots: Sequence[Slot], run: Run, *, is_whole: bool = False) -> tuple[list[Stage], list[Slot]]:
    """Sort slots into stages by one forward pass.

    Args:
        slots: the slots of interest.
        run: runs a first batch.
        is_whole: see `Stage`.

    Returns:
        The stages in the order of their inputs, and the slots that were not reached.
    """
    reached: list[tuple[Slot, Tensor]] = []  # holds on to the tensors, so that no two have the same id

    def note(slot: Slot) -> Callable[..., None]:
        return lambda module, args, kwargs: reached.append((slot, _input(args, kwargs)))

    with ExitStack() as stack:
        for slot in slots:
            handle = slot.layer.register_forward_pre_hook(note(slot), with_kwargs=True)
            stack.callback(handle.remove)
        with suppress(EarlyStop):
            run(0)
    stages: dict[tuple[int, str], Stage] = {}
    seen: set[str] = set()
    for slot, tensor in reached:
        if slot.name not in seen:
            seen.add(slot.name)
            # each parameter of fused experts, and each layer with a norm before it, has inputs of its own
            key = (id(tensor), slot.name if is_fused(slot) or _input_norm(slot) is not None else "")
            stages.setdefault(key, Stage([], is_whole)).slots.append(slot)
    return list(stages.values()), [slot for slot in slots if slot.name not in seen]


def capture(stages: Sequence[Stage], run: Run, num_batches: int, *, stop: bool, first: int = 0) -> None:
    """Fill the Gram matrices of stages from forward passes over all batches.

    Args:
        stages: what to capture.
        run: runs one batch, by its index.
        num_batches: how many there are.
        stop: end each pass as soon as the (only) stage is reached.
        first: the first batch that counts.
    """
    with ExitStack() as stack:
        for stage in stages:
            stage.clear()
            stack.enter_context(_catching(stage, stop=stop))
        for index in range(first, num_batches):
            with suppress(EarlyStop):
                run(index)


@contextmanager
def _catching(stage: Stage, *, stop: bool) -> Iterator[None]:
    slot = stage.slots[0]
    if is_fused(slot):
        with _catching_experts(stage, slot, stop=stop):
            yield
        return

    norm = _input_norm(slot)

    def before(module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = _input(args, kwargs)
        stage.add(inputs if norm is None else norm(inputs))
        if stop:
            raise EarlyStop

    handle = slot.layer.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _catching_experts(stage: Stage, slot: Slot, *, stop: bool) -> Iterator[None]:
    """Run the experts by their plain loop, which multiplies expert by expert with `F.linear`, and listen in."""
    layer = slot.layer
    base, inner = layer.base_layer, layer.__dict__.get("forward")
    loop = inspect.unwrap(type(base).forward)  # under the dispatch to grouped kernels

    def forward(*args: Any, **kwargs: Any) -> Any:
        dtype = compute_dtype(args[0] if args else next(iter(kwargs.values())))
        weights = {name: students().to(dtype) for name, students in _students(layer).items()}
        with _Listener(weights[slot.parameter], stage):
            output = forward_with(base, weights, loop, *args, **kwargs)
        if stop:
            raise EarlyStop
        return output if inner is None else inner(*args, **kwargs)

    layer.__dict__["forward"] = forward
    try:
        yield
    finally:
        del layer.__dict__["forward"]
        if inner is not None:
            layer.__dict__["forward"] = inner


def _students(layer: Any) -> dict[str, Callable[[], Tensor]]:
    return {name: layer.active_student(name) for name in layer.parameter_names}


class _Listener(TorchFunctionMode):
    """Hands the inputs of `F.linear` with a slice of `weight` to a stage, by expert."""

    def __init__(self, weight: Tensor, stage: Stage) -> None:
        super().__init__()
        self._weight, self._stage = weight, stage

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at the call, then make it."""
        if func is F.linear:
            inputs, weight = args[:2]
            if weight.untyped_storage().data_ptr() == self._weight.untyped_storage().data_ptr():
                self._stage.add(inputs, weight.storage_offset() // self._weight[0].numel())
        return func(*args, **(kwargs or {}))


def _input_norm(slot: Slot) -> SubLN | None:
    """What normalizes the inputs inside of the overlay, after the hook that catches them."""
    active: list[str] = list(slot.layer.active_adapters)  # type: ignore[arg-type]
    return slot.layer.input_norm(active[0])


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    tensor: Tensor = args[0] if args else next(iter(kwargs.values()))
    return tensor
