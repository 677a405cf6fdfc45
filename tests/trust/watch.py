"""Watch what a load does to the machine: files opened outside of its folder, programs started, memory taken."""

from __future__ import annotations

import ctypes
import os
import resource
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_IN_OPEN, _IN_ISDIR, _IN_NONBLOCK = 0x20, 0x40000000, os.O_NONBLOCK
_EVENT = struct.Struct("iIII")
_STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "ctypes.dlopen", "socket.connect")
_listeners: list[list[str]] = []


def _audit(event: str, args: tuple[object, ...]) -> None:
    for listener in _listeners:
        if event in _STARTS:
            listener.append(f"{event} {args!r:.200}")


sys.addaudithook(_audit)


class Watch:
    """What happened while it was on.

    Attributes:
        opened: names of files in the watched folders that were opened, by whatever code; Linux only.
        started: programs, libraries and connections.
        growth_mib: how far the peak of this process's memory rose.
        seconds: processor time.
    """

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.started: list[str] = []
        self.growth_mib = self.seconds = 0.0


@contextmanager
def watching(*folders: Path) -> Iterator[Watch]:
    """Watch the files of these folders (not of those inside) and this process."""
    watch = Watch()
    libc = ctypes.CDLL(None, use_errno=True)
    handle = libc.inotify_init1(_IN_NONBLOCK)
    assert handle >= 0
    for folder in folders:
        assert libc.inotify_add_watch(handle, os.fsencode(folder), _IN_OPEN) >= 0
    peak, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    _listeners.append(watch.started)
    try:
        yield watch
    finally:
        _listeners.remove(watch.started)
        watch.seconds = time.process_time() - started
        watch.growth_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
        watch.opened = _names(handle)
        os.close(handle)


def _names(handle: int) -> list[str]:
    """Names of files in the pending events; to list a folder opens it too, which does no harm."""
    names = []
    while True:
        try:
            events = os.read(handle, 1 << 16)
        except BlockingIOError:
            return names
        while events:
            _, mask, _, length = _EVENT.unpack_from(events)
            name = events[_EVENT.size : _EVENT.size + length].rstrip(b"\0").decode()
            events = events[_EVENT.size + length :]
            if name and not mask & _IN_ISDIR:
                names.append(name)
