"""A processor that cannot multiply bf16 is known as such, and its user is told, once."""

from __future__ import annotations

import logging

import pytest
import torch

from bitdistiller_peft.kernels import multiplies_bf16, precision, warn_of_slow_bf16


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_SAID", set())


@pytest.fixture(params=[True, False], ids=["with", "without"])
def has_bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: request.param)
    return request.param


def test_a_processor_is_asked(has_bf16: bool) -> None:
    assert multiplies_bf16("cpu") is has_bf16
    assert multiplies_bf16(torch.device("cpu")) is has_bf16


def test_an_unknown_device_has_none() -> None:
    assert not multiplies_bf16("meta")


def test_slow_bf16_is_told_once_for_each_remedy(has_bf16: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for remedy in ("this.", "this.", "that."):
            warn_of_slow_bf16("cpu", torch.bfloat16, remedy)
    told = [record.getMessage().rpartition(": ")[2] for record in caplog.records]
    assert told == ([] if has_bf16 else ["this.", "that."])


@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", torch.float32), ("cpu", torch.float16), ("meta", torch.bfloat16)]
)
def test_other_work_is_not_spoken_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, device: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    with caplog.at_level(logging.WARNING):
        warn_of_slow_bf16(device, dtype, "this.")
    assert not caplog.records


def test_the_processor_of_this_machine_is_judged_as_linux_lists_it() -> None:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123  # a device, not a file of ours
            flags = next((line.split() for line in file if line.startswith("flags")), None)
    except OSError:
        flags = None
    if flags is None:
        pytest.skip("no x86 Linux")
    assert multiplies_bf16("cpu") is ("avx512_bf16" in flags)
