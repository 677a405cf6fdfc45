"""The kernels are compiled once, into a place of the user's own, or not at all with one notice; nothing else is run."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from bitdistiller_peft.errors import UnknownNameError
from bitdistiller_peft.kernels import backend as backend_module
from bitdistiller_peft.kernels import backend_info
from bitdistiller_peft.kernels.cpu import build, library

has_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in build.COMPILERS), reason="there is no C++ compiler on this machine"
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, a compiler that is quick (it copies), and nothing loaded."""
    compiler = tmp_path / "c++"
    compiler.write_text(
        '#!/bin/sh\nwhile [ "$1" != "-o" ]; do shift; done\necho "made by $0" > "$2"\necho >> "$0.log"\n'
    )
    compiler.chmod(0o700)
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv(build.CACHE_VARIABLE, str(folder))
    library._load.cache_clear()
    library.isa.cache_clear()
    yield folder
    library._load.cache_clear()
    library.isa.cache_clear()


def test_the_library_is_compiled_once_and_found_again(cache: Path) -> None:
    path = build.library_path()
    assert path.parent == cache / "kernels"
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o700
    assert build.library_path() == path
    assert (cache.parent / "c++.log").read_text() == "\n"
    assert list(path.parent.iterdir()) == [path]


def test_other_sources_another_compiler_or_other_flags_make_another_library(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [build.library_path()]
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    paths.append(build.library_path())
    other = cache.parent / "other"
    shutil.copy(cache.parent / "c++", other)
    monkeypatch.setenv("CXX", str(other))
    paths.append(build.library_path())
    sources = shutil.copytree(build.SOURCES, cache.parent / "csrc")
    with (sources / "layout.h").open("a") as file:
        file.write("// changed\n")
    monkeypatch.setattr(build, "SOURCES", sources)
    paths.append(build.library_path())
    assert len(set(paths)) == 4


def test_two_threads_that_compile_at_once_both_find_a_whole_library(cache: Path) -> None:
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(build.library_path().read_text())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len(set(found)) == 1


def test_a_place_that_others_can_write_to_is_refused(cache: Path) -> None:
    path = build.library_path()
    path.chmod(0o777)
    with pytest.raises(build.BuildError, match="writable for nobody else"):
        build.library_path()
    path.chmod(0o700)
    path.parent.chmod(0o770)
    with pytest.raises(build.BuildError, match="writable for nobody else"):
        build.library_path()
    path.parent.chmod(0o700)
    cache.chmod(0o777)
    with pytest.raises(build.BuildError, match="must not be writable for everybody"):
        build.library_path()
    cache.chmod(0o700)
    assert build.library_path() == path


def test_a_link_in_place_of_the_folder_or_the_library_is_refused(cache: Path, tmp_path: Path) -> None:
    path = build.library_path()
    moved = path.rename(tmp_path / "elsewhere.so")
    path.symlink_to(moved)
    with pytest.raises(build.BuildError, match="must belong to the current user"):
        build.library_path()
    path.unlink()
    path.parent.rmdir()
    (tmp_path / "folder").mkdir(mode=0o700)
    (cache / "kernels").symlink_to(tmp_path / "folder")
    with pytest.raises(build.BuildError, match="must belong to the current user"):
        build.library_path()


def test_another_users_library_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.library_path()
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    with pytest.raises(build.BuildError, match="got owner"):
        build.library_path()


FAULTS = {
    "no compiler": (None, "no C++ compiler found"),
    "a compiler that fails": ("#!/bin/sh\necho 'no such thing' >&2\nexit 1\n", "no such thing"),
    "a compiler that makes rubbish": ('#!/bin/sh\nwhile [ "$1" != "-o" ]; do shift; done\necho x > "$2"\n', "kernels"),
}


@pytest.mark.parametrize(("script", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_whatever_is_missing_the_reference_takes_over_with_one_notice(
    script: str | None, message: str, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = cache.parent / "c++"
    if script is None:
        compiler.unlink()
    else:
        compiler.write_text(script)
    monkeypatch.setattr(backend_module, "_default", ["auto"])
    with caplog.at_level(logging.WARNING, logger="bitdistiller_peft"):
        for _ in range(3):
            assert backend_info("cpu") == "reference"
    (record,) = caplog.records
    assert "packed layers run on the reference backend" in record.getMessage()
    assert message in record.getMessage()
    assert library.best_isa() == "portable"


@has_compiler
def test_an_instruction_set_can_be_chosen_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    library.isa.cache_clear()
    monkeypatch.setenv(library.ISA_VARIABLE, "portable")
    assert library.isa() == 0
    library.isa.cache_clear()
    monkeypatch.setenv(library.ISA_VARIABLE, "mmx")
    with pytest.raises(UnknownNameError, match="must be one of"):
        library.isa()
    monkeypatch.delenv(library.ISA_VARIABLE)
    library.isa.cache_clear()
    assert library.ISAS[library.isa()] == library.best_isa()


@pytest.mark.slow
@has_compiler
def test_the_sources_compile_without_openmp_and_without_warnings(tmp_path: Path) -> None:
    command = [
        build.find_compiler(),
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-shared",
        "-pthread",
        "-Wall",
        "-Wextra",
        "-Werror",
    ]
    command += ["-Wno-unknown-pragmas", "-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
    command += ["-o", str(tmp_path / "kernels.so"), str(build.SOURCES / "kernels.cpp")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_nothing_is_compiled_before_a_packed_layer_is_used(cache: Path) -> None:
    layer = torch.nn.Linear(4, 4)
    layer(torch.ones(1, 4))
    assert not (cache / "kernels").exists()
