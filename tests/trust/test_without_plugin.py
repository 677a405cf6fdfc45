"""Without the library, no packed checkpoint loads: every grid and width, dense, tied, fused experts, in shards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.hub.models import run_python
from tests.hub.test_load import WITHOUT
from tests.trust.test_properties import KINDS

ARCHS = ("llama", "llama-tied", "gpt2", "mixtral", "qwen3-moe")
BITS = (2, 3, 4, 8)


def test_no_layout_loads_without_the_library(packed_folder: Callable[..., Path]) -> None:
    """One fresh process for all; at 8 bits too, where an int8 file of the same shape could pass for the weight."""
    folders = {f"{grid}-{bits}": packed_folder("llama", grid=grid, bits=bits) for grid, bits in KINDS}
    folders |= {f"{arch}-{bits}": packed_folder(arch, bits=bits, group_size=-1) for arch in ARCHS for bits in BITS}
    folders |= {f"{arch}-ternary": packed_folder(arch, grid="ternary", bits=2, group_size=-1) for arch in ARCHS}
    folders |= {
        f"shards-ternary-{arch}": packed_folder(arch, grid="ternary", shards="20KB") for arch in ("llama", "mixtral")
    }
    folders |= {f"shards-{bits}": packed_folder("llama", bits=bits, shards="20KB") for bits in BITS}
    child = run_python(WITHOUT, stdin=json.dumps([str(folder) for folder in folders.values()]))
    assert child.returncode == 0, child.stderr[-2000:]
    outcome = json.loads(child.stdout.splitlines()[-1])
    assert len(outcome) == 2 * len(folders)
    assert {name for name, result in outcome.items() if result == "loaded"} == set()
