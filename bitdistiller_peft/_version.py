"""The library's version, read from the installed package."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def library_version() -> str:
    """The version as installed, or ``"unknown"`` when run from an unpacked source tree."""
    try:
        return version("bitdistiller_peft")
    except PackageNotFoundError:
        return "unknown"
