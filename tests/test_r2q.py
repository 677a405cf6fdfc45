"""R2Q from end to end on OPT, Llama, Qwen2 and Qwen3: trained, scales learned or not, packed, saved and loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bitdistiller_peft.layers import PackedLinear
from bitdistiller_peft.tuner import BitDistillerLayer
from tests.hub.models import assert_same_state, logits, make_student
from tests.quantizers.samples import RESIDUAL_OPTIONS
from tests.tiny import load

ARCHITECTURES = ("opt", "llama", "qwen2", "qwen3")
OPTIONS: list[dict[str, Any]] = [{}, *RESIDUAL_OPTIONS]
GROUP_SIZES = (64, 32, -1)
LEARN = (True, False)
ALL = [
    (arch, {**options, "group_size": size, "learn_scale": learn})
    for arch in ARCHITECTURES
    for learn in LEARN
    for options in OPTIONS
    for size in GROUP_SIZES
]
# each architecture with its own third of the options, with learned scales and without
SOME = [ALL[number] for number in range(0, len(ALL), 13)]


def check(arch: str, settings: dict[str, Any], bases: Path, folder: Path) -> None:
    fresh = make_student(arch, bases, steps=0, grid="r2q", **settings)
    student = make_student(arch, bases, steps=2, grid="r2q", **settings)
    layers = {n: m for n, m in student.named_modules() if isinstance(m, BitDistillerLayer)}
    for name, layer in layers.items():
        start, trained = (
            dict(m.student("weight", "default").named_parameters()) for m in (fresh.get_submodule(name), layer)
        )
        names = {"weight"} | ({"weight_scale"} if settings["learn_scale"] else set())
        names |= {"weight_scale_residual"} if settings["learn_scale"] and not settings.get("tied") else set()
        assert set(trained) == names
        assert all(bool((trained[key] != start[key]).any()) for key in names), f"{name} did not move"

    expected = logits(student)
    values = {name: layer.student("weight", "default")().detach() for name, layer in layers.items()}
    packed = student.pack_and_unload(progressbar=False)
    assert torch.equal(logits(packed), expected)
    for name, value in values.items():
        layer = packed.get_submodule(name.removeprefix("base_model.model."))
        assert isinstance(layer, PackedLinear)
        assert torch.equal(layer.dequantize(), value)
        assert len(value[0].abs().unique()) <= 2 * layer.weight_scale.shape[1], "more levels than two signs have"
        assert (getattr(layer, "weight_scale_residual", None) is None) == settings.get("tied", False)
    packed.save_pretrained(folder)
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (stored["refine"], stored["tied"]) == (settings.get("refine"), settings.get("tied", False))
    loaded = load(folder)
    assert_same_state(loaded, packed)
    assert torch.equal(logits(loaded), expected)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


@pytest.mark.parametrize(("arch", "settings"), SOME, ids=str)
def test_what_was_trained_is_packed_saved_and_loaded(
    arch: str, settings: dict[str, Any], bases: Path, tmp_path: Path
) -> None:
    check(arch, settings, bases, tmp_path)


def test_every_architecture_and_every_option_is_among_the_cases() -> None:
    assert {arch for arch, _ in SOME} == set(ARCHITECTURES)
    for key in ("refine", "tied", "learn_scale", "group_size"):
        assert {settings.get(key) for _, settings in SOME} == {settings.get(key) for _, settings in ALL}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_option_is_trained_packed_saved_and_loaded(arch: str, bases: Path, tmp_path: Path) -> None:
    for number, (name, settings) in enumerate(ALL):
        if name == arch:
            check(arch, settings, bases, tmp_path / str(number))
