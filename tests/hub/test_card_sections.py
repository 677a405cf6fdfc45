"""A card's own parts are found, renewed and left alone; what somebody else wrote stays, byte for byte."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard

from bitdistiller_peft.hub.card_sections import PARTS, find_part, mark, put_part, renew_card

HEAD = "---\nlibrary_name: transformers\ntags:\n- bitdistiller\n- {bits}-bit\n{more}---\n# Title\n"
RESULTS = """model-index:
- name: Title
  results:
  - task: {{type: text-generation}}
    dataset: {{name: {data}, type: {data}{args}}}
    metrics:
    - {{type: perplexity, value: {value}}}
"""


def card(bits: int = 2, more: str = "", parts: tuple[str, ...] = ("about", "size")) -> str:
    blocks = "\n\n".join(mark(part, f"{part} of {bits} bits") for part in parts)
    return f"{HEAD.format(bits=bits, more=more)}\n{blocks}\n\n## Mine\n\ntext\n"


@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_put_found_replaced_and_taken_out(part: str) -> None:
    text = put_part("# Title\n", part, mark(part, "one"))
    assert find_part(text, part) == mark(part, "one")
    assert text == f"# Title\n\n{mark(part, 'one')}\n"
    assert put_part(f"{text}\nend\n", part, mark(part, "two")) == f"# Title\n\n{mark(part, 'two')}\n\nend\n"
    assert put_part(f"{text}\nend\n", part, None) == "# Title\n\nend\n"
    assert put_part("# Title\n", part, None) == "# Title\n"


def test_a_comment_without_its_other_half_is_no_part() -> None:
    whole = mark("size", "text")
    for broken in (whole.replace("<!-- bit", "<!-- wit"), whole.replace("<!-- /", "<!-- "), whole[::-1]):
        assert find_part(broken, "size") is None


def test_a_card_without_our_parts_stays_as_it_is() -> None:
    own = "---\ntags: [mine]   # a comment\n---\n## Size\n\nlarge\n"
    assert renew_card(own, card(3), is_same_model=False) == own


def test_nothing_new_is_no_change_even_to_the_form_of_the_metadata() -> None:
    there = card().replace("tags:\n- bitdistiller\n- 2-bit", "tags: [2-bit, bitdistiller]  # by hand")
    assert renew_card(there, card(), is_same_model=True) == there


def test_parts_and_bits_are_renewed_and_a_part_that_was_taken_away_stays_away() -> None:
    there = card(2, "license: mit\n").replace(mark("size", "size of 2 bits"), "size, as I see it")
    renewed = renew_card(there, card(3), is_same_model=False)
    assert "about of 3 bits" in renewed
    assert "size, as I see it" in renewed
    assert "size of" not in renewed
    assert renewed.endswith("## Mine\n\ntext\n")
    assert (ModelCard(renewed).data.tags, ModelCard(renewed).data.license) == (["bitdistiller", "3-bit"], "mit")


def test_a_base_model_by_hand_stays_where_the_files_know_none() -> None:
    there = card(2, "base_model: team/base\nbase_model_relation: quantized\n")
    assert ModelCard(renew_card(there, card(3), is_same_model=False)).data.base_model == "team/base"
    ours = card(3, "base_model: team/other\nbase_model_relation: quantized\n")
    assert ModelCard(renew_card(there, ours, is_same_model=False)).data.base_model == "team/other"


@pytest.mark.parametrize("is_same_model", [True, False])
def test_what_was_measured_goes_with_the_weights(*, is_same_model: bool) -> None:
    ours = RESULTS.format(data="wiki", args=", args: {protocol: v1}", value=12.5)
    by_hand = "\n".join(RESULTS.format(data="mine", args="", value=3).splitlines()[3:]) + "\n"
    there = card(2, ours + by_hand, ("about", "measured"))
    renewed = renew_card(there, card(2), is_same_model=is_same_model)
    assert (find_part(renewed, "measured") is not None) is is_same_model
    found = [result.dataset_name for result in ModelCard(renewed).data.eval_results]
    assert found == (["wiki", "mine"] if is_same_model else ["mine"])


def test_a_new_measurement_takes_the_place_of_the_old_one() -> None:
    old, new = (RESULTS.format(data="wiki", args=", args: {protocol: v1}", value=value) for value in (12.5, 11.0))
    there = card(2, old, ("about", "measured"))
    ours = card(2, new, ("about", "measured")).replace("measured of 2 bits", "measured again")
    renewed = renew_card(there, ours, is_same_model=True)
    assert find_part(renewed, "measured") == mark("measured", "measured again")
    assert [result.metric_value for result in ModelCard(renewed).data.eval_results] == [11.0]
    unmeasured = renew_card(card(2), ours, is_same_model=True)
    assert find_part(unmeasured, "measured") == mark("measured", "measured again")
