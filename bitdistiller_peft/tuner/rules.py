"""What values of a `BitDistillerConfig` go together, apart from what grids, activations and norms check themselves."""

from __future__ import annotations

import math
import re
from typing import Any

from bitdistiller_peft.errors import ConfigError, UnknownNameError
from bitdistiller_peft.grids import get_grid

MASTER_DTYPES = ("float32", "base")
TRAINABLE = ("all", "quantization", "lora")
TRAIN_OTHER = ("none", "norms", "all")


def check_choices(config: Any) -> None:
    """Refuse values outside their rules, and those that do not go together.

    Args:
        config: a `BitDistillerConfig` whose fields are set.

    Raises:
        ConfigError: the message says what would work.
        UnknownNameError: a name that none of the choices has.
    """
    if config.target_parameters:
        raise ConfigError(
            f"`target_parameters` must be None: got target_parameters={config.target_parameters!r}. "
            "Name the experts module in `target_modules` instead."
        )
    if config.train_other not in TRAIN_OTHER:
        raise UnknownNameError("train_other", config.train_other, TRAIN_OTHER)
    if config.master_dtype not in MASTER_DTYPES:
        raise UnknownNameError("master_dtype", config.master_dtype, MASTER_DTYPES)
    _check_trainable(config)
    for name in ("learn_scale", "learn_zero_point"):
        if type(getattr(config, name)) is not bool:
            raise ConfigError(f"`{name}` must be True or False: got {name}={getattr(config, name)!r}.")
    if config.layers_pattern and config.layers_to_transform is None:
        raise ConfigError(
            f"`layers_to_transform` must be set when `layers_pattern` is: got layers_pattern="
            f"{config.layers_pattern!r}. Pass the layer indices."
        )
    if not isinstance(config.overrides, dict) or not all(isinstance(v, dict) for v in config.overrides.values()):
        raise ConfigError(f"`overrides` must map a name to a dict: got overrides={config.overrides!r}.")
    if config.learn_zero_point and not config.learn_scale:
        raise ConfigError(
            "`learn_zero_point` must come with `learn_scale`: got learn_zero_point=True, learn_scale=False. "
            "Set learn_scale=True."
        )
    if config.arithmetic == "released" and config.learn_scale:
        raise ConfigError(
            "`learn_scale` must be False with arithmetic='released', which recomputes scales on every forward: got "
            "learn_scale=True. Set learn_scale=False."
        )
    if config.learn_zero_point and not config.spec().grid.has_zero_point:
        raise ConfigError(
            f"`learn_zero_point` must be False for a grid without zero points: got grid={config.grid!r}. "
            "Use grid='int' or 'int_fine', or learn_zero_point=False."
        )


def _check_trainable(config: Any) -> None:
    if config.trainable not in TRAINABLE:
        raise UnknownNameError("trainable", config.trainable, TRAINABLE)
    if type(config.lora_rank) is not int or config.lora_rank < 1:
        raise ConfigError(f"`lora_rank` must be a positive integer: got lora_rank={config.lora_rank!r}. Use 16.")
    if not 0 < config.lora_alpha < math.inf:
        raise ConfigError(f"`lora_alpha` must be positive: got lora_alpha={config.lora_alpha!r}. Use 16.")
    if config.trainable == "quantization" and not config.learn_scale:
        raise ConfigError(
            "`trainable` must not be 'quantization' with learn_scale=False: nothing would be trained. Set "
            "learn_scale=True, or trainable='all'."
        )


def check_pattern(pattern: object) -> None:
    """Refuse a key of `overrides` that is no regular expression."""
    if not isinstance(pattern, str):
        raise ConfigError(f"`overrides` must have text keys: got {pattern!r}. Use the end of a module name.")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"`overrides` must have regular expressions as keys: got {pattern!r} ({error}). Use e.g. 'down_proj'."
        ) from None


def table_settings(grid: str, bits: int) -> dict[str, Any]:
    """The settings of an embedding or a head in place of those of the layers.

    Args:
        grid: the grid of the layers; a table has an integer one, which alone has 8 bits.
        bits: code width of the table.
    """
    own = grid if grid == "int_sym" else "int"
    return {"grid": own, "bits": bits, "zero_point_range": None, "refine": None, "tied": False}


def check_table_bits(config: Any) -> None:
    """Refuse widths of embeddings and heads that integer grids have not, and what heads have no place for.

    Args:
        config: a `BitDistillerConfig` whose fields are set.

    Raises:
        ConfigError: the message says what would work.
    """
    for name in ("embedding_bits", "head_bits"):
        bits = getattr(config, name)
        if bits is not None:
            try:
                get_grid(table_settings(config.grid, bits)["grid"], bits)
            except ConfigError:
                raise ConfigError(f"`{name}` must be 2, 3, 4, 8 or None: got {name}={bits!r}. Use 8.") from None
    if config.head_bits is not None and (config.activation_bits is not None or config.subln == "all"):
        raise ConfigError(
            "`head_bits` must be None with activation_bits or subln='all', which heads are left out of: got "
            f"head_bits={config.head_bits!r}, activation_bits={config.activation_bits!r}, subln={config.subln!r}. Use "
            "head_bits=None."
        )
