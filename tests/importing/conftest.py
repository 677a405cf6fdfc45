"""Base models, and what our own exporter makes of packed ones, made once for all tests of importing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bitdistiller_peft import export_model
from tests.hub.models import make_packed
from tests.tiny import save_base


class Exported(NamedTuple):
    """A packed model, the same in a foreign format, and the full-precision model under both."""

    packed: Path
    source: Path
    base: Path


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(scope="session")
def base(bases: Path) -> Path:
    """A random tiny Llama; to be read, never changed."""
    return save_base("llama", bases)


@pytest.fixture(scope="session")
def exported(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """`exported("gptq", "llama", bits=3)`; options of the format go in `options`."""
    known: dict[str, Exported] = {}

    def get(format: str, arch: str, *, options: dict[str, Any] | None = None, **settings: Any) -> Exported:
        key = f"{format} {arch} {options} {settings}"
        if key not in known:
            folder = tmp_path_factory.mktemp("exported")
            make_packed(arch, bases, **{"steps": 1, **settings}).save_pretrained(folder / "packed")
            export_model(folder / "packed", format, folder / "out", **(options or {}))
            source = folder / "out" / "model.gguf" if format == "gguf" else folder / "out"
            known[key] = Exported(folder / "packed", source, save_base(arch, bases))
        return known[key]

    return get
