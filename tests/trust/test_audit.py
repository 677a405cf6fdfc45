"""`make audit` finds what is known, and never takes silence for health; the lowest versions are read as written."""

from __future__ import annotations

import json
from importlib.metadata import version

from tests.trust.audit import verdict
from tests.trust.floors import floors

GOOD = {"name": "numpy", "version": "2.0.0", "vulns": []}
BAD = {"name": "torch", "version": "2.5", "vulns": [{"id": "CVE-2025-32434", "fix_versions": ["2.6.0"]}]}
UNKNOWN = {"name": "torch", "skip_reason": "Dependency not found on PyPI"}


def answer(*packages: dict[str, object]) -> str:
    return json.dumps({"dependencies": packages, "fixes": []})


def test_what_is_known_fails_by_name_and_repair() -> None:
    text, status = verdict(answer(GOOD, BAD), "Found 1 known vulnerability", 1)
    assert status == 1
    assert "torch 2.5: CVE-2025-32434, repaired in 2.6.0" in text
    assert "1 known vulnerabilities in 2 packages" in text


def test_nothing_found_passes_and_says_what_was_left_out() -> None:
    text, status = verdict(answer(GOOD, UNKNOWN), "", 0)
    assert (text, status) == ("audit: 0 known vulnerabilities in 1 packages; not looked up: torch", 0)


def test_without_a_database_nothing_is_called_healthy() -> None:
    for text, status in (
        verdict(answer(UNKNOWN, UNKNOWN), "", 0),
        verdict("", "pip_audit._service.interface.ConnectionError: cannot connect", 1),
    ):
        assert status == 0
        assert text.endswith("nothing was looked up")
    assert verdict("", "Traceback: KeyError", 1).status == 1


def test_the_floors_are_exact_versions_and_what_is_installed_is_not_below_them() -> None:
    found = floors()
    assert {"transformers", "peft", "trl", "accelerate", "safetensors"} <= found.keys()
    for name in ("transformers", "peft", "trl", "accelerate", "safetensors", "datasets", "numpy"):
        lowest = tuple(map(int, found[name].split(".")))
        assert len(lowest) == 3, f"{name}: pip takes {found[name]} for one version; name all of it"
        assert tuple(map(int, version(name).split("+")[0].split(".")[:3])) >= lowest
