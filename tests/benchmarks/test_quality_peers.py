"""Models of other packages are counted as ours are."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from benchmarks import _arms
from benchmarks._quality_peers import bits_of
from bitdistiller_peft import BitDistillerConfig, get_bitdistiller_model
from tests.standin import save_standin


@pytest.mark.parametrize(("bits", "group_size"), [(2, 64), (3, 32)])
def test_bits_per_weight_are_those_of_a_packed_model_of_the_same_widths(
    tmp_path: Path, bits: int, group_size: int
) -> None:
    save_standin(tmp_path)
    expected = bits_of(AutoModelForCausalLM.from_pretrained(tmp_path), bits=bits, group_size=group_size)
    config = BitDistillerConfig(bits=bits, group_size=group_size)
    student = get_bitdistiller_model(AutoModelForCausalLM.from_pretrained(tmp_path), config)
    padded = _arms.stored_bits(student.pack_and_unload())  # zero points fill whole words, which small rows do not need
    assert expected <= padded == pytest.approx(expected, rel=0.05)
