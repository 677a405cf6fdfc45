"""What trainer tests share: one folder for the tiny base models, no progress bars, and a short memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny base models are saved once."""
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(scope="package", autouse=True)
def _fast_collection() -> Iterator[None]:
    # every train() collects garbage; with all imported modules among it, that took most of a test's time
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _quiet() -> None:
    datasets.disable_progress_bars()
