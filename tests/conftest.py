"""What every test gets: no network, seeds of its own, and the two Hypothesis profiles."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

# Before anything of Hugging Face is imported: these are read once, at import.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Most tests are about equal bits, which is the reference's promise; tests/kernels forces the other backends by name.
os.environ.setdefault("BITDISTILLER_BACKEND", "reference")
# Triton decides at import whether its programs run in the interpreter, and other libraries import it as well.
if not any(Path(gpu).exists() for gpu in ("/dev/nvidia0", "/dev/kfd")):
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Every Python that a test starts then closes its connections too; in this one, the import below does.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(Path(__file__).parent / "blocked"), os.environ.get("PYTHONPATH")))
)

import numpy as np
import pytest
import torch
from hypothesis import settings

import bitdistiller_peft  # noqa: F401  plugs the method into PEFT and transformers
from tests.blocked import sitecustomize

settings.register_profile("default", derandomize=True, deadline=None, max_examples=50, print_blob=True)
settings.register_profile("nightly", derandomize=False, deadline=None, max_examples=2000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def _no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tests marked `network` may leave the machine; outside of tests, while modules are imported, nothing may."""
    if request.node.get_closest_marker("network") is not None:
        monkeypatch.setenv(sitecustomize.OPEN, "1")


@pytest.fixture
def generator() -> torch.Generator:
    """A generator of the test's own, always seeded the same, for `torch.randn(..., generator=generator)`."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def local_seed() -> Callable[[int], AbstractContextManager[None]]:
    """`with local_seed(0):` seeds Python, NumPy and torch for code that takes no generator, and gives them back."""

    @contextlib.contextmanager
    def seeded(seed: int) -> Iterator[None]:
        python_state, numpy_state = random.getstate(), np.random.get_state()
        with torch.random.fork_rng():
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            try:
                yield
            finally:
                random.setstate(python_state)
                np.random.set_state(numpy_state)

    return seeded
