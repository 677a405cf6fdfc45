"""A damaged checkpoint is refused: by a typed error with file, tensor and remedy, at once, and without its memory."""

from __future__ import annotations

import json
import re
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from bitdistiller_peft.errors import BitDistillerError, CheckpointError, ChecksumError, ConfigError
from bitdistiller_peft.hub import verify_checkpoint
from tests.hub.models import WEIGHTS, copy_of
from tests.tiny import load
from tests.trust import damage as d

GetFolder = Callable[..., Path]
pytestmark = [
    pytest.mark.filterwarnings("ignore:bitdistiller.json is missing"),
    pytest.mark.filterwarnings("ignore:.*verify='none'"),
]

REMEDY = re.compile(
    r"[Dd]ownload|[Ss]ave|[Uu]se (one|a|bits|group|'|the|64)|copy the file|"
    r"Did you mean|Shorten|[Uu]pgrade|get it|one of \["
)
MAX_SECONDS = 1.0
MAX_GROWTH_MIB = 64
DOWN = "model.layers.1.mlp.down_proj.weight"
NORM, EMBED = "model.norm.weight", "model.embed_tokens.weight"


@dataclass(frozen=True)
class Case:
    """One way to be malformed.

    Attributes:
        id: its name.
        damage: makes it so, in a copy of a checkpoint.
        names: what the error must name.
        error: its class.
        model: which checkpoint is damaged.
        manifest: whether the checksums stay, which would find most damage before anything else does.
        loads: the error that `from_pretrained` raises where transformers refuses before it asks us.
    """

    id: str
    damage: d.Damage
    names: tuple[str, ...] = (WEIGHTS,)
    error: type[BitDistillerError] = CheckpointError
    model: dict[str, Any] = field(default_factory=lambda: {"arch": "llama"})
    manifest: bool = False
    loads: type[Exception] | tuple[type[Exception], ...] | None = None


def container() -> list[Case]:
    whole = [
        ("empty", lambda b: b""),
        ("seven-bytes", lambda b: b[:7]),
        ("cut-in-the-header", lambda b: b[:100]),
        ("cut-in-half", lambda b: b[: len(b) // 2]),
        ("cut-by-a-byte", lambda b: b[:-1]),
        ("one-byte-more", lambda b: b + b"\0"),
        ("zeros", lambda b: bytes(len(b))),
        ("header-length-0", lambda b: bytes(8) + b[8:]),
        ("header-length-1", lambda b: b"\1" + bytes(7) + b[8:]),
        ("header-length-2-to-63", lambda b: bytes(7) + b"\x80" + b[8:]),
        ("header-length-200-mb", lambda b: (200_000_000).to_bytes(8, "little") + b[8:]),
        ("header-longer-than-the-file", lambda b: len(b).to_bytes(8, "little") + b[8:]),
    ]
    header = [
        ("not-json", lambda h: b"x" * len(h)),
        ("not-utf-8", lambda h: h[:-2] + b"\xff}"),
        ("nested-100000-deep", lambda h: b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        ("a-list", lambda h: b"[" + h + b"]"),
        ("a-text", lambda h: json.dumps(h.decode()).encode()),
        ("a-space-before", lambda h: b" " + h),
        ("nan", lambda h: h[:-1] + b', "x": NaN}'),
        ("a-number-of-5000-digits", lambda h: h[:-1] + b', "x": ' + b"9" * 5000 + b"}"),
        ("metadata-nested", lambda h: h[:-1] + b', "__metadata__": {"a": {"b": "c"}}}'),
        ("metadata-a-number", lambda h: h.replace(b'"pt"', b"1")),
        ("metadata-a-list", lambda h: h.replace(b'{"format": "pt"}', b"[]")),
    ]
    return [
        *(Case(f"file-{name}", d.on_bytes(edit)) for name, edit in whole),
        *(Case(f"header-{name}", d.on_header(edit)) for name, edit in header),
        Case("header-the-same-key-twice", d.on_header(_twice), (WEIGHTS, NORM)),
        Case("file-a-folder", _as_folder),
        Case("file-missing", lambda folder: (folder / WEIGHTS).unlink()),
        Case("file-a-pickle-in-its-place", _as_pickle),
        Case("file-a-link-to-elsewhere", _as_link),
        Case("file-a-broken-link", lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).symlink_to("gone"))[1]),
    ]


def _twice(header: bytes) -> bytes:
    entry = json.dumps(json.loads(header)[NORM]).encode()
    return header[:-1] + b', "' + NORM.encode() + b'": ' + entry + b"}"


def _as_folder(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def _as_pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def _as_link(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "elsewhere.safetensors")
    (folder / WEIGHTS).symlink_to(folder.parent / "elsewhere.safetensors")


def entries() -> list[Case]:
    whole = [64, 8]  # codes of DOWN: 128 inputs at 2 bits
    changes: list[tuple[str, d.Damage]] = [
        ("a-list", d.on_header(lambda h: h.replace(json.dumps(json.loads(h)[DOWN]).encode(), b"[1]"))),
        ("without-dtype", d.on_entry(DOWN, dtype=None)),
        ("with-another-key", d.on_entry(DOWN, loader="os.system")),
        ("dtype-unknown", d.on_entry(DOWN, dtype="Q2")),
        ("dtype-a-number", d.on_entry(DOWN, dtype=3)),
        ("dtype-too-wide", d.on_entry(DOWN, dtype="I64")),
        ("shape-negative", d.on_entry(DOWN, shape=[-64, -8])),
        ("shape-overflowing", d.on_entry(DOWN, shape=[2**62, 4])),
        ("shape-of-an-exabyte", d.on_entry(DOWN, shape=[2**30, 2**30])),
        ("shape-a-fraction", d.on_entry(DOWN, shape=[64.0, 8.0])),
        ("shape-a-text", d.on_entry(DOWN, shape="64x8")),
        ("shape-true", d.on_entry(DOWN, shape=[True, 512])),
        ("shape-too-small", d.on_entry(DOWN, shape=[63, 8])),
        ("shape-of-1000-axes", d.on_entry(DOWN, shape=[1] * 1000)),
        ("one-offset", d.on_entry(DOWN, data_offsets=[0])),
        ("three-offsets", d.on_entry(DOWN, data_offsets=[0, 1024, 2048])),
        ("offsets-reversed", d.on_entry(DOWN, data_offsets=[2048, 0])),
        ("offsets-negative", d.on_entry(DOWN, data_offsets=[-2048, 0])),
        ("offsets-of-2-to-63", d.on_entry(DOWN, data_offsets=[2**63, 2**63 + 2048])),
        ("offsets-overlapping", d.moved(DOWN, -4, -4)),
        ("offsets-with-a-hole", d.moved(DOWN, 4, 4)),
        ("offsets-too-short", d.moved(DOWN, 0, -4)),
    ]
    assert whole[0] * whole[1] == 512
    # where two tensors collide, either may be the one that is named
    return [
        Case(f"entry-{name}", damage, (WEIGHTS, DOWN) if "overlap" not in name and "hole" not in name else (WEIGHTS,))
        for name, damage in changes
    ]


def tensors() -> list[Case]:
    def drop(tensor: torch.Tensor) -> None:
        return None

    def case(id: str, name: str, edit: Callable[[torch.Tensor], torch.Tensor | None], **kwargs: Any) -> Case:
        return Case(f"tensor-{id}", d.on_tensor(name, edit), kwargs.pop("names", (WEIGHTS, name)), **kwargs)

    return [
        case("codes-missing", DOWN, drop),
        case("scale-missing", DOWN + "_scale", drop),
        case("zero-point-missing", DOWN + "_zero_point", drop),
        case("norm-missing", NORM, drop, names=(NORM,)),
        case("head-missing", "lm_head.weight", drop, names=("lm_head.weight",)),
        Case("tensor-scale-too-many", d.added(DOWN + "_scale_negative", DOWN + "_scale"), (WEIGHTS, DOWN)),
        Case("tensor-of-a-layer-too-many", d.added("model.layers.7.mlp.down_proj.weight", DOWN), (WEIGHTS, "layers.7")),
        case("codes-too-narrow", DOWN, lambda t: t[:, :-1].contiguous()),
        case("codes-too-wide", DOWN, lambda t: t.repeat(1, 2)),
        case("codes-a-row-short", DOWN, lambda t: t[:-1].contiguous()),
        case("codes-flat", DOWN, lambda t: t.reshape(-1)),
        case("codes-of-64-bits", DOWN, lambda t: t.long()),
        case("codes-of-floats", DOWN, lambda t: t.float()),
        case("scale-of-another-dtype", DOWN + "_scale", lambda t: t.float()),
        case("scale-of-too-few-groups", DOWN + "_scale", lambda t: t[:, :-1].contiguous()),
        case("zero-point-of-bytes", DOWN + "_zero_point", lambda t: t.to(torch.uint8)),
        *(
            case(f"scale-{name}", DOWN + "_scale", d.put(value), names=(WEIGHTS, DOWN))
            for name, value in (
                ("nan", float("nan")),
                ("inf", float("inf")),
                ("zero", 0.0),
                ("negative", -1.0),
                ("subnormal", 1e-7),
            )
        ),
        case("norm-nan", NORM, d.put(float("nan"))),
        case("embedding-inf", EMBED, d.put(float("inf"))),
        case("embedding-too-small", EMBED, lambda t: t[:-1].contiguous()),
        case("embedding-of-integers", EMBED, lambda t: t.to(torch.int32)),
        case(
            "code-beyond-the-levels",
            DOWN,
            lambda t: torch.full_like(t, -1),
            model={"arch": "llama", "grid": "fp", "bits": 3},
        ),
        case(
            "bits-after-the-last-code",
            DOWN,
            lambda t: torch.full_like(t, -1),
            model={"arch": "llama-172", "group_size": 43, "exclude_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
            | {"target_modules": ["down_proj"]},
        ),
    ]


def configs() -> list[Case]:
    section = "quantization_config"
    ours = [
        ("bits-not-those-of-the-weights", {"bits": 3}, (WEIGHTS, "q_proj.weight"), CheckpointError),
        ("group-size-not-that-of-the-weights", {"group_size": 64}, (WEIGHTS, "_scale"), CheckpointError),
        ("group-size-0", {"group_size": 0}, ("`group_size`",), ConfigError),
        ("group-size-negative", {"group_size": -7}, ("`group_size`",), ConfigError),
        ("group-size-huge", {"group_size": 2**40}, ("`group_size`",), ConfigError),
        ("group-size-not-dividing", {"group_size": 48}, ("`group_size`", "layer"), ConfigError),
        ("grid-unknown", {"grid": "int9"}, ("`grid`",), ConfigError),
        ("grid-of-code", {"grid": "__import__('os').system('true')"}, ("`grid`",), ConfigError),
        ("grid-a-list", {"grid": ["int"]}, ("`grid`",), ConfigError),
        ("grid-another", {"grid": "int_sym"}, (WEIGHTS, "_zero_point"), CheckpointError),
        ("format-of-the-future", {"format_version": 2}, ("`format_version`",), ConfigError),
        ("key-unknown", {"loader": "x"}, ("loader",), ConfigError),
        ("key-misspelt", {"bit": 2}, ("'bits'",), ConfigError),
        ("state-unknown", {"state": "merged"}, ("`state`",), ConfigError),
        ("state-latent", {"state": "latent"}, (WEIGHTS, "q_proj.weight"), CheckpointError),
        ("skips-a-packed-layer", {"modules_to_not_convert": ["lm_head", DOWN[:-7]]}, (WEIGHTS, DOWN), CheckpointError),
        ("skips-nothing", {"modules_to_not_convert": []}, (WEIGHTS, "lm_head.weight"), CheckpointError),
        ("scale-dtype-another", {"scale_dtype": "float32"}, (WEIGHTS, "_scale"), CheckpointError),
    ]
    model = [
        ("one-layer-more", {"num_hidden_layers": 3}, ("model.layers.2",), CheckpointError),
        ("one-layer-fewer", {"num_hidden_layers": 1}, (WEIGHTS, "model.layers.1"), CheckpointError),
        ("wider", {"intermediate_size": 256}, (WEIGHTS, "mlp"), CheckpointError),
        ("vocabulary-larger", {"vocab_size": 97}, (WEIGHTS, EMBED), CheckpointError),
    ]
    other = (AttributeError, TypeError, ValueError, RuntimeError)
    return [
        *(Case(f"config-{i}", d.quant(**c), names, error) for i, c, names, error in ours),
        *(Case(f"config-{i}", d.model_config(**c), names, error) for i, c, names, error in model),
        Case("config-section-missing", d.model_config(quantization_config=None), (d.CONFIG,), loads=other),
        Case("config-section-a-list", d.model_config(quantization_config=["bits"]), (d.CONFIG, section), loads=other),
        Case("config-section-a-text", d.model_config(quantization_config="int"), (d.CONFIG, section), loads=other),
        Case("config-not-json", d.text(d.CONFIG, "{"), (d.CONFIG,), loads=OSError),
        Case("config-missing", lambda f: (f / d.CONFIG).unlink(), (d.CONFIG,), loads=(OSError, ValueError)),
        Case(
            "config-nested-deep", d.text(d.CONFIG, '{"a":' * 90_000 + "1" + "}" * 90_000), (d.CONFIG,), loads=Exception
        ),
        Case("config-the-same-key-twice", d.on_bytes(lambda b: b[:-2] + b',"vocab_size": 96}', d.CONFIG), (d.CONFIG,)),
    ]


SHARDED = {"arch": "llama", "shards": "20KB"}
SHARD = "model-00002-of-00004.safetensors"


def indices() -> list[Case]:
    def with_shard(name: Any) -> d.Damage:
        return d.index_with(lambda m: {t: name if f == SHARD else f for t, f in m.items()})

    def outside(folder: Path) -> None:
        (folder / SHARD).rename(folder.parent / "outside.safetensors")
        (folder / SHARD).symlink_to("../outside.safetensors")

    def index_outside(folder: Path) -> None:
        (folder / d.INDEX).rename(folder.parent / "index.json")
        (folder / d.INDEX).symlink_to("../index.json")

    changes: list[tuple[str, d.Damage, tuple[str, ...]]] = [
        ("not-json", d.text(d.INDEX, "{"), ()),
        ("a-list", d.on_json(d.INDEX, lambda i: [i]), ()),
        ("without-map", d.on_json(d.INDEX, lambda i: {"metadata": {}}), ()),
        ("without-metadata", d.on_json(d.INDEX, lambda i: {"weight_map": i["weight_map"]}), ()),
        ("map-empty", d.index_with(lambda m: {}), ()),
        ("map-a-list", d.index_with(list), ()),
        ("shard-a-number", with_shard(2), ()),
        ("shard-absolute", with_shard("/etc/passwd"), ()),
        ("shard-in-the-parent", with_shard("../outside.safetensors"), ()),
        ("shard-in-a-folder", with_shard("sub/model.safetensors"), ()),
        ("shard-a-pickle", with_shard("pytorch_model.bin"), ()),
        ("tensor-in-the-wrong-shard", d.index_with(lambda m: m | {DOWN: "model-00001-of-00004.safetensors"}), (DOWN,)),
        ("tensor-forgotten", d.index_with(lambda m: {t: f for t, f in m.items() if t != DOWN}), (DOWN,)),
        ("tensor-invented", d.index_with(lambda m: m | {"model.x": SHARD}), ("model.x",)),
        ("the-same-key-twice", d.on_bytes(lambda b: b[:-3] + b',"metadata": {}}', d.INDEX), ()),
        ("elsewhere-by-a-link", index_outside, ()),
    ]
    return [
        *(Case(f"index-{name}", damage, (d.INDEX, *more), model=SHARDED) for name, damage, more in changes[:-1]),
        Case("index-elsewhere-by-a-link", index_outside, ("index.json",), model=SHARDED),
        Case("index-missing", lambda f: (f / d.INDEX).unlink(), (d.INDEX,), model=SHARDED),
        Case("shard-missing", lambda f: (f / SHARD).unlink(), (SHARD,), model=SHARDED),
        Case("shard-cut", d.on_bytes(lambda b: b[:-1], SHARD), (SHARD,), model=SHARDED),
        Case("shard-elsewhere-by-a-link", outside, (SHARD,), model=SHARDED),
    ]


def manifests() -> list[Case]:
    def flip(content: bytes) -> bytes:
        return content[:-1] + bytes([content[-1] ^ 1])

    name = d.MANIFEST
    changes: list[tuple[str, d.Damage]] = [
        ("empty", d.text(name, "")),
        ("a-list", d.text(name, "[]")),
        ("nested-deep", d.text(name, "[" * 100_000)),
        ("of-the-future", d.on_json(name, lambda m: m | {"format_version": 2})),
        ("without-files", d.text(name, '{"format_version": 1}')),
        ("without-this-file", d.on_json(name, lambda m: m | {"files": {}})),
        ("crc-a-text", d.manifest_with(lambda e: e | {"crc32": "1"})),
        ("size-a-text", d.manifest_with(lambda e: e | {"bytes": "1"})),
        ("tensors-a-list", d.manifest_with(lambda e: e | {"tensors": []})),
        ("tensor-without-sums", d.manifest_with(lambda e: e | {"tensors": {DOWN: {}}})),
        ("of-an-interrupted-save", d.text(name, '{"format_version": 1, "interrupted": true, "files": {}}')),
        ("the-same-key-twice", d.on_bytes(lambda b: b.rstrip()[:-1] + b', "files": {}}', name)),
    ]
    return [
        *(Case(f"manifest-{i}", damage, (name,), manifest=True) for i, damage in changes),
        Case("manifest-of-other-bytes", d.on_bytes(flip), (WEIGHTS, "tensor"), ChecksumError, manifest=True),
        Case(
            "manifest-of-another-crc",
            d.manifest_with(lambda e: e | {"crc32": 1}),
            (WEIGHTS,),
            ChecksumError,
            manifest=True,
        ),
    ]


CASES = [*container(), *entries(), *tensors(), *configs(), *indices(), *manifests()]


def prepared(case: Case, packed_folder: GetFolder, target: Path) -> Path:
    settings = dict(case.model)
    folder = copy_of(packed_folder(settings.pop("arch"), **settings), target)
    case.damage(folder)
    if not case.manifest:
        (folder / d.MANIFEST).unlink()
    return folder


def test_the_table_has_as_many_cases_as_promised() -> None:
    assert len({case.id for case in CASES}) == len(CASES) >= 60


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_malformed_checkpoint_is_refused(case: Case, packed_folder: GetFolder, tmp_path: Path) -> None:
    folder = prepared(case, packed_folder, tmp_path / "model")
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    if case.loads is not None:
        with pytest.raises(case.loads):
            load(folder)
        with pytest.raises(case.error) as caught:
            verify_checkpoint(folder)
    else:
        with pytest.raises(case.error) as caught:
            load(folder)
    seconds = time.process_time() - started
    message = str(caught.value)
    assert not [name for name in case.names if name not in message], message
    assert REMEDY.search(message), message
    assert len(message) < 1000
    assert seconds < MAX_SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MAX_GROWTH_MIB * 1024


FILES_ALONE = ("file-", "header-", "entry-", "index-", "shard-", "manifest-")


@pytest.mark.parametrize("case", [c for c in CASES if c.id.startswith(FILES_ALONE)], ids=lambda case: case.id)
def test_verifying_says_the_same_without_building_a_model(case: Case, packed_folder: GetFolder, tmp_path: Path) -> None:
    with pytest.raises(case.error) as caught:
        verify_checkpoint(prepared(case, packed_folder, tmp_path / "model"))
    assert not [name for name in case.names if name not in str(caught.value)], caught.value


def test_a_sound_checkpoint_is_verified(packed_folder: GetFolder, tmp_path: Path) -> None:
    whole = packed_folder("llama")
    assert verify_checkpoint(whole) == [whole / WEIGHTS]
    shards = packed_folder(**SHARDED)
    assert [file.name for file in verify_checkpoint(str(shards))] == [
        f"model-{n:05}-of-00004.safetensors" for n in range(1, 5)
    ]
    unverified = copy_of(whole, tmp_path / "model")
    (unverified / d.MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"must hold bitdistiller\.json"):
        verify_checkpoint(unverified)
