"""``python tests/trust/floors.py``: the lowest versions that pyproject.toml claims, as pip constraints.

Each dependency's ``>=`` becomes ``==``, so a floor that was never published, or one below what another dependency asks
for, makes the installation fail instead of being raised in silence. Needs no package.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
# torch: the caller's, since which builds exist differs; compressed-tensors: each release is for some versions of torch
NOT_LOWERED = ("torch", "compressed-tensors")
EXTRAS = ("gguf",)


def floors() -> dict[str, str]:
    """Name of each dependency to its lowest version, the extras of exports included."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    requirements = [*project["dependencies"], *(r for extra in EXTRAS for r in project["optional-dependencies"][extra])]
    found = (re.match(r"([\w.-]+)>=([\d.]+)", requirement) for requirement in requirements)
    return {match[1]: match[2] for match in found if match is not None and match[1] not in NOT_LOWERED}


if __name__ == "__main__":
    print("\n".join(f"{name}=={version}" for name, version in floors().items()))
