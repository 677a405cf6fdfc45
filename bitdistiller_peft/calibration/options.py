"""What can be asked of each method, checked when it is said."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from bitdistiller_peft.calibration.clip import FACTORS
from bitdistiller_peft.calibration.option_rules import (
    check_device,
    check_flags,
    checked_factors,
    checked_stages,
    checked_widths,
)
from bitdistiller_peft.errors import ConfigError, UnknownNameError, add_location

METHODS = ("awq", "blockwise", "clip", "gptq")


@dataclass(frozen=True)
class ClipOptions:
    """Options of the asymmetric clip search.

    Args:
        objective: what is minimised for each output channel and group: `"output"`, the error of the layer's output on
            the calibration text, or `"weight"`, the error of the weights, which needs no text and is far worse at
            2 bits.
        factors: what the two ends of each group's min-max range are multiplied by; every pair is tried. All in
            (0, 1], with 1 among them. `[1 - i / 40 for i in range(20)]` is a finer grid than the default.
        skip: layers that keep min-max, by the end of their names, e.g. `("q_proj", "k_proj")` as in
            BitDistiller's code.
        inputs: what the layers before a layer compute with when its inputs are looked at: `"quantized"` weights, as
            they will; `"clipped"` ones, not rounded; or the `"full"` precision ones, as in BitDistiller's code.
        order: `"layer"` looks at the inputs of a layer once all layers before it are calibrated; `"block"` looks at
            all layers of a decoder block at once, as in BitDistiller's code.
        clip_weights: with learned scales, also clamp the master weights to the outermost levels. This changes no
            quantized value; afterwards all weights receive gradients again, and learned zero points none, which move
            through clamped weights only. Without learned scales, weights are always clamped.

    Raises:
        ConfigError: a value outside its rule.
    """

    objective: Literal["output", "weight"] = "output"
    factors: Sequence[float] = FACTORS
    skip: Iterable[str] = ()
    inputs: Literal["quantized", "clipped", "full"] = "quantized"
    order: Literal["layer", "block"] = "layer"
    clip_weights: bool = False

    def __post_init__(self) -> None:
        """Check every value and bring sequences into one form."""
        for name, known in (
            ("objective", ("output", "weight")),
            ("inputs", ("quantized", "clipped", "full")),
            ("order", ("layer", "block")),
        ):
            if getattr(self, name) not in known:
                raise UnknownNameError(name, getattr(self, name), known)
        object.__setattr__(self, "factors", checked_factors(self.factors))
        if isinstance(self.skip, str):
            raise ConfigError(f"`skip` must be a list of names: got skip={self.skip!r}. Pass ({self.skip!r},).")
        object.__setattr__(self, "skip", tuple(self.skip))

    @property
    def needs_text(self) -> bool:
        """Whether the model has to be run."""
        return self.objective == "output"

    @property
    def passes(self) -> int:
        """How often each parameter is looked at."""
        return 1

    def skips(self, layer_name: str) -> bool:
        """Whether a layer keeps min-max."""
        return any(_matches(name, layer_name) for name in self.skip)

    def check_skip(self, layer_names: Iterable[str]) -> None:
        """Refuse names in `skip` that fit no layer.

        Raises:
            ConfigError: there is one.
        """
        names = list(layer_names)
        for pattern in self.skip:
            if not any(_matches(pattern, name) for name in names):
                endings = sorted({name.rpartition(".")[2] for name in names})
                raise ConfigError(
                    f"`skip` must name quantized layers: got {pattern!r}, and the layers end in {endings}."
                )


@dataclass(frozen=True)
class BlockwiseOptions(ClipOptions):
    """Options of block-wise reconstruction; those of the clip search, which comes first in every block, included.

    Args:
        epochs: passes over the samples, for each block; 0 leaves it at the clip search.
        learning_rate: of the master weights (AdamW, no weight decay), in steps of the grid: 0.01 means that a weight
            moves by up to 1/100 of the distance between two levels in one training step, whatever the size of the
            weights. With a few dozen steps a block 0.02 is better, with thousands 0.001 is enough.
        scale_learning_rate: of learned scales, relative to the scale; of learned zero points, in code steps.
        targets: what a block is to reproduce: the output of the full-precision block on `"full"` precision inputs, or
            on the `"quantized"` ones that it itself receives.
        loss: `"normalized"` compares outputs after each token's root mean square is divided out, as the norm that reads
            them does; `"mse"` as they are, where the few tokens with huge activations outweigh all others.
        look_ahead: compare once more behind this many of the blocks that follow, in full precision: what they make of
            the output tells errors that matter from those that do not. Each adds a pass through a block to every step.
        clip_search: start each block from the clip search; else from the student as it is.
        clip_tokens: tokens of the samples, evenly spread, that the clip search looks at.
        warmup: share of the steps with a rising learning rate; a cosine to zero follows.
        seed: order of the samples.
        stages: train the layers of a block one group after the other, each with `epochs` of its own: lists of endings
            of names, e.g. `(("q_proj", "k_proj"), ("v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj"))`, or
            `"order"` for the order in which layers are reached, those that read the same input together. What comes
            later is not rounded yet, what came before stays as it is. `None` trains all at once.
        rounding: `"ste"` trains the weights through the rounding; `"soft"` trains which of the two nearest levels each
            weight takes, under a temperature that falls until the choice is hard (grids `"int"` and `"int_sym"` with
            learned scales).
        rounding_learning_rate: for `"soft"`: of the logits of that choice.
        device: where a block is while it is at work, e.g. `"cuda"` for a model that is in main memory: block after
            block goes there and comes back. `None` leaves all where it is.
        progressive_bits: train each block at these widths first, e.g. `(4,)` on the way to 2 bits, with `epochs` for
            each; scales start anew at every width.
    """

    epochs: int = 2
    learning_rate: float = 1e-2
    scale_learning_rate: float = 1e-2
    targets: Literal["full", "quantized"] = "full"
    loss: Literal["normalized", "mse"] = "normalized"
    look_ahead: int = 0
    clip_search: bool = True
    clip_tokens: int = 16384
    warmup: float = 0.05
    seed: int = 0
    stages: Sequence[Sequence[str]] | Literal["order"] | None = None
    rounding: Literal["ste", "soft"] = "ste"
    rounding_learning_rate: float = 0.05
    progressive_bits: Sequence[int] = ()
    device: str | None = None

    def __post_init__(self) -> None:
        """Check every value."""
        super().__post_init__()
        for name, known in (
            ("targets", ("full", "quantized")),
            ("loss", ("normalized", "mse")),
            ("rounding", ("ste", "soft")),
        ):
            if getattr(self, name) not in known:
                raise UnknownNameError(name, getattr(self, name), known)
        for name, usual in (("epochs", 2), ("look_ahead", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ConfigError(f"`{name}` must be a whole number of at least 0: got {name}={value!r}. Use {usual}.")
        if not isinstance(self.clip_tokens, int) or self.clip_tokens < 1:
            raise ConfigError(
                f"`clip_tokens` must be a positive whole number: got clip_tokens={self.clip_tokens!r}. Use 16384."
            )
        for name in ("learning_rate", "scale_learning_rate", "rounding_learning_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"`{name}` must lie in [0, 1): got {name}={getattr(self, name)!r}. Use 0.002.")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"`warmup` must lie in [0, 1): got warmup={self.warmup!r}. Use 0.05.")
        check_device(self.device)
        object.__setattr__(self, "stages", checked_stages(self.stages))
        object.__setattr__(self, "progressive_bits", checked_widths(self.progressive_bits))

    @property
    def needs_text(self) -> bool:
        """Whether the model has to be run: always."""
        return True


@dataclass(frozen=True)
class GptqOptions(ClipOptions):
    """Options of GPTQ; those of the clip search, which chooses the ranges of groups, included.

    Args:
        damping: added to the diagonal of the Gram matrix, relative to its mean. More of it trusts the text less.
        block_size: inputs whose errors are passed on together; changes speed, and results by rounding alone.
        act_order: round inputs in the order of falling activations, instead of that in which they stand. All ranges
            are then chosen at the start, on the original weights, so that groups stay what they are.
        clip_search: choose ranges by the clip search on the inputs of the group; else by min-max.

    Raises:
        ConfigError: a value outside its rule.
    """

    damping: float = 0.01
    block_size: int = 128
    act_order: bool = False
    clip_search: bool = True

    def __post_init__(self) -> None:
        """Check every value."""
        super().__post_init__()
        if self.objective != "output":
            raise ConfigError(
                f"`objective` must be 'output' for method='gptq': got objective={self.objective!r}. Without inputs "
                "there is nothing that errors could make up for; use method='clip'."
            )
        if self.inputs == "clipped":
            raise ConfigError("`inputs` must be 'quantized' or 'full' for method='gptq': got inputs='clipped'.")
        if not isinstance(self.damping, (int, float)) or not 0 < self.damping <= 1:
            raise ConfigError(f"`damping` must lie in (0, 1]: got damping={self.damping!r}. Use 0.01.")
        if not isinstance(self.block_size, int) or isinstance(self.block_size, bool) or self.block_size < 1:
            raise ConfigError(f"`block_size` must be a positive integer: got block_size={self.block_size!r}. Use 128.")
        check_flags(self, ("act_order", "clip_search"))


@dataclass(frozen=True)
class AwqOptions(ClipOptions):
    """Options of activation-aware scaling; those of the clip search, which comes after it, included.

    Args:
        alphas: exponents to try: an input with mean magnitude ``m`` is scaled by ``m ** alpha``. All in [0, 1], with 0,
            which is no scaling, among them.
        clip_search: search the ranges of the scaled weights; else they are min-max.
        scales: what the magnitudes are: `"activations"`, those of the inputs; or `"sinkhorn"`, the inverse spread of
            the weights' columns, once rows and columns are balanced in turn.
        rotate_heads: first rotate the values of attention, head by head, between the value and the output projection.

    Raises:
        ConfigError: a value outside its rule.
    """

    alphas: Sequence[float] = tuple(i / 20 for i in range(20))
    clip_search: bool = True
    scales: Literal["activations", "sinkhorn"] = "activations"
    rotate_heads: bool = False

    def __post_init__(self) -> None:
        """Check every value and bring `alphas` into one form."""
        super().__post_init__()
        if self.objective != "output":
            raise ConfigError(
                f"`objective` must be 'output' for method='awq': got objective={self.objective!r}. Scales are made "
                "from activations; use method='clip'."
            )
        check_flags(self, ("clip_search", "rotate_heads"))
        if self.scales not in ("activations", "sinkhorn"):
            raise UnknownNameError("scales", self.scales, ("activations", "sinkhorn"))
        try:
            alphas = tuple(sorted({float(value) for value in self.alphas}))
        except (TypeError, ValueError):
            raise ConfigError(f"`alphas` must be numbers: got alphas={self.alphas!r}. Use e.g. (0.0, 0.5).") from None
        if not alphas or alphas[0] != 0 or not alphas[-1] <= 1:
            raise ConfigError(f"`alphas` must lie in [0, 1], with 0 among them: got alphas={list(alphas)}.")
        object.__setattr__(self, "alphas", alphas)

    @property
    def passes(self) -> int:
        """How often each parameter is looked at."""
        return 2 if self.clip_search else 1


def make_options(method: str, values: dict[str, Any]) -> ClipOptions:
    """Build the options of a method.

    Args:
        method: `"clip"`, `"gptq"`, `"awq"` or `"blockwise"`.
        values: options by name.

    Raises:
        UnknownNameError: no such method or option.
        ConfigError: a value outside its rule.
    """
    match method:
        case "clip":
            kind: type[ClipOptions] = ClipOptions
        case "blockwise":
            kind = BlockwiseOptions
        case "gptq":
            kind = GptqOptions
        case "awq":
            kind = AwqOptions
        case _:
            raise UnknownNameError("method", method, METHODS)
    known = [field.name for field in fields(kind)]
    for name in values:
        if name not in known:
            raise add_location(UnknownNameError("option", name, known), f"method={method!r}")
    return kind(**values)


def names_match(patterns: Iterable[str], layer_name: str) -> bool:
    """Whether one of some patterns fits the end of a layer's name."""
    return any(_matches(pattern, layer_name) for pattern in patterns)


def _matches(pattern: str, name: str) -> bool:
    return re.search(rf"(^|\.)(?:{pattern})$", name) is not None
