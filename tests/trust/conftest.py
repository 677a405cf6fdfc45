"""Checkpoints that the tests of trust copy and damage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.hub.models import make_packed


@pytest.fixture(scope="session")
def packed_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`packed_folder("llama", bits=3)`: a saved packed model; `shards="20KB"` splits it. To be copied, not changed."""
    bases, known = tmp_path_factory.mktemp("bases"), {}

    def get(arch: str, *, shards: str = "", **settings: Any) -> Path:
        key = f"{arch} {shards} {settings}"
        if key not in known:
            known[key] = tmp_path_factory.mktemp("packed") / arch
            sharding = {"max_shard_size": shards} if shards else {}
            make_packed(arch, bases, **settings).save_pretrained(known[key], **sharding)
        return known[key]

    return get
