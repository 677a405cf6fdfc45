"""A recipe holds a whole system as plain data; `get_recipe` fetches one, `register_recipe` adds one.

Recipes know names and numbers, nothing else: the classes that give them a meaning live on higher floors. Those classes
say once, with `declare_fields`, which names they understand, so that a misspelt override is refused here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from bitdistiller_peft.errors import ConfigError, UnknownNameError
from bitdistiller_peft.registry import add_new, look_up

PRESETS = ("fast", "balanced", "max")
MODEL, TRAINING = "model", "training"
_HOMES = {MODEL: "bitdistiller_peft.tuner", TRAINING: "bitdistiller_peft.training"}  # which declare their fields
_FIELDS: dict[str, frozenset[str]] = {}


@dataclass(frozen=True)
class Recipe:
    """One system, from the full-precision model to the packed one.

    Attributes:
        name: the name it is registered under.
        preset: ``"fast"``, ``"balanced"`` or ``"max"``.
        stages: what is to be done, in order: ``"calibrate"``, ``"generate"``, ``"pretrain"``, ``"distill"``.
        model: fields of `BitDistillerConfig`.
        calibration: arguments of `calibrate`, one dictionary for each call.
        data: arguments of `generate_teacher_data`.
        training: fields of `DistillConfig` for the stage ``"distill"``.
        stage_training: what differs from `training` in other training stages, by stage.
    """

    name: str
    preset: str = "balanced"
    stages: tuple[str, ...] = ()
    model: Mapping[str, Any] = field(default_factory=dict)
    calibration: tuple[Mapping[str, Any], ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    stage_training: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def training_for(self, stage: str = "distill") -> dict[str, Any]:
        """Fields of `DistillConfig` for a training stage.

        Raises:
            ConfigError: the recipe has no such stage.
        """
        trained = [known for known in self.stages if known in ("pretrain", "distill")]
        if stage not in trained:
            raise ConfigError(
                f"`stage` must be a training stage of recipe {self.name!r}: got stage={stage!r}. "
                + (f"It has {trained}." if trained else "It has none: calibrate and pack.")
            )
        return {**self.training, **self.stage_training.get(stage, {})}


RecipeFactory = Callable[[str, Mapping[str, Any]], Recipe]

_FACTORIES: dict[str, RecipeFactory] = {}


def register_recipe(name: str, factory: RecipeFactory) -> None:
    """Add a recipe under a new name.

    Args:
        name: the name for `get_recipe`.
        factory: takes the preset and the overrides that were given (to choose by, e.g. by ``bits``) and returns the
            recipe; the overrides themselves are applied afterwards.

    Raises:
        ConfigError: the name is taken.
    """
    add_new(_FACTORIES, "recipe", name, factory)


def recipe_names() -> list[str]:
    """List the registered names, sorted."""
    return sorted(_FACTORIES)


def get_recipe(name: str, preset: str = "balanced", **overrides: Any) -> Recipe:
    """Fetch a recipe.

    Args:
        name: a registered name, e.g. ``"bitdistiller"``.
        preset: ``"fast"``, ``"balanced"`` or ``"max"``: how much calibration and training.
        overrides: other values for fields of `BitDistillerConfig` and `DistillConfig`; each goes where its name
            belongs.

    Raises:
        UnknownNameError: no such recipe or preset.
        ConfigError: an override that neither class knows.

    Example:
        >>> get_recipe("bitdistiller", bits=3).model["grid"]
        'nf'
    """
    factory = look_up(_FACTORIES, "recipe", name)
    if preset not in PRESETS:
        raise UnknownNameError("preset", preset, PRESETS)
    recipe = replace(factory(preset, dict(overrides)), name=name, preset=preset)
    for key, value in overrides.items():
        recipe = _overridden(recipe, key, value)
    return recipe


def declare_fields(part: str, names: Collection[str]) -> None:
    """Say which names a class understands; called by the class's own module.

    Args:
        part: ``"model"`` or ``"training"``.
        names: names of its fields.
    """
    _FIELDS[part] = frozenset(names)


def _overridden(recipe: Recipe, key: str, value: Any) -> Recipe:
    """The recipe with one field changed, in every part that knows it."""
    parts = [part for part in _HOMES if key in _fields(part, needed=False)]
    parts = parts or [part for part in _HOMES if key in _fields(part, needed=True)]
    if not parts:
        known = sorted(_fields(MODEL, needed=True) | _fields(TRAINING, needed=True))
        near = get_close_matches(key, known, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else "Calibration has its own arguments, see `calibrate`."
        raise ConfigError(
            f"`{key}` must be a field of BitDistillerConfig or DistillConfig: got {key}={value!r}. {hint}"
        )
    if MODEL in parts:
        recipe = replace(recipe, model={**recipe.model, key: value})
    if TRAINING in parts:
        recipe = replace(recipe, training={**recipe.training, key: value})
    return recipe


def _fields(part: str, *, needed: bool) -> frozenset[str]:
    """The declared names; the class's module, which may be slow to import, is only imported if needed."""
    if part not in _FIELDS and needed:
        import_module(_HOMES[part])
    return _FIELDS.get(part, frozenset())
