"""A checkpoint that packing cannot have written is refused, the tensor named; nothing is lost where saving fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitdistiller_peft import BitDistillerQuantConfig
from bitdistiller_peft.errors import CheckpointError, ChecksumError, ConfigError
from bitdistiller_peft.hub import MANIFEST_NAME, checkpoint
from bitdistiller_peft.layers.inputs import INPUT_NORM
from tests.hub.models import WEIGHTS, Saved, copy_of, edit_config, edit_tensors, logits
from tests.tiny import load, save_base

GetSaved = Callable[..., Saved]
Edit = Callable[[torch.Tensor], torch.Tensor | None]

DOWN = "model.layers.1.mlp.down_proj.weight"  # 128 inputs: 2 bits in 8 words, 4 groups of 32
UNVERIFIED = pytest.mark.filterwarnings(f"ignore:{MANIFEST_NAME} is missing")


def damaged(original: Path, target: Path, changes: dict[str, Edit]) -> Path:
    """A copy whose tensors are edited and whose manifest is gone, so that the values themselves are judged."""
    folder = copy_of(original, target)
    tensors = load_file(folder / WEIGHTS)
    edit_tensors(folder, {name: edit(tensors[name].clone()) for name, edit in changes.items()})
    return folder


def drop(tensor: torch.Tensor) -> None:
    return None


def put(value: float) -> Edit:
    """Set one entry in the middle."""

    def edit(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[tensor.numel() // 2] = value
        return tensor

    return edit


def with_bit(position: int) -> Edit:
    """Set one bit of the last word of a row."""

    def edit(tensor: torch.Tensor) -> torch.Tensor:
        value = 1 << position
        tensor[..., 3, -1] |= value if value < 1 << 31 else value - (1 << 32)
        return tensor

    return edit


# ------------------------------------------------------------------------------------------------ missing, misshapen


@UNVERIFIED
@pytest.mark.parametrize("suffix", ["", "_scale", "_zero_point"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt", "qwen3-moe"])
def test_a_missing_tensor_is_named(saved: GetSaved, arch: str, suffix: str, tmp_path: Path) -> None:
    """G21: GPT-2 and OPT initialise missing weights by name, which must not come before the check."""
    original = saved(arch, group_size=-1)
    names = [n for n in load_file(original.folder / WEIGHTS) if n.endswith(f"_proj.weight{suffix}") and "exp" not in n]
    name = sorted(names)[-1]
    with pytest.raises(CheckpointError, match=rf"'{name}'.*missing"):
        load(damaged(original.folder, tmp_path / "model", {name: drop}))


@UNVERIFIED
@pytest.mark.parametrize("arch", ["llama", "opt", "qwen3-moe"])
def test_a_layer_of_which_nothing_is_there_is_named(saved: GetSaved, arch: str, tmp_path: Path) -> None:
    original = saved(arch, group_size=-1)
    names = [n for n in load_file(original.folder / WEIGHTS) if "layers.1.self_attn.q_proj.weight" in n]
    assert len(names) == 3
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_proj\.weight.*missing"):
        load(damaged(original.folder, tmp_path / "model", dict.fromkeys(names, drop)))


@UNVERIFIED
@pytest.mark.parametrize("arch", ["qwen2", "gpt2", "opt"])
def test_a_missing_bias_of_a_packed_layer_is_named(saved: GetSaved, arch: str, tmp_path: Path) -> None:
    original = saved(arch, group_size=-1)
    name = sorted(n for n in load_file(original.folder / WEIGHTS) if n.endswith("_proj.bias"))[-1]
    with pytest.raises(CheckpointError, match=rf"'{name}'.*missing"):
        load(damaged(original.folder, tmp_path / "model", {name: drop}))


@UNVERIFIED
@pytest.mark.parametrize("suffix", ["", "_scale", "_zero_point"])
def test_a_missing_expert_stops_the_load(saved: GetSaved, suffix: str, tmp_path: Path) -> None:
    """transformers stacks what is there, and then sees three experts where the model has four."""
    name = f"model.layers.1.block_sparse_moe.experts.2.w2.weight{suffix}"
    with pytest.raises(RuntimeError, match="mismatched_sizes"):
        load(damaged(saved("mixtral").folder, tmp_path / "model", {name: drop}))


def to(dtype: torch.dtype) -> Edit:
    return lambda tensor: tensor.to(dtype)


@UNVERIFIED
@pytest.mark.parametrize(
    ("suffix", "edit"),
    [
        ("", lambda t: t[:, :-1].contiguous()),
        ("", lambda t: t[:-1].contiguous()),
        ("", lambda t: t.T.contiguous()),
        ("", lambda t: t.reshape(-1)),
        ("", to(torch.int64)),
        ("", to(torch.float32)),
        ("", to(torch.uint8)),
        ("_scale", lambda t: t[:, :2].contiguous()),
        ("_scale", lambda t: t.unsqueeze(0).contiguous()),
        ("_scale", to(torch.float32)),
        ("_scale", to(torch.bfloat16)),
        ("_scale", to(torch.int16)),
        ("_zero_point", to(torch.uint8)),
        ("_zero_point", lambda t: t.repeat(1, 2)),
    ],
    ids=range(14),
)
def test_another_shape_or_dtype_is_refused_and_named(saved: GetSaved, suffix: str, edit: Edit, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"tensor '{DOWN}{suffix}' in {WEIGHTS} must have shape .* and dtype"):
        load(damaged(saved("llama").folder, tmp_path / "model", {DOWN + suffix: edit}))


# ----------------------------------------------------------------------------------------------------------- values


@UNVERIFIED
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0.0, -0.0, 1e-7])
def test_a_scale_that_no_packing_stores_is_refused(saved: GetSaved, value: float, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"^tensor '{DOWN}' in {WEIGHTS} must hold what packing writes: the"):
        load(damaged(saved("llama").folder, tmp_path / "model", {f"{DOWN}_scale": put(value)}))


@UNVERIFIED
def test_a_scale_of_zero_stands_for_an_absent_sign_where_a_grid_has_two(saved: GetSaved, tmp_path: Path) -> None:
    original = saved("llama", grid="nf").folder
    model = load(damaged(original, tmp_path / "zero", {f"{DOWN}_scale_negative": put(0.0)}))
    assert logits(model).isfinite().all()
    with pytest.raises(CheckpointError, match=rf"'{DOWN}'"):
        load(damaged(original, tmp_path / "negative", {f"{DOWN}_scale_negative": put(-1.0)}))


@UNVERIFIED
def test_a_residual_scale_may_be_zero_or_subnormal_but_not_negative_or_infinite(
    saved: GetSaved, tmp_path: Path
) -> None:
    original = saved("llama", grid="r2q").folder
    for number, value in enumerate((0.0, 1e-7)):
        model = load(damaged(original, tmp_path / f"small-{number}", {f"{DOWN}_scale_residual": put(value)}))
        assert logits(model).isfinite().all()
    for number, value in enumerate((-1.0, float("nan"), float("inf"))):
        with pytest.raises(CheckpointError, match=rf"^tensor '{DOWN}' in {WEIGHTS} must hold what packing writes: the"):
            load(damaged(original, tmp_path / f"bad-{number}", {f"{DOWN}_scale_residual": put(value)}))


@UNVERIFIED
@pytest.mark.parametrize(
    ("settings", "spare"),
    [({"grid": "ternary"}, 3), ({"grid": "fp", "bits": 3}, 7), ({"grid": "fp_sym", "bits": 4}, 15)],
)
def test_a_code_that_stands_for_nothing_is_refused(
    saved: GetSaved, settings: dict[str, Any], spare: int, tmp_path: Path
) -> None:
    original = saved("llama", **settings).folder

    def with_spare_code(words: torch.Tensor) -> torch.Tensor:
        words = words.clone()
        words[-1, 0] |= spare  # all bits of the first code of the last row
        return words

    with pytest.raises(CheckpointError, match=rf"^tensor '{DOWN}' in {WEIGHTS} must hold .*: got {spare}\."):
        load(damaged(original, tmp_path / "model", {DOWN: with_spare_code}))


@UNVERIFIED
@pytest.mark.parametrize(
    ("suffix", "settings", "position"),
    [
        ("", {"group_size": 43}, 24),  # 172 codes of 2 bits: 10 words and 24 bits
        ("", {"group_size": 43}, 31),
        ("", {"bits": 3, "group_size": -1}, 4),  # 172 codes of 3 bits: 16 words and 4 bits
        ("_zero_point", {"group_size": 43}, 8),  # 4 zero points of 2 bits
        ("_zero_point", {"group_size": -1}, 2),
        ("_zero_point", {"bits": 3, "group_size": 43}, 12),
    ],
    ids=str,
)
def test_a_set_bit_behind_the_last_code_is_refused(
    saved: GetSaved, suffix: str, settings: dict[str, Any], position: int, tmp_path: Path
) -> None:
    own = {key: value for key, value in settings.items() if key == "bits"}
    original = saved("llama-172", group_size=32, overrides={"down_proj": settings}, **own).folder
    with pytest.raises(CheckpointError, match=rf"^tensor '{DOWN}' in {WEIGHTS} must hold .* unused bits .* must be 0"):
        load(damaged(original, tmp_path / "model", {DOWN + suffix: with_bit(position)}))


@UNVERIFIED
def test_the_last_bit_that_belongs_to_a_code_may_be_set(saved: GetSaved, tmp_path: Path) -> None:
    original = saved("llama-172", group_size=32, overrides={"down_proj": {"group_size": 43}}).folder
    assert load(damaged(original, tmp_path / "model", {DOWN: with_bit(23), f"{DOWN}_zero_point": with_bit(7)}))


@UNVERIFIED
@pytest.mark.parametrize("arch", ["mixtral", "qwen3-moe"])
def test_experts_are_judged_by_their_values_too(saved: GetSaved, arch: str, tmp_path: Path) -> None:
    original = saved(arch).folder
    name = sorted(
        n
        for n in load_file(original / WEIGHTS)
        if ("layers.1." in n and ".experts.3.w2.weight_scale" in n)
        or ("layers.1." in n and ".experts.3.down_proj.weight_scale" in n)
    )[0]
    with pytest.raises(CheckpointError, match=r"'model\.layers\.1\.mlp\.experts\.down_proj' must hold what packing"):
        load(damaged(original, tmp_path / "model", {name: put(float("nan"))}))


# ------------------------------------------------------------------------------------------ config and weights together


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ({}, {"bits": 3}),
        ({}, {"bits": 4}),
        ({}, {"group_size": 64}),
        ({}, {"group_size": -1}),
        ({}, {"grid": "int_sym"}),
        ({}, {"grid": "nf"}),
        ({}, {"scale_dtype": "float32"}),
        ({}, {"scale_dtype": "bfloat16"}),
        ({"grid": "int_sym"}, {"grid": "int"}),
        ({"grid": "nf"}, {"grid": "nf_sym"}),
        ({"grid": "nf"}, {"grid": "int_sym"}),
        ({}, {"grid": "r2q"}),
        ({"grid": "r2q"}, {"grid": "ternary"}),
        ({"grid": "r2q"}, {"tied": True}),
        ({"grid": "int_sym"}, {"grid": "r2q"}),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_the_weights_is_refused(
    saved: GetSaved, settings: dict[str, Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    folder = copy_of(saved("llama", **settings).folder, tmp_path / "model")
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=r"do not belong together|must hold tensor .* missing"):
        load(folder)


def test_packed_is_not_read_as_latent_nor_latent_as_packed(saved: GetSaved, bases: Path, tmp_path: Path) -> None:
    folder = copy_of(saved("llama").folder, tmp_path / "packed")
    edit_config(folder, state="latent")
    with pytest.raises(CheckpointError, match="do not belong together"):
        load(folder)
    latent = BitDistillerQuantConfig(group_size=32, state="latent")
    load(save_base("llama", bases), quantization_config=latent).save_pretrained(tmp_path / "latent")
    edit_config(tmp_path / "latent", state="packed")
    with pytest.raises(CheckpointError, match="do not belong together"):
        load(tmp_path / "latent")


@pytest.mark.parametrize("names", [["lm_head", "model.layers.1.mlp.down_proj"], []], ids=["too many", "too few"])
def test_a_list_of_names_that_does_not_fit_the_weights_is_refused(
    saved: GetSaved, names: list[str], tmp_path: Path
) -> None:
    folder = copy_of(saved("llama").folder, tmp_path / "model")
    edit_config(folder, modules_to_not_convert=names)
    with pytest.raises((CheckpointError, RuntimeError), match=r"mismatched_sizes|do not belong together"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surprise": 1}, "got quantization_config='surprise'"),
        ({"verify": "none"}, "got quantization_config='verify'"),
        ({"bit": 2}, "Did you mean 'bits'"),
        ({"bits": "2"}, "`bits` must be an integer"),
        ({"bits": 5}, "`bits` must be one of"),
        ({"bits": True}, "`bits` must be an integer"),
        ({"group_size": 0}, "`group_size` must be"),
        ({"group_size": 48}, r"layer 'model\.layers\.0.*`group_size` must divide the input width"),
        ({"grid": "os.system"}, "`grid` must be one of"),
        ({"grid": ["int"]}, "`grid` must be"),
        ({"scale_dtype": "torch.float16"}, "`scale_dtype` must be one of"),
        ({"format_version": 2}, "`format_version` must be at most 1"),
        ({"format_version": "1"}, "`format_version` must be at most 1"),
        ({"state": "merged"}, "`state` must be one of"),
        ({"packing": "tight"}, "`packing` must be one of"),
        ({"modules_to_not_convert": "lm_head"}, "`modules_to_not_convert` must be a list"),
        ({"overrides": {"model.layers.0": {"cls": "os.system"}}}, "got overrides"),
        ({"overrides": ["bits"]}, "`overrides` must be a dict"),
        ({"overrides": {"model.layers.0": 2}}, "`overrides` must map"),
        ({"zero_point_range": "12"}, "`zero_point_range` must be two integers"),
        ({"zero_point_range": 1}, "`zero_point_range` must be two integers"),
        ({"learn_scale": 1}, "`learn_scale` must be true or false"),
        ({"gradient": "none"}, "`gradient` must be one of"),
        ({"provenance": {"loader": ["os.system"]}}, "`provenance` must hold plain values"),
        ({"provenance": "x"}, "`provenance` must be a dict"),
        ({"install": 3}, "`install` must be text"),
    ],
    ids=str,
)
def test_a_config_that_is_not_ours_to_the_letter_is_refused(
    saved: GetSaved, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = copy_of(saved("llama").folder, tmp_path / "model")
    edit_config(folder, **changes)
    with pytest.raises(ConfigError, match=message):
        load(folder)


@UNVERIFIED
def test_an_index_cannot_reach_outside_its_folder(saved: GetSaved, tmp_path: Path) -> None:
    load(saved("llama").folder).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    (tmp_path / "model" / "model-00001-of-00004.safetensors").rename(tmp_path / "outside.safetensors")
    index = tmp_path / "model" / "model.safetensors.index.json"
    content = index.read_text(encoding="utf-8").replace("model-00001-of-00004", "../outside")
    index.write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"must name a \.safetensors file in its own folder.*got '\.\./outside"):
        load(tmp_path / "model")


# ----------------------------------------------------------------------------------------------------------- saving


def test_a_folder_that_cannot_be_written_is_refused_once_and_nothing_is_lost(saved: GetSaved, tmp_path: Path) -> None:
    original = saved("llama")
    file = tmp_path / "notes.txt"
    file.write_text("mine", encoding="utf-8")
    for target in (file, file / "model", str(file)):
        with pytest.raises(CheckpointError, match=r"^`save_directory` must be a folder that can be written to: got"):
            original.model.save_pretrained(target)
    assert file.read_text(encoding="utf-8") == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert torch.equal(logits(original.model), original.logits)
    original.model.save_pretrained(tmp_path / "model")
    assert torch.equal(logits(load(tmp_path / "model")), original.logits)


# -------------------------------------------------------------------------------------------------------- from the Hub


@pytest.mark.parametrize("inside", ["", "two/deep"])
def test_a_models_manifest_is_fetched_from_the_hub_to_its_weights(
    saved: GetSaved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    """`from_pretrained` fetches weights into a snapshot; the manifest is asked for by the name that the cache has."""
    folder = copy_of(
        saved("llama").folder, tmp_path / "hub" / "models--some-one--a-model" / "snapshots" / "c0ffee" / inside
    )
    manifest = (folder / MANIFEST_NAME).read_bytes()
    (folder / MANIFEST_NAME).unlink()
    asked: list[tuple[object, ...]] = []

    def download(repo: str, name: str, **where: object) -> None:
        asked.append((repo, name, where))
        (folder / MANIFEST_NAME).write_bytes(manifest)

    monkeypatch.setattr(checkpoint, "hf_hub_download", download)
    for _ in range(2):  # the second time it is there
        checkpoint.check_files([str(folder / WEIGHTS)], "some-one/a-model", "fast")
    where = {"subfolder": inside or None, "revision": "c0ffee", "cache_dir": tmp_path / "hub"}
    assert asked == [("some-one/a-model", MANIFEST_NAME, where)]


def test_a_manifest_that_the_hub_does_not_have_is_missed(
    saved: GetSaved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of(saved("llama").folder, tmp_path / "models--me--model" / "snapshots" / "c0ffee")
    (folder / MANIFEST_NAME).unlink()

    def download(*args: object, **where: object) -> None:
        raise OSError("no such file")

    monkeypatch.setattr(checkpoint, "hf_hub_download", download)
    with pytest.warns(UserWarning, match=f"{MANIFEST_NAME} is missing beside {WEIGHTS}"):
        checkpoint.check_files([str(folder / WEIGHTS)], "me/model", "fast")


def test_without_verification_nothing_is_compared_and_that_is_said(saved: GetSaved, tmp_path: Path) -> None:
    folder = copy_of(saved("llama").folder, tmp_path / "model")
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(ChecksumError):
        checkpoint.check_files([str(folder / WEIGHTS)], str(folder), "fast")
    with pytest.warns(UserWarning, match="without verification") as said:
        checkpoint.check_files([str(folder / WEIGHTS)], str(folder), "none")
    assert len(said) == 1


@UNVERIFIED
def test_gains_that_the_config_knows_nothing_of_are_refused(saved: GetSaved, tmp_path: Path) -> None:
    folder = copy_of(saved("llama").folder, tmp_path / "model")
    (folder / MANIFEST_NAME).unlink()
    tensors = load_file(folder / WEIGHTS)
    name = DOWN.replace("weight", f"{INPUT_NORM}.weight")
    save_file(tensors | {name: torch.ones(128)}, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"must not hold tensor '{name}': config.json gives .* no SubLN"):
        load(folder)
