"""Mutants of saved models: every one is refused or is the model it was; seeds are the mutants' numbers."""

from __future__ import annotations

import contextlib
import io
import random
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from bitdistiller_peft.errors import BitDistillerError, ChecksumError
from bitdistiller_peft.hub import verify_checkpoint
from tests.hub.models import WEIGHTS, copy_of, logits
from tests.tiny import load
from tests.trust import damage as d

GetFolder = Callable[..., Path]
SMALL, LARGE = 200, 10_000
MAX_SECONDS = 10  # for one mutant, on a busy machine; an honest one takes a tenth of a second
MODELS = ({"arch": "llama"}, {"arch": "llama", "shards": "20KB"}, {"arch": "llama", "grid": "nf", "bits": 3})
# what transformers raises before, or instead of, asking us
FOREIGN = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, IndexError, ZeroDivisionError)
TOKENS = [b"null", b"-1", b"0", b"1e999", b"[]", b"{}", b'""', b"true", b"99999999999999999999", b'"../x"', b"NaN"]


def flip_bit(content: bytearray, rng: random.Random) -> None:
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def set_byte(content: bytearray, rng: random.Random) -> None:
    content[rng.randrange(len(content))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def cut(content: bytearray, rng: random.Random) -> None:
    del content[rng.randrange(len(content)) :]


def remove(content: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(content))
    del content[start : start + rng.choice((1, 2, 8, 64))]


def repeat(content: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(content))
    piece = content[start : start + rng.choice((1, 4, 32))]
    content[start:start] = piece


def swap(content: bytearray, rng: random.Random) -> None:
    a, b = rng.randrange(len(content)), rng.randrange(len(content))
    content[a], content[b] = content[b], content[a]


def in_header(content: bytearray, rng: random.Random) -> None:
    """Most of a weight file is numbers; here the first kilobytes get their share."""
    content[rng.randrange(min(len(content), 4096))] = rng.choice(b'0123456789{}[]",:- \x00')


def token(content: bytearray, rng: random.Random) -> None:
    """Put a value where another one stood, as far as text can tell."""
    colons = [i for i, byte in enumerate(content[:20_000]) if byte == ord(":")]
    if colons:
        start = rng.choice(colons) + 1
        end = next((i for i in range(start, len(content)) if content[i] in b",}]\n"), len(content))
        content[start:end] = rng.choice(TOKENS)


MUTATIONS = (flip_bit, set_byte, cut, remove, repeat, swap, in_header, token)


class Checked(Exception):
    """The mutant took too long."""


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    def ring(signum: int, frame: object) -> None:
        raise Checked(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def mutate(folder: Path, seed: int) -> str:
    """Change one file of a checkpoint; say which, and how."""
    rng = random.Random(seed)
    files = sorted(f for f in folder.iterdir() if f.suffix in (".safetensors", ".json") and "generation" not in f.name)
    file = rng.choice(files)
    content = bytearray(file.read_bytes())
    names = []
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        mutation = rng.choice(MUTATIONS)
        if content:
            mutation(content, rng)
            names.append(mutation.__name__)
    file.write_bytes(content)
    return f"seed {seed}: {', '.join(names)} in {file.name}"


def run(seeds: range, packed_folder: GetFolder, tmp_path: Path) -> dict[str, int]:
    """Load every mutant with transformers and verify it; count the outcomes."""
    outcomes = {"typed": 0, "foreign": 0, "same": 0, "config": 0}
    originals = [packed_folder(**{"group_size": 32, **model}) for model in MODELS]
    states = [load(folder).state_dict() for folder in originals]
    for seed in seeds:
        original, state = originals[seed % len(MODELS)], states[seed % len(MODELS)]
        folder = copy_of(original, tmp_path / "mutant")
        what = mutate(folder, seed)
        with within(MAX_SECONDS), warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            try:
                model = load(folder)
            except BitDistillerError:
                outcomes["typed"] += 1
            except FOREIGN as error:
                if "config" not in what:  # the one file that is read before we are asked
                    raise AssertionError(what) from error
                outcomes["foreign"] += 1
            else:
                found = model.state_dict()
                same = found.keys() == state.keys() and all(torch.equal(found[n], t) for n, t in state.items())
                assert same, f"{what}: other weights were loaded"
                outcomes["config" if "config" in what else "same"] += 1
        shutil.rmtree(folder)
    return outcomes


def test_no_mutant_crashes_hangs_or_loads_other_weights(packed_folder: GetFolder, tmp_path: Path) -> None:
    outcomes = run(range(SMALL), packed_folder, tmp_path)
    assert outcomes["typed"] > SMALL // 2, outcomes


@pytest.mark.nightly
def test_none_of_ten_thousand_mutants_does(packed_folder: GetFolder, tmp_path: Path) -> None:
    assert run(range(SMALL, SMALL + LARGE), packed_folder, tmp_path)["typed"] > LARGE // 2


def flips(folder: Path, count: int, seed: int) -> int:
    """Flip single bytes in tensor data and count those that `verify_checkpoint` finds."""
    rng, found = random.Random(seed), 0
    header, data = d.read(folder / WEIGHTS)
    start = (folder / WEIGHTS).stat().st_size - len(data)
    assert header
    content = bytearray((folder / WEIGHTS).read_bytes())
    for _ in range(count):
        position, change = rng.randrange(start, len(content)), rng.randrange(1, 256)
        content[position] ^= change
        (folder / WEIGHTS).write_bytes(content)
        try:
            verify_checkpoint(folder)
        except ChecksumError as error:
            found += "tensor '" in str(error)
        content[position] ^= change
    return found


def test_every_single_byte_that_is_flipped_is_found_and_its_tensor_named(
    packed_folder: GetFolder, tmp_path: Path
) -> None:
    folder = copy_of(packed_folder("llama"), tmp_path / "model")
    assert flips(folder, 200, seed=0) == 200


@pytest.mark.nightly
def test_every_one_of_ten_thousand_flipped_bytes_is_found(packed_folder: GetFolder, tmp_path: Path) -> None:
    folder = copy_of(packed_folder("llama"), tmp_path / "model")
    assert flips(folder, 10_000, seed=1) == 10_000


def test_logits_of_an_unharmed_copy_are_the_original_s(packed_folder: GetFolder, tmp_path: Path) -> None:
    folder = packed_folder("llama")
    assert logits(load(copy_of(folder, tmp_path / "model"))).equal(logits(load(folder)))
