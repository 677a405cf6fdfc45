"""The public names are one list: what type checkers see, what loads, and what `dir()` shows."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import bitdistiller_peft

SOURCE = Path(bitdistiller_peft.__file__).read_text(encoding="utf-8")


def names_for_type_checkers() -> dict[str, str]:
    """What stands under ``if TYPE_CHECKING``, by name: the module that it comes from."""
    blocks = [node for node in ast.parse(SOURCE).body if isinstance(node, ast.If)]
    assert [ast.unparse(block.test) for block in blocks] == ["TYPE_CHECKING"]
    found = {}
    for statement in blocks[0].body:
        assert isinstance(statement, ast.ImportFrom)
        for alias in statement.names:
            assert alias.asname == alias.name, f"{alias.name}: `import X as X` is what makes a re-export public"
            found[alias.name] = str(statement.module)
    return found


def test_the_list_is_sorted_and_has_no_name_twice() -> None:
    assert bitdistiller_peft.__all__ == sorted(set(bitdistiller_peft.__all__))


def test_type_checkers_see_exactly_the_public_names() -> None:
    assert sorted([*names_for_type_checkers(), "__version__"]) == bitdistiller_peft.__all__


@pytest.mark.parametrize("name", bitdistiller_peft.__all__)
def test_a_public_name_loads_from_where_type_checkers_expect_it(name: str) -> None:
    value = getattr(bitdistiller_peft, name)
    assert name in dir(bitdistiller_peft)
    if name == "__version__":
        assert isinstance(value, str)
        return
    home = importlib.import_module(names_for_type_checkers()[name])
    assert value is getattr(home, name)
    assert name in home.__all__, "public above, so public at home"


def test_a_star_import_brings_them_all() -> None:
    found: dict[str, object] = {}
    exec("from bitdistiller_peft import *", found)
    assert set(bitdistiller_peft.__all__) <= set(found)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'bitdistiller_peft' has no attribute 'nope'"):
        bitdistiller_peft.nope  # noqa: B018
