"""What the open sets of names (grids, recipes, formats) have in common: a new name is added once, a known one is found.

The entries are a plain dictionary of the module that owns the set.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from bitdistiller_peft.errors import ConfigError, UnknownNameError

Entry = TypeVar("Entry")


def add_new(entries: dict[str, Entry], kind: str, name: str, entry: Entry) -> None:
    """Add an entry under a new name.

    Args:
        entries: the set, changed in place.
        kind: what an entry is, for the message, e.g. ``"grid"``.
        name: its name.
        entry: the entry.

    Raises:
        ConfigError: the name is taken.
    """
    if name in entries:
        raise ConfigError(f"`name` must be new: got name={name!r}. Registered {kind}s: {sorted(entries)}.")
    entries[name] = entry


def look_up(entries: Mapping[str, Entry], kind: str, name: str) -> Entry:
    """Find an entry.

    Args:
        entries: the set.
        kind: what an entry is, for the message.
        name: its name, whatever the user gave.

    Raises:
        UnknownNameError: no entry has this name.
    """
    if not isinstance(name, str) or name not in entries:
        raise UnknownNameError(kind, name, entries)
    return entries[name]
