"""The config's settings that depend on one another."""

from __future__ import annotations

import pytest

from bitdistiller_peft import BitDistillerConfig
from bitdistiller_peft.errors import ConfigError, UnknownNameError


def test_a_target_refuses_what_its_engine_cannot_run_and_sets_what_it_needs() -> None:
    assert BitDistillerConfig(bits=2, group_size=64, target="llama.cpp").zero_point_range == [1, 2]
    assert BitDistillerConfig(bits=2, group_size=64, target="llama.cpp", zero_point_range=[2, 2]).zero_point_range == [
        2,
        2,
    ]
    assert BitDistillerConfig(bits=3, group_size=64, target="llama.cpp").zero_point_range is None
    with pytest.raises(ConfigError, match=r"target='onnx'.*bits=3"):
        BitDistillerConfig(bits=3, group_size=64, target="onnx")
    with pytest.raises(ConfigError, match=r"target='llama\.cpp'.*zero_point_range"):
        BitDistillerConfig(bits=2, group_size=64, target="llama.cpp", zero_point_range=[0, 3])
    with pytest.raises(UnknownNameError, match=r"llama\.cpp"):
        BitDistillerConfig(target="llama-cpp")
