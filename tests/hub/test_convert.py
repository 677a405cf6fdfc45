"""Names of modules are matched against lists of names as the plain rule says, however long the lists are."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bitdistiller_peft.hub.convert import is_skipped, skipped_among

PART = st.sampled_from(["a", "b", "ab", "0", ""])
NAME = st.lists(PART, min_size=1, max_size=5).map(".".join).filter(bool)


def plain_rule(name: str, skip: str) -> bool:
    return name == skip or name.endswith(f".{skip}") or skip.endswith(f".{name}")


@given(st.lists(NAME, max_size=8), st.lists(NAME, max_size=8))
def test_names_are_matched_as_the_plain_rule_says(names: list[str], skips: list[str]) -> None:
    expected = {name for name in names if any(plain_rule(name, skip) for skip in skips)}
    assert skipped_among(names, skips) == expected
    for name in names:
        assert is_skipped(name, skips) is (name in expected)


def test_a_name_without_its_prefix_and_one_with_another_mean_the_module() -> None:
    names = ["model.layers.0.mlp.up_proj", "layers.1.mlp.up_proj", "lm_head"]
    assert skipped_among(names, ["layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]) == set(names[:2])
    assert not skipped_among(names, ["proj", "mlp", "head", "layers.0"])
