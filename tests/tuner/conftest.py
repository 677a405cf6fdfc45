"""Base models of every architecture for the tests of the PEFT socket."""

from __future__ import annotations

import pytest

from tests.tuner.common import Bases


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """Tiny base models on disk, and students of them."""
    return Bases(tmp_path_factory.mktemp("bases"))
