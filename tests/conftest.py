"""What every test gets: no network, seeds of its own, and the two Hypothesis profiles."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import random
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

# Before anything of Hugging Face is imported: these are read once, at import.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Most tests are about equal bits, which is the reference's promise; tests/kernels forces the other backends by name.
os.environ.setdefault("BITDISTILLER_BACKEND", "reference")

import numpy as np
import pytest
import torch
from hypothesis import settings

import bitdistiller_peft  # noqa: F401  plugs the method into PEFT and transformers

settings.register_profile("default", derandomize=True, deadline=None, max_examples=50, print_blob=True)
settings.register_profile("nightly", derandomize=False, deadline=None, max_examples=2000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


class NetworkBlockedError(RuntimeError):
    """A test tried to leave the machine; mark it `network` if it must."""


def _is_local(host: object) -> bool:
    if isinstance(host, bytes):
        host = host.decode()
    if host in {None, "", "localhost", socket.gethostname()}:
        return True
    try:
        address = ipaddress.ip_address(str(host).partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _refuse_unless_local(address: object) -> None:
    # A Unix socket's address is a path; an Internet one is a tuple that begins with the host.
    if isinstance(address, tuple) and not _is_local(address[0]):
        raise NetworkBlockedError(f"tests may talk to loopback only: got {address!r}. Mark the test `network`.")


@pytest.fixture(autouse=True)
def _no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Close every socket but loopback ones, in this process; tests marked `network` keep theirs."""
    if request.node.get_closest_marker("network") is not None:
        return

    def guarded(name: str, position: int) -> None:
        real = getattr(socket.socket, name)

        def call(self: socket.socket, *args: object) -> object:
            _refuse_unless_local(args[position] if args else None)
            return real(self, *args)

        monkeypatch.setattr(socket.socket, name, call)

    guarded("connect", 0)
    guarded("connect_ex", 0)
    guarded("sendto", -1)
    resolve = socket.getaddrinfo

    def getaddrinfo(host: object, *args: object, **kwargs: object) -> object:
        _refuse_unless_local((host,))
        return resolve(host, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


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
