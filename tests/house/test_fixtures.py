"""The fixtures of `tests/conftest.py` keep their word: no network, and seeds that disturb nobody."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("2001:db8::1", 80, 0, 0), ("example.com", 80)])
def test_no_socket_leaves_the_machine(address: tuple[str, int]) -> None:
    family = socket.AF_INET6 if len(address) == 4 else socket.AF_INET
    with socket.socket(family) as closed, pytest.raises(RuntimeError, match="loopback only"):
        closed.connect(address)
    with socket.socket(family, socket.SOCK_DGRAM) as closed, pytest.raises(RuntimeError, match="loopback only"):
        closed.sendto(b"hello", address)
    with pytest.raises(RuntimeError, match="loopback only"):
        socket.create_connection(address[:2])


def test_no_python_that_a_test_starts_leaves_the_machine_either() -> None:
    code = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=5)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert child.returncode == 1
    assert "NetworkBlockedError: tests may talk to loopback only" in child.stderr


def test_every_import_is_made_with_the_network_closed() -> None:
    """In a fresh Python, without the settings that keep the libraries of Hugging Face offline."""
    code = "import bitdistiller_peft.training, bitdistiller_peft.export, bitdistiller_peft.cli"
    online = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    child = subprocess.run([sys.executable, "-c", code], env=online, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr[-2000:]
    assert "NetworkBlocked" not in child.stderr


def test_loopback_stays_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        client.sendall(b"hello")
        accepted, _ = server.accept()
        with accepted:
            assert accepted.recv(5) == b"hello"


@given(st.integers(0, 3))
def test_a_property_runs_beside_the_fixtures_of_every_test(number: int) -> None:
    assert number in range(4)


def test_local_seed_repeats_and_gives_the_global_state_back(
    local_seed: Callable[[int], AbstractContextManager[None]],
) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), torch.rand(()).item()

    with local_seed(7):
        first = draw()
        with local_seed(8):
            undisturbed = draw()
            assert undisturbed != first
        after = draw()
    with local_seed(7):
        assert draw() == first
        assert draw() == after


def test_generator_is_seeded_alike_every_time(generator: torch.Generator) -> None:
    assert torch.equal(torch.rand(3, generator=generator), torch.rand(3, generator=torch.Generator().manual_seed(0)))
