"""Compile the kernels once per machine: one compiler command, into a folder that only its owner can write.

There is nothing to build when the package is installed, so an installation is the same with and without a compiler.
The library is compiled on first use (some seconds) and kept under a name that depends on the sources, the compiler and
the flags. It holds every instruction set, so one cache serves different machines of a cluster.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

from bitdistiller_peft.errors import StateError

SOURCES = Path(__file__).parent / "csrc"
CACHE_VARIABLE = "BITDISTILLER_CACHE"
COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-ffp-contract=off",  # a fused multiply-add would change the last bit of a weight
    "-fno-math-errno",
    "-w",
)
TIMEOUT_SECONDS = 300


class BuildError(StateError):
    """The kernels cannot be compiled or kept here; the message says why."""


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``$BITDISTILLER_CACHE/kernels`` or the user's own cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser().absolute() / "kernels"
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base).absolute() / "bitdistiller" / "kernels"


def library_path() -> Path:
    """The compiled library, made now if it is not there.

    Raises:
        BuildError: no compiler, a compiler error, or a cache folder that others could write to.
    """
    if sys.byteorder != "little" or os.name != "posix":
        raise BuildError(f"the CPU kernels are built on little-endian Linux and macOS: got {platform.platform()}")
    compiler = find_compiler()
    folder = _private_folder(cache_folder())
    target = folder / f"bitdistiller-{_fingerprint(compiler)}.so"
    if not target.exists():
        _compile(compiler, target)
    check_private(target)
    return target


def find_compiler() -> str:
    """The C++ compiler: ``$CXX``, or the first of `COMPILERS` on the path.

    Raises:
        BuildError: there is none.
    """
    chosen = os.environ.get("CXX")
    for name in (chosen,) if chosen else COMPILERS:
        path = shutil.which(name)
        if path is not None:
            return path
    raise BuildError(f"no C++ compiler found: looked for {chosen or ', '.join(COMPILERS)}. Install one, or set CXX.")


def check_private(path: Path) -> None:
    """Refuse a file or folder that somebody else owns or can write to: what is in it will be run.

    Raises:
        BuildError: it belongs to another user, is a link, or is writable for group or others.
    """
    info = path.lstat()
    if stat.S_ISLNK(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BuildError(
            f"{str(path)!r} must belong to the current user and be writable for nobody else: got owner {info.st_uid}, "
            f"mode {stat.filemode(info.st_mode)}. Point {CACHE_VARIABLE} to a folder of your own."
        )


def _private_folder(folder: Path) -> Path:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise BuildError(f"the cache folder cannot be made: {error}. Point {CACHE_VARIABLE} to another.") from error
    check_private(folder)
    for parent in folder.resolve().parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:  # anybody could put another folder in its place
            raise BuildError(
                f"{str(parent)!r} must not be writable for everybody: got mode {stat.filemode(mode)}. "
                f"Point {CACHE_VARIABLE} to a folder of your own."
            )
    return folder


def _fingerprint(compiler: str) -> str:
    digest = hashlib.sha256()
    for file in sorted(SOURCES.iterdir()):
        if file.suffix in {".h", ".cpp"}:
            digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    info = Path(compiler).resolve().stat()
    identity = (Path(compiler).resolve(), info.st_size, info.st_mtime_ns, FLAGS, platform.machine(), sys.platform)
    digest.update(repr(identity).encode())
    return digest.hexdigest()[:24]


def _compile(compiler: str, target: Path) -> None:
    """Compile beside the target and move it into place, so that no process sees half a library."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        failure = ""
        for threads in (("-fopenmp",), ("-pthread",)):  # Apple's clang has no OpenMP
            command = [compiler, *FLAGS, *threads, "-o", str(made), str(SOURCES / "kernels.cpp")]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise BuildError(f"{compiler} did not run: {error}") from error
            if done.returncode == 0:
                made.chmod(0o700)
                made.replace(target)
                return
            failure = done.stderr
        raise BuildError(f"{compiler} failed:\n{failure[-2000:]}")
