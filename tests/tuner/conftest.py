"""Base models of every architecture for the tests of the PEFT socket."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from tests.tuner.common import Bases


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """Tiny base models on disk, and students of them."""
    return Bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="session", autouse=True)
def _frozen_imports() -> Iterator[None]:
    """Spare the collections that every `Trainer` runs from walking over all imported modules."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
