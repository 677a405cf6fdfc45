"""A hostile config runs no code, opens nothing outside of its folder, starts nothing, and takes no memory."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from bitdistiller_peft.errors import BitDistillerError
from tests.hub.models import WEIGHTS, copy_of, logits
from tests.tiny import load
from tests.trust import damage as d
from tests.trust.watch import watching

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="files are watched with Linux's inotify"),
    pytest.mark.filterwarnings("ignore:bitdistiller.json is missing"),
    pytest.mark.filterwarnings("ignore::UserWarning:transformers"),
]

MAX_SECONDS = 2.0
MAX_GROWTH_MIB = 64
PARSED = 6  # times its length is what JSON of short texts takes: its bytes, its text and its Python objects
CANARY = "open({path!r}, 'w').close()\nclass Evil: pass\n"
PROJECTION = "model.layers.0.mlp.down_proj"
SYSTEM = "__import__('os').system('touch executed')"
SHARD = "model-00002-of-00004.safetensors"


def with_shard(name: str) -> d.Damage:
    return d.index_with(lambda names: {t: name if f == SHARD else f for t, f in names.items()})


def link(name: str, target: str) -> d.Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return damage


def custom_generate(folder: Path) -> None:
    (folder / "custom_generate").mkdir()
    (folder / "evil.py").rename(folder / "custom_generate" / "generate.py")


# What stands in our own section: always refused, by name.
OURS: dict[str, dict[str, Any]] = {
    "hydra-target": {"_target_": "os.system"},
    "class-path": {"class_path": "evil.Evil"},
    "module": {"python_module": "evil"},
    "quantizer-class": {"quantizer_cls": "evil.Evil"},
    "init-args": {"init_args": {"command": "true"}},
    "code-as-grid": {"grid": SYSTEM},
    "module-as-grid": {"grid": "evil.Evil"},
    "path-as-grid": {"grid": "../evil"},
    "dict-as-grid": {"grid": {"_target_": "evil.Evil"}},
    "function-as-scale-dtype": {"scale_dtype": "load"},
    "module-as-scale-dtype": {"scale_dtype": "torch.hub"},
    "path-as-packing": {"packing": "../../evil.py"},
    "pickle-as-state": {"state": "pickle"},
    "code-as-bits": {"bits": SYSTEM},
    "bits-of-a-billion": {"bits": 10**9},
    "bits-negative": {"bits": -2},
    "group-size-of-2-to-62": {"group_size": 2**62},
    "group-size-a-path": {"group_size": "/etc/passwd"},
    "zero-points-of-a-billion": {"zero_point_range": [0, 10**9]},
    "override-with-a-target": {"overrides": {PROJECTION: {"_target_": "evil.Evil"}}},
    "override-with-code": {"overrides": {PROJECTION: {"grid": SYSTEM}}},
    "override-a-list": {"overrides": [{"bits": 2}]},
    "skips-with-numbers": {"modules_to_not_convert": [1]},
    "provenance-nested": {"provenance": {"a": {"b": {"_target_": "evil.Evil"}}}},
    "provenance-deep": {"provenance": {"a": [[[[[[[[1]]]]]]]]}},
    "install-a-command": {"install": ["sh", "-c", "true"]},
    "verification-off": {"verify": "none"},
    "format-of-the-future": {"format_version": 10**6},
}

# What stands elsewhere: refused by us or by transformers, or without any effect.
OTHERS: dict[str, d.Damage] = {
    "auto-map-here": d.model_config(auto_map={"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"}),
    "auto-map-of-the-parent": d.model_config(auto_map={"AutoModelForCausalLM": "../evil.Evil"}),
    "auto-map-on-the-hub": d.model_config(auto_map={"AutoModelForCausalLM": "attacker/repo--evil.Evil"}),
    "auto-map-and-trust": d.model_config(auto_map={"AutoConfig": "evil.Evil"}, trust_remote_code=True),
    "auto-map-of-an-unknown-type": d.model_config(model_type="evil", auto_map={"AutoConfig": "evil.Evil"}),
    "trust-in-the-section": d.quant(trust_remote_code=True),
    "model-type-a-path": d.model_config(model_type="../evil"),
    "architecture-a-path": d.model_config(architectures=["evil.Evil"]),
    "attention-a-repository": d.model_config(_attn_implementation="attacker/kernel"),
    "attention-internal": d.model_config(_attn_implementation_internal="attacker/kernel"),
    "attention-plain": d.model_config(attn_implementation="attacker/kernel@main:run"),
    "attention-a-path": d.model_config(_attn_implementation="../evil"),
    "attention-of-a-part": d.model_config(text_config={"_attn_implementation_internal": "attacker/kernel"}),
    "experts-a-repository": d.model_config(_experts_implementation="attacker/kernel"),
    "experts-internal": d.model_config(_experts_implementation_internal="attacker/kernel"),
    "kernels": d.model_config(use_kernels=True, kernel_config={"RMSNorm": "attacker/kernel:evil"}),
    "fusion": d.model_config(fusion_config={"evil": "evil.Evil"}),
    "custom-generate": custom_generate,
    "quant-method-a-path": d.quant(quant_method="../evil"),
    "quant-method-a-list": d.quant(quant_method=["bitdistiller"]),
    "activation-of-code": d.model_config(hidden_act=SYSTEM),
    "dtype-a-function": d.model_config(dtype="load"),
    "weights-in-the-parent": d.model_config(transformers_weights="../outside.safetensors"),
    "weights-in-the-root": d.model_config(transformers_weights="/etc/passwd"),
    "name-in-the-parent": d.model_config(_name_or_path="../outside", name_or_path="../outside"),
    "weights-by-a-link": link(WEIGHTS, "../outside.safetensors"),
    "layers-of-a-billion": d.model_config(num_hidden_layers=10**9),
    "layers-negative": d.model_config(num_hidden_layers=-1),
    "layer-types-of-a-million": d.model_config(layer_types=["full_attention"] * 10**6),
    "width-of-a-trillion": d.model_config(hidden_size=10**12),
    "width-negative": d.model_config(hidden_size=-64),
    "width-a-text": d.model_config(hidden_size="64"),
    "width-a-list": d.model_config(hidden_size=[64]),
    "vocabulary-of-2-to-62": d.model_config(vocab_size=2**62),
    "heads-of-a-billion": d.model_config(num_attention_heads=10**9),
    "head-of-a-trillion": d.model_config(head_dim=10**12),
    "mlp-of-a-quadrillion": d.model_config(intermediate_size=10**15),
    "positions-of-a-quadrillion": d.model_config(max_position_embeddings=10**15),
    "rope-beyond-numbers": d.on_bytes(
        lambda b: b.replace(b'"rms_norm_eps": 1e-06', b'"rms_norm_eps": 1e999'), d.CONFIG
    ),
    "section-nested-deep": d.on_bytes(
        lambda b: b.replace(b'"provenance": {', b'"provenance": {"x": ' + b"[" * 50_000 + b"]" * 50_000 + b","),
        d.CONFIG,
    ),
    "section-of-many-names": d.quant(modules_to_not_convert=["(a+)+$"] * 10**5),
}

SHARDS: dict[str, d.Damage] = {
    "shard-absolute": with_shard("{outside}"),
    "shard-in-the-parent": with_shard("../outside.safetensors"),
    "shard-deep-in-the-parent": with_shard("sub/../../outside.safetensors"),
    "shard-with-backslashes": with_shard("..\\outside.safetensors"),
    "shard-by-a-link": link(SHARD, "../outside.safetensors"),
    "shard-by-an-absolute-link": link(SHARD, "{outside}"),
    "shard-a-pickle": with_shard("pytorch_model.bin"),
    "shard-a-url": with_shard("https://attacker.example/model.safetensors"),
    "shard-with-a-null": with_shard("a\0b.safetensors"),
}


def test_there_are_as_many_attacks_as_promised() -> None:
    assert len(OURS) + len(OTHERS) + len(SHARDS) >= 40


@pytest.fixture
def lair(packed_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder with code beside the checkpoint, and files outside of it that would work if they were read."""
    folder = copy_of(packed_folder("llama"), tmp_path / "model")
    for place in (folder, tmp_path):
        (place / "evil.py").write_text(CANARY.format(path=str(tmp_path / "executed")), encoding="utf-8")
    tensors = load_file(folder / WEIGHTS)
    tensors["model.norm.weight"] *= 2
    save_file(tensors, tmp_path / "outside.safetensors", metadata={"format": "pt"})
    return folder


def attack(folder: Path, original: Path, *, must_refuse: type[Exception] | None) -> None:
    """Load, and look at what happened."""
    outside = folder.parent
    with watching(outside) as watch:
        try:
            model = load(folder)
        except Exception as error:  # noqa: BLE001  whose it is, is judged below
            model, refusal = None, error
        else:
            refusal = None
    if must_refuse is not None:
        assert isinstance(refusal, must_refuse), refusal
    if model is not None:
        assert logits(model).equal(logits(load(original)))
    assert not (outside / "executed").exists()
    assert "evil" not in sys.modules
    assert not watch.opened
    assert not watch.started
    assert watch.growth_mib < MAX_GROWTH_MIB + PARSED * (folder / d.CONFIG).stat().st_size / 2**20
    assert watch.seconds < MAX_SECONDS


@pytest.mark.parametrize("name", OURS)
def test_a_hostile_quantization_config_is_refused(lair: Path, packed_folder: Callable[..., Path], name: str) -> None:
    d.quant(**OURS[name])(lair)
    attack(lair, packed_folder("llama"), must_refuse=BitDistillerError)


@pytest.mark.parametrize("name", OTHERS)
def test_a_hostile_folder_has_no_effect(lair: Path, packed_folder: Callable[..., Path], name: str) -> None:
    OTHERS[name](lair)
    attack(lair, packed_folder("llama"), must_refuse=None)


@pytest.mark.parametrize("name", SHARDS)
def test_a_hostile_index_is_refused(packed_folder: Callable[..., Path], tmp_path: Path, name: str) -> None:
    original = packed_folder("llama", shards="20KB")
    folder = copy_of(original, tmp_path / "model")
    (tmp_path / "outside.safetensors").write_bytes((folder / SHARD).read_bytes())
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    SHARDS[name](folder)
    for file in folder.iterdir():
        if file.is_symlink() and "{outside}" in str(file.readlink()):
            file.unlink()
            file.symlink_to(tmp_path / "outside.safetensors")
    index = (folder / d.INDEX).read_text(encoding="utf-8")
    (folder / d.INDEX).write_text(index.replace("{outside}", str(tmp_path / "outside.safetensors")), encoding="utf-8")
    (folder / d.MANIFEST).unlink()
    attack(folder, original, must_refuse=BitDistillerError)


def test_the_watch_sees_a_file_that_is_opened_and_a_program_that_is_started(tmp_path: Path) -> None:
    import subprocess

    (tmp_path / "outside.safetensors").write_bytes(b"x")
    with watching(tmp_path) as watch:
        (tmp_path / "outside.safetensors").read_bytes()
        subprocess.run(["true"], check=True)
    assert watch.opened == ["outside.safetensors"]
    assert any(event.startswith("subprocess.Popen") for event in watch.started)
