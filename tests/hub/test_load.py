"""A packed checkpoint loads the same by every road: dtypes, device maps, shards, heads, and without the plug-in not."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from bitdistiller_peft import BitDistillerConfig, BitDistillerQuantConfig, get_bitdistiller_model
from bitdistiller_peft.errors import TargetError
from bitdistiller_peft.hub.convert import default_skips
from bitdistiller_peft.layers import SUFFIXES, PackedLinear, iter_quantized
from tests.hub.models import (
    WEIGHTS,
    Saved,
    assert_same_state,
    logits,
    make_student,
    packed_modules,
    run_python,
)
from tests.tiny import CONFIGS, MOE, load, save_base, token_ids

GetSaved = Callable[..., Saved]
TIED = ("llama-tied", "gpt2", "gemma2")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def disk_map(model: nn.Module) -> dict[str, str]:
    """A device map that puts the second layer on disk and the rest in memory."""

    def place(name: str, module: nn.Module) -> dict[str, str]:
        if isinstance(module, nn.ModuleList):
            return {f"{name}.{i}": "disk" if i == 1 else "cpu" for i in range(len(module))}
        if any(isinstance(child, nn.ModuleList) for child in module.modules()):
            return {k: v for key, child in module.named_children() for k, v in place(f"{name}.{key}", child).items()}
        return {name: "cpu"}

    return {k: v for name, child in model.named_children() for k, v in place(name, child).items()}


# ------------------------------------------------------------------------------------------------- dtypes and devices


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dtype_asked_for_reaches_the_rest_and_never_codes_or_scales(
    saved: GetSaved, dtype: torch.dtype, scale_dtype: str
) -> None:
    """G29: scales keep the dtype that they were stored in, whatever `dtype=` says."""
    original = saved("llama", scale_dtype=scale_dtype)
    model = load(original.folder, dtype=dtype)
    assert model.model.embed_tokens.weight.dtype == model.dtype == dtype
    expected = original.model.state_dict()
    for name, tensor in model.state_dict().items():
        if name.partition(".weight")[2] in SUFFIXES or expected[name].dtype == torch.int32:
            assert tensor.dtype == expected[name].dtype
            assert torch.equal(tensor, expected[name])
    assert logits(model).dtype == dtype


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral"])
def test_moving_a_packed_model_to_bf16_moves_the_rest_and_leaves_codes_and_scales(saved: GetSaved, arch: str) -> None:
    """G29: `.to(torch.bfloat16)` is the same as loading in bf16."""
    original = saved(arch)
    moved = copy.deepcopy(original.model).to(torch.bfloat16)
    assert_same_state(moved, load(original.folder, dtype=torch.bfloat16))
    assert logits(moved).dtype == torch.bfloat16
    for name in ("half", "float"):
        with pytest.raises(ValueError, match="not supported for quantized model"):
            getattr(moved, name)()


def test_a_copy_answers_and_saves_like_its_original_and_is_independent(saved: GetSaved, tmp_path: Path) -> None:
    original = saved("llama")
    twin = copy.deepcopy(original.model)
    assert torch.equal(logits(twin), original.logits)
    with torch.no_grad():
        twin.model.norm.weight.zero_()
    assert torch.equal(logits(original.model), original.logits)
    twin.save_pretrained(tmp_path / "twin")
    assert sorted(f.name for f in (tmp_path / "twin").iterdir()) == sorted(f.name for f in original.folder.iterdir())
    assert not load(tmp_path / "twin").model.norm.weight.any(), "the copy saved its original"


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto", "cpu"], ids=str)
@pytest.mark.parametrize("arch", ["llama", "llama-tied", "mixtral"])
def test_a_device_map_changes_nothing(saved: GetSaved, arch: str, device_map: object) -> None:
    original = saved(arch)
    model = load(original.folder, device_map=device_map)
    assert_same_state(model, original.model)
    assert torch.equal(logits(model), original.logits)


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("arch", CONFIGS)
def test_weights_on_disk_give_equal_logits_and_save_again(saved: GetSaved, arch: str, tmp_path: Path) -> None:
    """G22: packed tensors are parameters, so they are offloaded; G21: what is offloaded is not initialised."""
    original = saved(arch, group_size=-1)
    model = load(original.folder, device_map=disk_map(original.model), offload_folder=tmp_path / "offload")
    offloaded = [p for module in packed_modules(model) for p in module.parameters(recurse=False) if p.is_meta]
    assert len(offloaded) * 2 == sum(len(list(m.parameters(recurse=False))) for m in packed_modules(model))
    assert torch.equal(logits(model), original.logits)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (original.folder / WEIGHTS).read_bytes()
    assert torch.equal(logits(load(tmp_path / "again")), original.logits)


# ------------------------------------------------------------------------------------------- files, heads, prefixes


@pytest.mark.parametrize("arch", ["llama", "llama-tied", "gpt2", "mixtral", "qwen3-moe"])
def test_shards_and_saving_again_keep_every_bit(saved: GetSaved, arch: str, tmp_path: Path) -> None:
    """G28: what a loaded model saves has the names and bits of what it was loaded from."""
    original = saved(arch, group_size=-1)
    model = load(original.folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    sharded = load(tmp_path / "shards")
    assert_same_state(sharded, original.model)
    assert torch.equal(logits(sharded), original.logits)
    sharded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (original.folder / WEIGHTS).read_bytes()


def test_fused_names_on_disk_load_too(saved: GetSaved, tmp_path: Path) -> None:
    """G28: `save_original_format=False` writes the experts as the model holds them."""
    original = saved("mixtral")
    load(original.folder).save_pretrained(tmp_path, save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj_scale" in load_file(tmp_path / WEIGHTS)
    assert torch.equal(logits(load(tmp_path)), original.logits)


@pytest.mark.parametrize("arch", TIED)
def test_tied_embeddings_stay_tied_and_full_precision(saved: GetSaved, arch: str) -> None:
    original = saved(arch)
    model = load(original.folder)
    head = model.get_output_embeddings().weight
    assert head is model.get_input_embeddings().weight
    assert head.dtype == torch.float32
    assert "lm_head.weight" not in load_file(original.folder / WEIGHTS)
    assert torch.equal(logits(model), original.logits)


@pytest.mark.parametrize("arch", ["llama", "llama-tied", "gpt2", "opt", "mixtral"])
def test_the_model_without_its_head_loads_saves_and_loads(saved: GetSaved, arch: str, tmp_path: Path) -> None:
    """The names lose the base model's prefix; the config's lists of names still mean the same modules."""
    original = saved(arch, overrides={"layers.1.mlp.down_proj": {"bits": 4}})
    ids = token_ids()
    with torch.no_grad():
        expected = original.model.base_model(input_ids=ids).last_hidden_state
        headless = AutoModel.from_pretrained(original.folder).eval()
        assert torch.equal(headless(input_ids=ids).last_hidden_state, expected)
        headless.save_pretrained(tmp_path)
        again = AutoModel.from_pretrained(tmp_path).eval()
        assert torch.equal(again(input_ids=ids).last_hidden_state, expected)
        assert torch.equal(load(tmp_path).base_model(input_ids=ids).last_hidden_state, expected)


@pytest.mark.parametrize("arch", MOE)
@pytest.mark.parametrize("grid", ["int", "nf"])
@pytest.mark.parametrize("on_the_fly", [False, True], ids=["packed", "on the fly"])
def test_experts_have_their_standard_names_on_disk(
    saved: GetSaved, bases: Path, arch: str, grid: str, on_the_fly: bool, tmp_path: Path
) -> None:
    """G28: one I32 weight per expert, its companions beside it, and nothing fused."""
    folder = tmp_path
    if on_the_fly:
        config = BitDistillerQuantConfig(grid=grid, group_size=32)
        load(save_base(arch, bases), quantization_config=config).save_pretrained(folder)
    else:
        folder = saved(arch, grid=grid).folder
    found = {name: tensor.dtype for name, tensor in load_file(folder / WEIGHTS).items() if ".experts." in name}
    standard = {name for name in load_file(save_base(arch, bases) / WEIGHTS) if ".experts." in name}
    other = {"_zero_point": torch.int32} if grid == "int" else {"_scale_negative": torch.float16}
    expected = {"": torch.int32, "_scale": torch.float16, **other}
    assert found == {name + suffix: dtype for name in standard for suffix, dtype in expected.items()}
    assert len(standard) == 2 * 4 * 3


# ------------------------------------------------------------------------------------------- what a loaded model is


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("on_the_fly", [False, True], ids=["packed", "on the fly"])
def test_packed_tensors_are_frozen_parameters(saved: GetSaved, bases: Path, arch: str, on_the_fly: bool) -> None:
    """G4: the loader makes floating tensors trainable, and scales must not be. G5: no property hides the codes."""
    config = BitDistillerQuantConfig(group_size=32)
    model = load(save_base(arch, bases), quantization_config=config) if on_the_fly else load(saved(arch).folder)
    logits(model)
    for _, module, name, _ in iter_quantized(model):
        for suffix in ("", "_scale", "_zero_point"):
            tensor = getattr(module, name + suffix)
            assert tensor is module._parameters[name + suffix]
            assert not tensor.requires_grad
        assert getattr(module, name).dtype == torch.int32
    assert model.model.embed_tokens.weight.requires_grad if arch == "llama" else True


def test_generation_is_greedy_alike_with_and_without_a_cache(saved: GetSaved) -> None:
    original = saved("llama")
    model = load(original.folder)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    tokens = model.generate(token_ids(), **settings)
    assert tokens.shape == (2, 21)
    assert torch.equal(tokens, model.generate(token_ids(), use_cache=False, **settings))
    assert torch.equal(tokens, original.model.generate(token_ids(), **settings))


def test_another_methods_config_is_refused_and_our_own_may_only_say_how_to_verify(saved: GetSaved) -> None:
    """G31: what the checkpoint says about itself wins, and the user is told."""
    folder = saved("llama").folder
    with pytest.raises(ValueError, match="passing a BitsAndBytesConfig"):
        load(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = load(folder, quantization_config=BitDistillerQuantConfig(bits=4, verify="full"))
    assert (model.config.quantization_config.bits, model.config.quantization_config.verify) == (2, "full")


def test_preparing_a_model_warns_of_nothing_of_ours(bases: Path) -> None:
    """G18: PEFT reads a name that transformers deprecates; nothing else may be said."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_student("llama", bases, steps=0)
    assert not [w for w in caught if not ("site-packages" in w.filename and issubclass(w.category, FutureWarning))]


# ------------------------------------------------------------------------------------------- quantizing while loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", CONFIGS)
def test_quantizing_while_loading_gives_the_codes_of_preparing_and_packing(
    bases: Path, arch: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """G26: no key of the checkpoint is missing or left over. G27: the result saves. G33: Conv1D is transposed."""
    config = BitDistillerQuantConfig(bits=3, group_size=-1)
    model, info = AutoModelForCausalLM.from_pretrained(
        save_base(arch, bases, dtype=dtype), quantization_config=config, output_loading_info=True
    )
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert set(info["missing_keys"]) <= {"lm_head.weight"}, "only a tied head is not on disk"
    prepared = make_student(arch, bases, dtype=dtype, bits=3, group_size=-1, steps=0)
    packed = prepared.pack_and_unload(progressbar=False)
    assert_same_state(model, packed)
    assert (
        model.config.quantization_config.modules_to_not_convert
        == packed.config.quantization_config.modules_to_not_convert
    )
    model.save_pretrained(tmp_path)
    assert_same_state(load(tmp_path), packed)
    assert torch.equal(logits(load(tmp_path)), logits(packed))


@pytest.mark.parametrize("state", ["packed", "latent"])
def test_a_weight_that_cannot_be_quantized_stops_the_load_and_is_named(
    bases: Path, state: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers collects what conversions raise into a report in its log, and then raises an error of its own."""
    model = load(save_base("llama", bases))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with pytest.raises(RuntimeError, match="issues during automatic conversion"):
        load(tmp_path, quantization_config=BitDistillerQuantConfig(group_size=32, state=state))
    assert "WeightError: In tensor 'model.layers.1.mlp.up_proj.weight': the weight must be finite" in caplog.text


@pytest.mark.parametrize("arch", ["llama", "llama-tied", "gpt2", "mixtral"])
def test_names_to_leave_alone_are_added_to_the_tied_ones_and_stored_in_full(
    bases: Path, arch: str, tmp_path: Path
) -> None:
    """G23: a user's list keeps tied names. G25: an ending means every module with it. G34: names are modules' own."""
    ending = "c_proj" if arch == "gpt2" else "o_proj"
    config = BitDistillerQuantConfig(group_size=32, modules_to_not_convert=[ending])
    model = load(save_base(arch, bases), quantization_config=config)
    stored = model.config.quantization_config.modules_to_not_convert
    linear = {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert stored == sorted(stored)
    assert ("lm_head" in stored) == (arch in TIED)
    assert ("lm_head" in linear) == (arch not in TIED)
    assert {name for name in stored if name.endswith(ending)}
    assert not {name for name in linear if name.endswith(ending)}
    assert set(stored) <= {name for name, _ in model.named_modules()}, "only complete names of modules"
    model.save_pretrained(tmp_path)
    assert_same_state(load(tmp_path), model)


def test_leaving_everything_alone_is_refused(bases: Path) -> None:
    with pytest.raises(TargetError, match="must leave something to quantize"):
        load(
            save_base("llama", bases),
            quantization_config=BitDistillerQuantConfig(group_size=32, modules_to_not_convert=["model", "lm_head"]),
        )


def test_classification_heads_stay_in_full_precision(tmp_path: Path) -> None:
    """G24: transformers' own list names `classifier.bias`, which leaves the classifier to be quantized."""
    bert = BertConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, num_labels=3
    )
    BertForSequenceClassification(bert).save_pretrained(tmp_path / "bert")
    LlamaForSequenceClassification(CONFIGS["llama"]()).save_pretrained(tmp_path / "llama")
    for name, head in (("bert", "classifier"), ("llama", "score")):
        model = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / name, quantization_config=BitDistillerQuantConfig(group_size=32)
        )
        assert not isinstance(getattr(model, head), PackedLinear)
        assert model.config.quantization_config.modules_to_not_convert == [head]
        assert packed_modules(model)


def test_modules_that_transformers_keeps_in_fp32_stay_as_they_are(tmp_path: Path) -> None:
    """G30: T5 keeps `wo` in fp32 and casts what goes into it to its weight's dtype, which must not be int32."""
    config = T5Config(vocab_size=96, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    settings = {"bits": 8, "group_size": 32, "scale_dtype": "float32"}

    def answer(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=token_ids(), decoder_input_ids=token_ids()).logits

    base = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    assert len([name for name in default_skips(base) if name.endswith(".wo")]) == 2
    full_precision = answer(base)
    student = get_bitdistiller_model(base, BitDistillerConfig(**settings)).eval()
    trained = answer(student)
    torch.testing.assert_close(trained, full_precision, atol=0.1, rtol=0)
    assert torch.equal(answer(student.pack_and_unload(progressbar=False)), trained)
    # asked for by name all the same: scales keep their dtype, and a wrong answer is refused
    forced = BitDistillerQuantConfig(**{**settings, "scale_dtype": "float16"}, modules_to_not_convert=[])
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base", quantization_config=forced)
    model.to(torch.float16).save_pretrained(tmp_path / "forced")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "forced", dtype=torch.float16)
    assert {m.weight_scale.dtype for m in packed_modules(again)} == {torch.float16}
    with pytest.raises(TargetError, match=r"must be floating point: got torch\.int32.*exclude_modules"):
        answer(again)


# ------------------------------------------------------------------------------------------------- without the plug-in

WITHOUT = """
import json, sys
from transformers import AutoModel, AutoModelForCausalLM

outcome = {}
for folder in json.load(sys.stdin):
    for auto in (AutoModelForCausalLM, AutoModel):
        try:
            auto.from_pretrained(folder)
        except Exception as error:
            outcome[folder + " " + auto.__name__] = type(error).__name__
        else:
            outcome[folder + " " + auto.__name__] = "loaded"
assert not [name for name in sys.modules if name.startswith("bitdistiller")]
print(json.dumps(outcome))
"""


def test_without_the_plug_in_no_load_succeeds_and_the_way_to_get_it_is_in_the_folder(
    saved: GetSaved, tmp_path: Path
) -> None:
    cases = [saved("llama", bits=bits, group_size=-1) for bits in (2, 3, 4, 8)]
    cases += [saved(arch, group_size=-1) for arch in ("llama-tied", "gpt2", "opt", "gemma3", "mixtral", "qwen3-moe")]
    cases += [saved("llama", grid="nf"), saved("llama", group_size="tensor")]
    folders = [case.folder for case in cases]
    load(folders[0]).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    folders.append(tmp_path / "shards")
    child = run_python(WITHOUT, stdin=json.dumps([str(folder) for folder in folders]))
    assert child.returncode == 0, child.stderr[-2000:]
    outcome = json.loads(child.stdout.splitlines()[-1])
    assert len(outcome) == 2 * len(folders)
    assert not [name for name, result in outcome.items() if result == "loaded"]
    for folder in folders:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        assert "pip install bitdistiller_peft" in config["install"]
        assert "import bitdistiller_peft" in config["install"]
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert "pip install bitdistiller_peft" in card
        assert "import bitdistiller_peft" in card
