"""The folder of a teacher cache: what a teacher said of many documents, found again by their tokens.

- ``manifest.json``: what was asked of whom, about what; written first, atomically.
- ``shard-00000.safetensors`` ...: the answers. Beside them ``digests`` ``[documents, 16]`` names the documents and
  ``offsets`` ``[documents + 1]`` says where each begins and ends.
- ``head.safetensors``: the teacher's output head, for hidden states.
- ``bitdistiller.json``: checksums of all of these, written last; without it the cache is not complete.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from bitdistiller_peft._version import library_version
from bitdistiller_peft.errors import BitDistillerError, CheckpointError, ConfigError, StateError, UnknownNameError
from bitdistiller_peft.hub.atomic import write_text
from bitdistiller_peft.hub.manifest import MANIFEST_NAME as CHECKSUMS_NAME
from bitdistiller_peft.hub.manifest import verify_files, write_manifest
from bitdistiller_peft.losses import Head
from bitdistiller_peft.training.cache_checks import (
    AGAIN,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST_NAME,
    check_tensors,
    open_tensors,
    read_index,
    read_manifest,
)

HEAD_NAME = "head.safetensors"
KINDS = {"hidden": ("bfloat16", "float16", "float32"), "topk": ("float16", "float32")}
"""Kind of answer to the dtypes that it may be stored in."""


@dataclass(frozen=True)
class CacheLayout:
    """What is kept of every token.

    Attributes:
        kind: `"hidden"` or `"topk"`.
        dtype: of hidden states or log-probabilities.
        width: of the hidden states, or how many tokens are kept of each distribution.
        vocab: size of the vocabulary.

    Raises:
        ConfigError: any other value.
    """

    kind: str
    dtype: str
    width: int
    vocab: int

    def __post_init__(self) -> None:
        """Refuse what cannot be stored."""
        if self.kind not in KINDS:
            raise UnknownNameError("kind", self.kind, KINDS)
        if self.dtype not in KINDS[self.kind]:
            raise UnknownNameError("dtype", self.dtype, KINDS[self.kind])
        if self.kind == "topk" and not 2 <= self.width <= self.vocab:
            raise ConfigError(f"`k` must be from 2 to the vocabulary of {self.vocab}: got k={self.width}. Use 64.")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def bytes_per_token(self) -> int:
        """What one token takes."""
        each = self.torch_dtype.itemsize
        return self.width * each if self.kind == "hidden" else self.width * (4 + each) + 4

    def tensors(self, num_tokens: int) -> dict[str, tuple[torch.dtype, list[int]]]:
        """Names, dtypes and shapes of the answers of a shard."""
        kept = [num_tokens, self.width]
        if self.kind == "hidden":
            return {"hidden": (self.torch_dtype, kept)}
        return {
            "tokens": (torch.int32, kept),
            "log_probs": (self.torch_dtype, kept),
            "log_tail": (torch.float32, [num_tokens]),
        }


class Place(NamedTuple):
    """Where a document lies."""

    shard: int
    start: int
    stop: int


# ------------------------------------------------------------------------------------------------------------- writing


def begin(folder: Path, identity: Mapping[str, Any]) -> None:
    """Write the manifest, or check that the one that is there asks for the same.

    Args:
        folder: of the cache.
        identity: plain values that everything in the folder depends on.

    Raises:
        ConfigError: the folder holds something else; the differences are named.
        CheckpointError: its manifest cannot be read, or there are shards without one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MANIFEST_NAME
    if path.exists():
        was = _flat(read_manifest(folder))
        now = _flat(json.loads(json.dumps(identity)))
        differences = [
            f"{key} was {was.get(key)!r}, is {value!r}" for key, value in now.items() if was.get(key) != value
        ]
        if differences:
            raise ConfigError(
                f"`output_dir` must hold a cache of the same run, or nothing: in {folder}, {'; '.join(differences)}. "
                "Use the same model, data and settings to go on, or another output_dir."
            )
        return
    if any(folder.glob("*.safetensors")):
        raise ConfigError(f"`output_dir` must hold a cache, or nothing: got other weights in {folder}. Use another.")
    content = {"format": FORMAT, "format_version": FORMAT_VERSION, **identity}
    write_text(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def shard_path(folder: Path, index: int) -> Path:
    """The file of a shard."""
    return folder / f"shard-{index:05d}.safetensors"


def finish(folder: Path) -> None:
    """Write the checksums, which make the cache complete."""
    if not (folder / CHECKSUMS_NAME).exists():
        write_manifest(folder, f"bitdistiller_peft {library_version()}")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


# ------------------------------------------------------------------------------------------------------------- reading


class TeacherCache:
    """A complete cache, opened for reading. Every shard's checksum is compared when it is first read.

    Args:
        folder: what `cache_teacher` wrote.

    Raises:
        CheckpointError: the folder holds no cache, or its files do not fit the manifest.
        StateError: the cache is not complete.

    Example:
        >>> TeacherCache("cache").layout.kind  # doctest: +SKIP
        'hidden'
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        total = self.manifest["num_shards"]
        there = len(list(self.folder.glob("shard-*.safetensors")))
        if there < total or not (self.folder / CHECKSUMS_NAME).exists():
            raise StateError(
                f"{folder} must be complete: got {there} of {total} shards. Call cache_teacher() with the same "
                "arguments and output_dir to go on."
            )
        self.layout = self._layout()
        self._files: dict[int, Any] = {}
        self._places: dict[bytes, Place] = {}
        for index in range(total):
            self._index(index)

    def __len__(self) -> int:
        """How many documents it holds."""
        return len(self._places)

    def __contains__(self, digest: bytes) -> bool:
        """Whether it holds a document, by the digest of its tokens."""
        return digest in self._places

    def __repr__(self) -> str:
        """Say what it holds."""
        layout = ", ".join(f"{k}={v}" for k, v in dataclasses.asdict(self.layout).items())
        return f"TeacherCache({str(self.folder)!r}, {len(self)} documents, {layout})"

    def read(self, digest: bytes) -> dict[str, Tensor]:
        """What the teacher said of a document, `[its tokens, ...]` by name, on the CPU.

        Raises:
            KeyError: it is not in the cache.
            ChecksumError: its shard is damaged.
        """
        place = self._places[digest]
        file = self._files.get(place.shard)
        if file is None:
            path = shard_path(self.folder, place.shard)
            verify_files([path])
            file = self._files[place.shard] = open_tensors(path)
        return {name: file.get_slice(name)[place.start : place.stop] for name in self.layout.tensors(0)}

    @functools.cached_property
    def head(self) -> Head:
        """The teacher's output head.

        Raises:
            CheckpointError: a cache of this kind has none.
        """
        if self.layout.kind != "hidden":
            raise CheckpointError(f"{self.folder} must be of kind 'hidden' to have a head: got {self.layout.kind!r}.")
        path = self.folder / HEAD_NAME
        file = open_tensors(path)
        verify_files([path])
        try:
            bias = file.get_tensor("bias") if "bias" in file.keys() else None  # noqa: SIM118  (no dict)
            return Head(file.get_tensor("weight"), bias, **self.manifest["head"])
        except (SafetensorError, ConfigError) as error:
            raise CheckpointError(f"{path} must be the head that {MANIFEST_NAME} describes: {error} {AGAIN}") from None

    def verify(self, mode: Literal["fast", "full"] = "full") -> None:
        """Compare every file with what was written.

        Args:
            mode: `"fast"` compares a CRC-32 per file, `"full"` a SHA-256 per tensor.

        Raises:
            ChecksumError: a file differs; its first damaged tensor is named.
        """
        verify_files(sorted(self.folder.glob("*.safetensors")), mode=mode)

    def _layout(self) -> CacheLayout:
        try:
            return CacheLayout(**self.manifest["layout"])
        except BitDistillerError as error:
            raise CheckpointError(f"{self.folder / MANIFEST_NAME} must be whole: {error} {AGAIN}") from None

    def _index(self, shard: int) -> None:
        path = shard_path(self.folder, shard)
        file = open_tensors(path)
        offsets, digests = read_index(path, file)
        check_tensors(path, file, self.layout.tensors(offsets[-1]))
        for digest, start, stop in zip(digests, offsets[:-1], offsets[1:], strict=True):
            self._places[digest] = Place(shard, start, stop)
