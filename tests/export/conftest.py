"""Packed models in folders, made once for all tests of the formats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.hub.models import make_packed
from tests.standin import save_standin


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`packed("llama", bits=3)`: the folder of a packed model; to be read, never changed."""
    known: dict[str, Path] = {}
    bases = tmp_path_factory.mktemp("bases")

    def get(arch: str, **settings: Any) -> Path:
        key = f"{arch} {settings}"
        if key not in known:
            known[key] = tmp_path_factory.mktemp("packed") / arch
            make_packed(arch, bases, **{"steps": 0, **settings}).save_pretrained(known[key])
        return known[key]

    return get


@pytest.fixture(scope="session")
def with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a packed stand-in with a byte-level tokenizer, whose zero points suit llama.cpp's 2-bit types."""
    from bitdistiller_peft import BitDistillerConfig, get_bitdistiller_model
    from tests.tiny import load

    folder = tmp_path_factory.mktemp("standin")
    model = load(save_standin(folder / "base"))
    config = BitDistillerConfig(bits=2, group_size=64, zero_point_range=(1, 2))
    get_bitdistiller_model(model, config).pack_and_unload(progressbar=False).save_pretrained(folder / "packed")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / "packed" / name).write_bytes((folder / "base" / name).read_bytes())
    return folder / "packed"
