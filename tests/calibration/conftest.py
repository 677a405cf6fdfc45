"""Fixtures of the calibration tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that tiny models are saved in, once."""
    return tmp_path_factory.mktemp("models")
