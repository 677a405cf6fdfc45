"""Plugs the library into PEFT and transformers, whatever the order of imports, and imports neither itself.

Where `peft` or `transformers.quantizers.auto` is already imported, its socket is filled now; otherwise right after it
is first executed, by a finder on `sys.meta_path`. So `import bitdistiller_peft` costs milliseconds.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


def _plug_into_peft() -> None:
    importlib.import_module("bitdistiller_peft.tuner")


def _plug_into_transformers() -> None:
    importlib.import_module("bitdistiller_peft.hub._socket").register()


_SOCKETS: dict[str, Callable[[], None]] = {
    "peft": _plug_into_peft,
    "transformers.quantizers.auto": _plug_into_transformers,
}


class _AfterLoader(importlib.abc.Loader):
    """Runs a callback right after another loader has executed its module."""

    def __init__(self, loader: importlib.abc.Loader, callback: Callable[[], None]) -> None:
        self._loader = loader
        self._callback = callback

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._callback()


class SocketFinder(importlib.abc.MetaPathFinder):
    """Finds nothing itself; wraps the loader of the modules we plug into."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Let the other finders find the module, and note what to do after it is executed."""
        callback = _SOCKETS.get(fullname)
        if callback is None:
            return None
        for finder in sys.meta_path:
            if finder is self:  # not isinstance: after a reload of this module the class is another one
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _AfterLoader(spec.loader, callback)
                return spec
        return None


def plug_in() -> None:
    """Fill the sockets now or as soon as they exist; calling it again changes nothing."""
    for name, callback in _SOCKETS.items():
        if name in sys.modules:
            callback()
    if not any(type(finder).__name__ == SocketFinder.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, SocketFinder())
