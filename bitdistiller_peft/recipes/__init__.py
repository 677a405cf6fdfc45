"""The named systems and presets, as plain data."""

from bitdistiller_peft.recipes import best, published  # noqa: F401  they register themselves
from bitdistiller_peft.recipes.base import Recipe, declare_fields, get_recipe, recipe_names, register_recipe

__all__ = ["Recipe", "declare_fields", "get_recipe", "recipe_names", "register_recipe"]
