"""Models that are trained, packed and saved once for all tests of the socket."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.hub.models import Saved, logits, make_packed


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the full-precision models."""
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(scope="session")
def saved(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Saved]:
    """`saved("llama", bits=3)`: a packed model, its folder and its logits; to be looked at, never changed."""
    known: dict[str, Saved] = {}

    def get(arch: str, **settings: Any) -> Saved:
        key = f"{arch} {settings}"
        if key not in known:
            model = make_packed(arch, bases, **settings)
            folder = tmp_path_factory.mktemp("packed") / arch
            model.save_pretrained(folder)
            known[key] = Saved(folder, model, logits(model))
        return known[key]

    return get
