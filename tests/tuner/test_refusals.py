"""What cannot work is refused with one error that says where, why and what to do, and the model stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
)
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig

from bitdistiller_peft import BitDistillerConfig, BitDistillerQuantConfig, get_bitdistiller_model
from bitdistiller_peft.errors import (
    BitDistillerError,
    ConfigError,
    GroupSizeError,
    ScaleRangeError,
    StateError,
    TargetError,
    UnknownNameError,
    WeightError,
)
from tests.tiny import CONFIGS, config_of, load, token_ids
from tests.tuner.common import MLP, Bases, config_for, logits, overlays, train, trainable, unchanged

# ------------------------------------------------------------------------------------------------- settings

BAD_SETTINGS = [
    ({"bits": 5}, ConfigError, r"`bits` must be one of \[2, 3, 4, 8\] for grid='int': got bits=5"),
    ({"bits": 1}, ConfigError, r"`bits` must be one of .*: got bits=1\. Use bits=2"),
    ({"bits": "2"}, ConfigError, r"`bits` must be an integer: got bits='2'"),
    ({"bits": True}, ConfigError, r"`bits` must be an integer: got bits=True"),
    ({"bits": 8, "grid": "nf"}, ConfigError, r"`bits` must be one of \[2, 3, 4\] for grid='nf': got bits=8"),
    ({"grid": "nf33"}, UnknownNameError, r"`grid` must be one of .*: got grid='nf33'"),
    ({"grid": "int_symm"}, UnknownNameError, r"got grid='int_symm'\. Did you mean 'int_sym'\?"),
    ({"group_size": 0}, ConfigError, r"`group_size` must be .*: got group_size=0\. Use 64 or 128"),
    ({"group_size": -2}, ConfigError, r"got group_size=-2"),
    ({"group_size": 64.0}, ConfigError, r"got group_size=64\.0"),
    ({"group_size": True}, ConfigError, r"got group_size=True"),
    ({"group_size": "row"}, ConfigError, r"-1 \(one group per output row\) or 'tensor': got group_size='row'"),
    ({"scale_dtype": "fp16"}, ConfigError, r"`scale_dtype` must be one of .*: got scale_dtype='fp16'"),
    ({"scale_dtype": torch.float16}, ConfigError, r"got scale_dtype=torch\.float16"),
    ({"gradient": "lsq"}, ConfigError, r"`gradient` must be one of \['exact', 'ste'\]: got gradient='lsq'"),
    ({"master_dtype": "float23"}, UnknownNameError, r"got master_dtype='float23'\. Did you mean 'float32'\?"),
    ({"train_other": "norm"}, UnknownNameError, r"got train_other='norm'\. Did you mean 'norms'\?"),
    ({"learn_scale": "no"}, ConfigError, r"`learn_scale` must be True or False: got learn_scale='no'"),
    ({"learn_zero_point": 1}, ConfigError, r"`learn_zero_point` must be True or False: got learn_zero_point=1"),
    ({"learn_zero_point": True, "learn_scale": False}, ConfigError, r"must come with `learn_scale`.*Set learn_scale=T"),
    (
        {"learn_zero_point": True, "grid": "nf"},
        ConfigError,
        r"grid without zero points: got grid='nf'\. Use grid='int'",
    ),
    ({"zero_point_range": (0, 4)}, ConfigError, r"within 0\.\.3: got zero_point_range=\[0, 4\]\. Use \(1, 2\)"),
    ({"zero_point_range": (2, 1)}, ConfigError, r"two integers \(low, high\)"),
    (
        {"zero_point_range": (1, 2), "grid": "int_sym"},
        ConfigError,
        r"must be None for a grid without integer zero points",
    ),
    ({"overrides": {"q_proj": 4}}, ConfigError, r"`overrides` must map a name to a dict"),
    ({"overrides": {"q_proj": {"bit": 4}}}, UnknownNameError, r"overrides\['q_proj'\].*'bit'.*Did you mean 'bits'\?"),
    ({"overrides": {"q_proj": {"bits": 7}}}, ConfigError, r"`bits` must be one of .*: got bits=7"),
    ({"overrides": {"q_proj": {"learn_scale": False}}}, UnknownNameError, r"'learn_scale'"),
    ({"overrides": {"(q_proj": {"bits": 4}}}, ConfigError, r"regular expressions as keys: got '\(q_proj'.*Use e\.g\."),
    ({"overrides": {1: {"bits": 4}}}, ConfigError, r"`overrides` must have text keys: got 1"),
    ({"target_parameters": ["experts.down_proj"]}, ConfigError, r"`target_parameters` must be None.*experts module in"),
    ({"layers_pattern": "layers"}, ConfigError, r"`layers_to_transform` must be set when `layers_pattern` is"),
]


@pytest.mark.parametrize(
    ("kwargs", "error", "message"), BAD_SETTINGS, ids=lambda v: str(v) if isinstance(v, dict) else ""
)
def test_a_bad_setting_is_refused_when_the_config_is_made(
    kwargs: dict[str, object], error: type[BitDistillerError], message: str
) -> None:
    """G3b for `target_parameters`."""
    with pytest.raises(error, match=message) as caught:
        BitDistillerConfig(**kwargs)
    assert type(caught.value) is error
    assert isinstance(caught.value, ValueError)
    assert caught.value.__cause__ is None


def test_layer_replication_is_no_setting() -> None:
    """G12: it is LoRA's own, and would un-share the weights of our layers."""
    with pytest.raises(TypeError, match="layer_replication"):
        BitDistillerConfig(layer_replication=[[0, 2]])


# --------------------------------------------------------------------------------------------------- models


def refused(
    model: nn.Module, config: PeftConfig | None, error: type[Exception], message: str, **kwargs: object
) -> Exception:
    """Both doors refuse, alike, and leave the model as it was."""
    texts = set()
    for door in (get_bitdistiller_model, get_peft_model):
        with unchanged(model), pytest.raises(error, match=message) as caught:
            door(model, config, **kwargs)
        assert type(caught.value) is error
        texts.add(str(caught.value))
    assert len(texts) == 1
    return caught.value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("name", "layer", "parameter"),
    [
        ("llama", "model.layers.1.mlp.up_proj", "weight"),
        ("gpt2", "transformer.h.1.attn.c_proj", "weight"),
        ("mixtral", "model.layers.0.mlp.experts", "down_proj"),
    ],
)
def test_a_weight_that_is_not_finite_is_refused(
    name: str, layer: str, parameter: str, value: float, bases: Bases
) -> None:
    model = bases.base(name)
    with torch.no_grad():
        getattr(model.get_submodule(layer), parameter)[..., 3, 5] = value
    message = rf"In layer '{layer}': the weight must be finite: got NaN or Inf in it\. Load an undamaged checkpoint"
    refused(model, config_for(name), WeightError, message)
    repaired = get_bitdistiller_model(model, config_for(name, exclude_modules=[layer]))
    assert overlays(repaired)


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (1e8, r"at most 6\.55e\+04 to be stored as float16: got an overflow\. Use scale_dtype=\"float32\""),
        (1e-6, r"at least 6\.104e-05 to be stored as float16 without loss: got .*Use scale_dtype=\"float32\""),
    ],
    ids=["overflow", "subnormal"],
)
def test_a_scale_that_cannot_be_stored_is_refused(factor: float, message: str, bases: Bases) -> None:
    model = bases.base("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(factor)
    message = r"In layer 'model\.layers\.1\.mlp\.down_proj': the scale must be " + message
    refused(model, config_for("llama"), ScaleRangeError, message)
    student = get_bitdistiller_model(model, config_for("llama", scale_dtype="float32"))
    assert torch.isfinite(logits(student)).all()


def test_a_group_size_that_does_not_divide_is_refused(bases: Bases) -> None:
    message = (
        r"In layer 'model\.layers\.0\.mlp\.down_proj': `group_size` must divide the input width: got group_size=32, "
        r"in_features=172\. Use one of \[43, 86, 172\], or group_size=-1"
    )
    refused(bases.base("llama-172"), BitDistillerConfig(group_size=32), GroupSizeError, message)


def test_the_default_group_size_is_refused_on_narrow_models(bases: Bases) -> None:
    message = (
        r"In layer 'model\.layers\.0\.self_attn\.q_proj'.*group_size=128, in_features=64\. Use one of \[8, 16, 32, 64\]"
    )
    refused(bases.base("llama"), BitDistillerConfig(), GroupSizeError, message)


def test_an_override_that_does_not_divide_is_refused(bases: Bases) -> None:
    config = config_for("llama", overrides={"layers.1.mlp.down_proj": {"group_size": 96}})
    refused(bases.base("llama"), config, GroupSizeError, r"In layer 'model\.layers\.1\.mlp\.down_proj'.*group_size=96")


def test_integer_weights_are_refused(bases: Bases) -> None:
    """G13: layers of another quantizer need not say so on the model."""
    model = bases.base("llama")
    layer = model.model.layers[1].self_attn.k_proj
    layer.weight = nn.Parameter(layer.weight.detach().mul(100).to(torch.int8), requires_grad=False)
    message = r"full-precision weights: layer 'model\.layers\.1\.self_attn\.k_proj' holds torch\.int8.*[Dd]equantize"
    for door in (get_bitdistiller_model, get_peft_model):
        with unchanged(model), pytest.raises(StateError, match=message):
            door(model, config_for("llama"))


def test_a_packed_model_is_refused(bases: Bases, tmp_path: Path) -> None:
    """G13: in memory and reloaded."""
    packed = bases.student("llama").pack_and_unload(progressbar=False)
    message = (
        r"must hold full-precision weights: layer 'model\.layers\.0\.self_attn\.q_proj' is quantized already\. "
        r"Start from the base model; to train a packed one, add LoRA"
    )
    refused(packed, config_for("llama"), StateError, message)
    packed.save_pretrained(tmp_path)
    refused(load(tmp_path), config_for("llama"), StateError, message)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_latent_model_is_refused(name: str, bases: Bases) -> None:
    config = BitDistillerQuantConfig(bits=2, group_size=32, state="latent")
    model = load(bases.path(name), quantization_config=config)
    refused(model, config_for(name), StateError, r"must hold full-precision weights: layer .* is quantized already")


def test_an_adapter_does_not_load_on_a_packed_model(bases: Bases, tmp_path: Path) -> None:
    student = bases.student("llama")
    student.save_pretrained(tmp_path)
    packed = student.pack_and_unload(progressbar=False)
    with unchanged(packed), pytest.raises(StateError, match="is quantized already"):
        PeftModel.from_pretrained(packed, tmp_path)


def test_a_model_quantized_by_another_method_is_refused(bases: Bases) -> None:
    model = bases.base("llama")
    model.is_quantized, model.quantization_method = True, "gptq"
    message = r"must hold full-precision weights: it is quantized with gptq\. Load it without quantization_config"
    refused(model, config_for("llama"), StateError, message)


def test_a_model_without_memory_is_refused(bases: Bases) -> None:
    """G17."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(bases.path("llama")))
    for door in (get_bitdistiller_model, get_peft_model):
        message = r"In layer 'model\.layers\.0\.self_attn\.q_proj': the weight must be in memory: got a meta tensor"
        with pytest.raises(WeightError, match=message):
            door(model, config_for("llama"))
        assert not overlays(model)
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_offloaded_weights_are_refused(bases: Bases, tmp_path: Path) -> None:
    """G17: they are meta tensors that accelerate fills for the time of a forward pass."""
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = load(bases.path("llama"), device_map=device_map, offload_folder=tmp_path)
    expected = logits(model)
    message = r"In layer 'model\.layers\.1\.\w+\.q_proj': the weight must be in memory.*without offloading"
    for door in (get_bitdistiller_model, get_peft_model):
        with pytest.raises(WeightError, match=message):
            door(model, config_for("llama"))
        assert not overlays(model)
        assert torch.equal(logits(model), expected)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "lm_head"], r".*(lm_head|q_proj)"], ids=str)
@pytest.mark.parametrize("name", ["llama-tied", "gemma2"])
def test_a_tied_head_is_refused(name: str, targets: list[str] | str, bases: Bases) -> None:
    """G11."""
    message = r"In layer 'lm_head': a targeted weight must not be tied: it is shared.*Leave it out.*or untie it first"
    refused(bases.base(name), config_for(name, target_modules=targets), TargetError, message)


def test_an_untied_head_can_be_targeted(bases: Bases) -> None:
    """G11: the remedy that the message names."""
    model = bases.base("llama-tied")
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.all_tied_weights_keys = {}
    student = get_bitdistiller_model(model, config_for("llama-tied", target_modules=["lm_head"]))
    embeddings = model.get_input_embeddings().weight.detach().clone()
    train(student)
    merged = student.merge_and_unload()
    assert torch.equal(merged.get_input_embeddings().weight, embeddings)


@pytest.mark.parametrize(
    ("name", "targets", "layer", "kind"),
    [
        ("llama", ["embed_tokens"], "model.embed_tokens", "Embedding"),
        ("llama", ["input_layernorm"], "model.layers.0.input_layernorm", "LlamaRMSNorm"),
        ("llama", r".*\.1\.mlp", "model.layers.1.mlp", "LlamaMLP"),
        ("llama", ["q_proj", "model.norm"], "model.norm", "LlamaRMSNorm"),
        ("mixtral", ["gate"], "model.layers.0.mlp.gate", "MixtralTopKRouter"),
        ("opt", ["embed_positions"], "model.decoder.embed_positions", "OPTLearnedPositionalEmbedding"),
    ],
    ids=str,
)
def test_a_target_that_is_not_linear_is_refused(
    name: str, targets: list[str] | str, layer: str, kind: str, bases: Bases
) -> None:
    message = (
        rf"In layer '{layer}': a targeted module must be a linear layer, a Conv1D or fused experts: got {kind}\. "
        r"Narrow target_modules, or leave it out with exclude_modules"
    )
    refused(bases.base(name), config_for(name, target_modules=targets), TargetError, message)


def test_a_layer_whose_weight_is_read_by_its_owner_is_refused() -> None:
    """torch's attention multiplies by `out_proj.weight` itself, so an overlay would not be asked."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(32, 4), "linear": nn.Linear(32, 32)})
    student = get_bitdistiller_model(model, BitDistillerConfig(group_size=32))
    assert set(overlays(student)) == {"linear"}
    plain = nn.ModuleDict({"attention": nn.MultiheadAttention(32, 4)})
    config = BitDistillerConfig(group_size=32, target_modules=["out_proj"])
    refused(plain, config, TargetError, r"In layer 'attention\.out_proj': a targeted module must be a linear layer")


def test_a_target_that_matches_nothing_is_refused(bases: Bases) -> None:
    config = config_for("llama", target_modules=["nope"])
    refused(bases.base("llama"), config, TargetError, r"`target_modules` must match a layer: got \['nope'\].*q_proj")


def test_excluding_everything_is_refused(bases: Bases) -> None:
    config = config_for("llama", exclude_modules=".*")
    refused(bases.base("llama"), config, TargetError, r"must leave a layer.*exclude_modules='\.\*'")


def test_layers_that_do_not_exist_are_refused(bases: Bases) -> None:
    message = r"must have linear layers to quantize: got none in layers_to_transform=\[7\]"
    refused(bases.base("llama"), config_for("llama", layers_to_transform=[7]), TargetError, message)


def test_a_model_without_linear_layers_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4))
    refused(model, BitDistillerConfig(), TargetError, r"the model must have linear layers to quantize: got none\.")


def test_targets_must_be_named(bases: Bases) -> None:
    """PEFT's own message; there is no table of defaults by architecture."""
    config = config_for("llama", target_modules=None)
    refused(bases.base("llama"), config, ValueError, "Please specify `target_modules`")


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_one_scale_for_fused_experts_is_refused(name: str, bases: Bases) -> None:
    message = (
        r"In layer 'model\.layers\.0\.mlp\.experts': `group_size` must be a number for fused experts: "
        r"got group_size='tensor'\. Use group_size=-1, or leave the experts out"
    )
    refused(bases.base(name), config_for(name, group_size="tensor"), TargetError, message)


def test_transposed_experts_are_refused() -> None:
    config = GptOssConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    message = (
        r"In layer 'model\.layers\.0\.mlp\.experts': experts must store weights as \[experts, out, in\]: got the "
        r"transposed layout .*\(GptOssExperts\)\. Leave them out with exclude_modules=\['experts'\]"
    )
    refused(model, config_for("llama"), TargetError, message)
    student = get_bitdistiller_model(model, config_for("llama", exclude_modules=["experts"]))
    assert torch.isfinite(student(token_ids()).logits).all()


@pytest.mark.parametrize("config", [LoraConfig(), "default", {"bits": 2}], ids=lambda c: type(c).__name__)
def test_a_config_of_another_kind_is_refused(config: object, bases: Bases) -> None:
    model = bases.base("llama")
    with (
        unchanged(model),
        pytest.raises(ConfigError, match=f"must be a BitDistillerConfig: got {type(config).__name__}"),
    ):
        get_bitdistiller_model(model, config)


@pytest.mark.parametrize("model", ["some/model", None], ids=str)
def test_something_that_is_no_model_is_refused(model: object) -> None:
    with pytest.raises(ConfigError, match=f"must be a torch module: got {type(model).__name__}. Pass the loaded model"):
        get_bitdistiller_model(model)


def test_pefts_mixed_model_is_refused(bases: Bases) -> None:
    model = bases.base("llama")
    with unchanged(model), pytest.raises(ValueError, match="BITDISTILLER"):
        get_bitdistiller_model(model, config_for("llama"), mixed=True)


# ----------------------------------------------------------------------------------------------- other adapters


def lora() -> LoraConfig:
    return LoraConfig(r=2, target_modules="all-linear")


def lora_on_the_peft_model(student: PeftModel, folder: Path) -> None:
    get_peft_model(student, lora())


def lora_under_another_name(student: PeftModel, folder: Path) -> None:
    get_peft_model(student, lora(), adapter_name="second")


def lora_on_the_tuner(student: PeftModel, folder: Path) -> None:
    get_peft_model(student.base_model, lora())


def lora_on_the_base_model(student: PeftModel, folder: Path) -> None:
    get_peft_model(student.base_model.model, lora())


def lora_injected(student: PeftModel, folder: Path) -> None:
    inject_adapter_in_model(lora(), student.get_base_model())


def lora_loaded_by_peft(student: PeftModel, folder: Path) -> None:
    PeftModel.from_pretrained(student, folder)


def lora_loaded_by_transformers(student: PeftModel, folder: Path) -> None:
    student.get_base_model().load_adapter(str(folder), adapter_name="second")


def lora_added_by_transformers(student: PeftModel, folder: Path) -> None:
    student.get_base_model().add_adapter(lora(), adapter_name="second")


def ia3_on_the_peft_model(student: PeftModel, folder: Path) -> None:
    get_peft_model(student, IA3Config(target_modules=["k_proj"], feedforward_modules=[]))


@pytest.mark.filterwarnings(
    "ignore:You are trying to modify a model with PEFT for a second time:UserWarning",
    "ignore:Already found a `peft_config` attribute in the model:UserWarning",
)
@pytest.mark.parametrize(
    "way",
    [
        lora_on_the_peft_model,
        lora_under_another_name,
        lora_on_the_tuner,
        lora_on_the_base_model,
        lora_injected,
        lora_loaded_by_peft,
        lora_loaded_by_transformers,
        lora_added_by_transformers,
        ia3_on_the_peft_model,
    ],
    ids=lambda way: way.__name__,
)
def test_another_adapter_around_ours_is_refused(
    way: Callable[[PeftModel, Path], None], bases: Bases, tmp_path: Path
) -> None:
    """G2: its merge would go into the teacher's weight and be lost."""
    get_peft_model(bases.base("llama"), lora()).save_pretrained(tmp_path / "lora")
    student = bases.student("llama")
    train(student)
    expected, config = logits(student), student.peft_config["default"]
    message = (
        r"an adapter of another kind must not wrap a BitDistiller layer: layer '.*q_proj' is one, and \w+ would merge "
        r"into its frozen teacher weight\. Call pack_and_unload\(\) or merge_and_unload\(\) first"
    )
    with unchanged(student), pytest.raises(TargetError, match=message):
        way(student, tmp_path / "lora")
    assert student.peft_config == {"default": config}
    assert student.active_adapters == ["default"]
    assert torch.equal(logits(student), expected)
    student.save_pretrained(tmp_path / "ours")
    assert torch.equal(logits(PeftModel.from_pretrained(bases.base("llama"), tmp_path / "ours")), expected)


def test_a_second_adapter_of_another_kind_is_refused(bases: Bases, tmp_path: Path) -> None:
    """G2: PEFT's own rule."""
    student = bases.student("llama")
    with unchanged(student), pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        student.add_adapter("second", lora())
    get_peft_model(bases.base("llama"), lora()).save_pretrained(tmp_path)
    with unchanged(student), pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        student.load_adapter(tmp_path, "second")
    assert set(student.peft_config) == {"default"}


def test_lora_on_the_packed_result_works(bases: Bases) -> None:
    """G2: the remedy that the message names."""
    packed = bases.student("llama").pack_and_unload(progressbar=False)
    expected = logits(packed)
    with_lora = get_peft_model(packed, lora())
    assert torch.equal(logits(with_lora), expected)
    assert len(trainable(with_lora)) == 28


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model:UserWarning")
def test_a_model_with_another_adapter_is_refused(bases: Bases, tmp_path: Path) -> None:
    other = get_peft_model(bases.base("llama"), lora())
    base = other.get_base_model()
    message = (
        r"the model must not carry another adapter: got Linear in layer '.*q_proj'\. Call merge_and_unload\(\) first"
    )
    for door in (get_bitdistiller_model, get_peft_model):
        with unchanged(other), pytest.raises(StateError, match=message):
            door(base, config_for("llama"))
        assert {type(config) for config in other.peft_config.values()} == {LoraConfig}
    bases.student("llama").save_pretrained(tmp_path)
    with unchanged(other), pytest.raises(StateError, match=message):
        base.load_adapter(str(tmp_path), adapter_name="ours")
    assert list(other.peft_config) == ["default"]


# ------------------------------------------------------------------------------------------- our own adapters again


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
@pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed:UserWarning")
def test_a_student_is_not_wrapped_again(bases: Bases) -> None:
    student = bases.student("llama")
    train(student)
    expected = logits(student)
    message = r"`model` must be a base model: got a PeftModel\. Use model\.add_adapter\(name, config\)"
    with unchanged(student), pytest.raises(StateError, match=message):
        get_bitdistiller_model(student, config_for("llama"))
    base = student.get_base_model()
    for model, name in ((student, "default"), (student, "other"), (student.base_model, "other"), (base, "default")):
        with unchanged(student), pytest.raises(StateError, match=r"Use model\.add_adapter\(name, config\)"):
            get_peft_model(model, config_for("llama", bits=4), adapter_name=name)
        assert list(student.peft_config) == ["default"]
        assert student.peft_config["default"].bits == 2
    assert torch.equal(logits(student), expected)


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"group_size": 48}, GroupSizeError),
        ({"target_modules": ["embed_tokens"]}, TargetError),
        ({"target_modules": ["nope"]}, TargetError),
        ({"layers_to_transform": [7]}, TargetError),
    ],
    ids=str,
)
def test_a_refused_second_adapter_leaves_the_first_alone(
    kwargs: dict[str, object], error: type[Exception], bases: Bases, tmp_path: Path
) -> None:
    student = bases.student("llama", train_other="norms")
    train(student)
    expected = logits(student)
    with unchanged(student), pytest.raises(error):
        student.add_adapter("other", config_for("llama", **kwargs))
    assert set(student.peft_config) == {"default"}
    assert torch.equal(logits(student), expected)
    train(student)


def test_two_active_adapters_are_refused(bases: Bases) -> None:
    student = bases.student("llama")
    student.add_adapter("other", config_for("llama"))
    expected = logits(student)
    message = (
        r"`adapter_names` must be one name: got \['default', 'other'\].*activate them in turn with set_adapter\(\)"
    )
    with unchanged(student), pytest.raises(ConfigError, match=message):
        student.base_model.set_adapter(["default", "other"])
    assert student.active_adapters == ["default"]
    assert torch.equal(logits(student), expected)


def test_adapters_mixed_in_a_batch_are_refused(bases: Bases) -> None:
    """PEFT drops the argument without a word for methods that do not know it."""
    student = bases.student("llama")
    student.add_adapter("other", config_for("llama"))
    for call in (student, student.generate):
        with (
            unchanged(student),
            pytest.raises(ConfigError, match=r"`adapter_names` must not be passed.*set_adapter\(\)"),
        ):
            call(input_ids=token_ids(), adapter_names=["default", "other"])


def test_unknown_adapters_are_refused_by_peft(bases: Bases) -> None:
    student = bases.student("llama")
    with unchanged(student), pytest.raises(ValueError, match="not found"):
        student.set_adapter("nope")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_refused_model_can_be_used_and_wrapped_afterwards(name: str, bases: Bases) -> None:
    model = bases.base(name)
    expected = logits(model)
    config = config_for(name, overrides={r".*\.1\..*(up_proj|c_fc|fc1|experts)": {"group_size": 7}})
    with unchanged(model), pytest.raises(GroupSizeError):
        get_bitdistiller_model(model, config)
    assert torch.equal(logits(model), expected)
    student = get_bitdistiller_model(model, config_for(name))
    assert torch.equal(logits(student), logits(bases.student(name)))


def test_a_plain_module_is_named_like_any_other() -> None:
    refused(MLP(), BitDistillerConfig(group_size=48), GroupSizeError, r"In layer 'lin0': `group_size` must divide")
