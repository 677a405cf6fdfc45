"""Mutants of saved models: every one is refused or is the model it was; seeds are the mutants' numbers."""

from __future__ import annotations

import contextlib
import io
import random
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from bitdistiller_peft.errors import BitDistillerError, ChecksumError
from bitdistiller_peft.hub import verify_checkpoint
from tests.hub.models import WEIGHTS, copy_of, logits
from tests.tiny import load
from tests.trust import damage as d

GetFolder = Callable[..., Path]
SMALL, LARGE, PARTS = 200, 10_000, 10
MAX_SECONDS = 10  # for one mutant, on a busy machine; an honest one takes a tenth of a second
MODELS = ({"arch": "llama"}, {"arch": "llama", "shards": "20KB"}, {"arch": "llama", "grid": "nf", "bits": 3})
# what transformers raises before, or instead of, asking us
FOREIGN = (
    *(OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, IndexError, ArithmeticError),
    StrictDataclassError,
)
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


def mutate(folder: Path, seed: int) -> tuple[str, Path, bytes]:
    """Change one file of a checkpoint; say which, and how, and what it was."""
    rng = random.Random(seed)
    files = sorted(f for f in folder.iterdir() if f.suffix in (".safetensors", ".json") and "generation" not in f.name)
    file = rng.choice(files)
    before = file.read_bytes()
    content = bytearray(before)
    names = []
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        mutation = rng.choice(MUTATIONS)
        if content:
            mutation(content, rng)
            names.append(mutation.__name__)
    file.write_bytes(content)
    return f"seed {seed}: {', '.join(names)} in {file.name}", file, before


def outcome_of(folder: Path, what: str, state: dict[str, torch.Tensor]) -> str:
    """Load a mutant: how it was refused, or that it is the model it was; anything else begins with its seed."""
    with within(MAX_SECONDS), warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            found = load(folder).state_dict()
        except BitDistillerError:
            return "typed"
        except FOREIGN as error:  # config.json is the one file that is read before we are asked
            return "foreign" if "config" in what else f"{what}: {error!r:.200}"
        except Exception as error:  # noqa: BLE001
            return f"{what}: {error!r:.200}"
    if found.keys() != state.keys() or not all(torch.equal(found[name], tensor) for name, tensor in state.items()):
        return f"{what}: other weights were loaded"
    return "config" if "config" in what else "same"


def run(seeds: range, packed_folder: GetFolder, tmp_path: Path) -> Counter[str]:
    """Load every mutant with transformers; count the outcomes, of which only four are allowed."""
    originals = [packed_folder(**{"group_size": 32, **model}) for model in MODELS]
    states = [load(folder).state_dict() for folder in originals]
    folders = [copy_of(folder, tmp_path / str(number)) for number, folder in enumerate(originals)]
    outcomes: Counter[str] = Counter()
    for seed in seeds:
        what, file, before = mutate(folders[seed % len(MODELS)], seed)
        outcomes[outcome_of(file.parent, what, states[seed % len(MODELS)])] += 1
        file.write_bytes(before)
    print(f"mutants {seeds.start} to {seeds.stop}: {dict(outcomes)}")
    assert set(outcomes) <= {"typed", "foreign", "same", "config"}, outcomes
    return outcomes


def test_no_mutant_crashes_hangs_or_loads_other_weights(packed_folder: GetFolder, tmp_path: Path) -> None:
    outcomes = run(range(SMALL), packed_folder, tmp_path)
    assert outcomes["typed"] > SMALL // 2, outcomes


@pytest.mark.nightly
@pytest.mark.parametrize("part", range(PARTS))
def test_none_of_ten_thousand_mutants_does(part: int, packed_folder: GetFolder, tmp_path: Path) -> None:
    first, size = SMALL + part * LARGE // PARTS, LARGE // PARTS
    assert run(range(first, first + size), packed_folder, tmp_path)["typed"] > size // 2


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
