"""Closes every connection but loopback ones: in the tests, and, by its name on PYTHONPATH, in every Python they start.

An audit hook sees what Python's `socket` does on anybody's behalf, from the first import on, and cannot be taken away;
but a name that `connect` is given is resolved before the hook is asked, so these methods ask it themselves.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from typing import Any

OPEN = "TESTS_MAY_LEAVE_THE_MACHINE"  # set for tests marked `network`, and so for what they start


class NetworkBlockedError(RuntimeError):
    """A test tried to leave the machine; mark it `network` if it must."""


def is_local(host: object) -> bool:
    """Whether a host, as `socket` takes it, is this machine."""
    if isinstance(host, bytes):
        host = host.decode()
    if host in {None, "", "localhost", socket.gethostname()}:
        return True
    try:
        address = ipaddress.ip_address(str(host).partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def refuse_unless_local(event: str, args: tuple[Any, ...]) -> None:
    """The audit hook."""
    if not event.startswith("socket.") or OPEN in os.environ:
        return
    match event:
        case "socket.connect" | "socket.sendto" | "socket.sendmsg":
            address = args[-1]
        case "socket.getaddrinfo" | "socket.gethostbyname":
            address = (args[0],)
        case _:
            return
    # a Unix socket's address is a path, and that of `sendmsg` on a connected one is None
    if isinstance(address, tuple) and not is_local(address[0]):
        raise NetworkBlockedError(f"tests may talk to loopback only: got {address!r}. Mark the test `network`.")


def _ask_first(name: str) -> None:
    real = getattr(socket.socket, name)

    def call(self: socket.socket, *args: Any) -> Any:
        refuse_unless_local("socket.connect", args)
        return real(self, *args)

    setattr(socket.socket, name, call)


sys.addaudithook(refuse_unless_local)
for method in ("connect", "connect_ex", "sendto"):
    _ask_first(method)
