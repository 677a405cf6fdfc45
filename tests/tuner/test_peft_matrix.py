"""A student is an ordinary PEFT model on every architecture: what is overlaid, what trains, and in which dtype."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import PeftModel, TaskType, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from bitdistiller_peft import BitDistillerConfig, get_bitdistiller_model
from bitdistiller_peft.tuner import BitDistillerLayer
from tests.tiny import CONFIGS, token_ids
from tests.tuner.common import (
    MLP,
    Bases,
    assert_same_tensors,
    config_for,
    copy_state,
    gradients,
    inputs_of,
    logits,
    loss_of,
    overlays,
    run,
    teacher_logits,
    train,
    trainable,
    without_dropout,
)

each_architecture = pytest.mark.parametrize("name", CONFIGS)

# in one layer of two; experts count once although they hold two matrices
OVERLAYS_PER_LAYER = {"gpt2": 4, "opt": 6, "mixtral": 5, "qwen3-moe": 5}


@each_architecture
def test_get_peft_model_and_get_bitdistiller_model_make_the_same_student(name: str, bases: Bases) -> None:
    by_peft = get_peft_model(bases.base(name), config_for(name))
    ours = get_bitdistiller_model(bases.base(name), config_for(name))
    assert type(ours) is type(by_peft) is PeftModel
    assert_same_tensors(ours.state_dict(), by_peft.state_dict())
    assert torch.equal(logits(ours), logits(by_peft))
    assert not torch.equal(logits(ours), logits(bases.base(name))), "the student is the teacher"


@each_architecture
def test_everything_linear_is_overlaid_but_head_and_routers(name: str, bases: Bases) -> None:
    """G3: fused experts are not forgotten."""
    model = bases.base(name)
    expected = {
        module_name
        for module_name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) or type(module).__name__.endswith("Experts")
    } - {"lm_head"}
    student = get_bitdistiller_model(model, config_for(name))
    assert set(overlays(student)) == expected
    assert len(expected) == 2 * OVERLAYS_PER_LAYER.get(name, 7)
    assert set(student.targeted_module_names) == expected


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_fused_experts_train_both_matrices_and_the_router_stays(name: str, bases: Bases) -> None:
    """G3, G3b: one module target, two parameters, no `ParamWrapper`."""
    student = bases.student(name)
    experts = [layer for key, layer in overlays(student).items() if key.endswith("experts")]
    assert [layer.parameter_names for layer in experts] == [("gate_up_proj", "down_proj")] * 2
    for layer in experts:
        for parameter in layer.parameter_names:
            assert layer.student(parameter, "default").weight.shape == getattr(layer.base_layer, parameter).shape
    assert not [key for key in trainable(student) if "gate.weight" in key or "router" in key]


@each_architecture
def test_only_adapter_parameters_are_trainable(name: str, bases: Bases) -> None:
    """G7: embeddings, norms and head are frozen unless `train_other` says otherwise."""
    student = bases.student(name)
    names = set(trainable(student))
    assert names == {key for key, _ in student.named_parameters() if ".bitdistiller_" in key}
    assert all(".default." in key for key in names)
    matrices = sum(len(layer.parameter_names) for layer in overlays(student).values())
    assert len(names) == 2 * matrices, "one weight and one scale each"
    count, total = student.get_nb_trainable_parameters()
    assert count == sum(parameter.numel() for parameter in trainable(student).values()) < total


@each_architecture
def test_training_moves_every_adapter_tensor_and_nothing_else(name: str, bases: Bases) -> None:
    student = bases.student(name)
    before = copy_state(student)
    train(student, steps=2)
    changed = {key for key, value in student.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == set(trainable(student))


@each_architecture
def test_outputs_are_finite_and_keep_the_dtype(name: str, bases: Bases) -> None:
    out = run(bases.student(name))
    assert torch.isfinite(out).all()
    assert out.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@each_architecture
def test_sixteen_bit_models_train_fp32_master_weights(name: str, dtype: torch.dtype, bases: Bases) -> None:
    """G8, G9: 16-bit compute, fp32 trained copies."""
    student = get_bitdistiller_model(bases.base(name, dtype=dtype), config_for(name))
    assert {parameter.dtype for parameter in trainable(student).values()} == {torch.float32}
    assert {p.dtype for key, p in student.named_parameters() if ".bitdistiller_" not in key} == {dtype}
    before = copy_state(student)
    assert run(student).dtype == dtype
    train(student, steps=2, lr=1e-3)
    assert torch.isfinite(logits(student)).all()
    changed = {key for key, value in student.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == set(trainable(student))


@each_architecture
def test_pure_bf16_students_train_in_bf16(name: str, bases: Bases) -> None:
    """G9: `autocast_adapter_dtype=False`, which TRL forces under ZeRO-3, together with `master_dtype="base"`."""
    model = bases.base(name, dtype=torch.bfloat16)
    student = get_bitdistiller_model(model, config_for(name, master_dtype="base"), autocast_adapter_dtype=False)
    dtypes = {key.rpartition(".")[2]: parameter.dtype for key, parameter in trainable(student).items()}
    assert dtypes == {"weight": torch.bfloat16, "weight_scale": torch.float32}
    train(student, steps=1)
    assert torch.isfinite(logits(student)).all()


@pytest.mark.parametrize(
    ("master_dtype", "autocast", "expected"),
    [
        ("float32", True, torch.float32),
        ("float32", False, torch.float32),
        ("base", True, torch.float32),
        ("base", False, torch.bfloat16),
    ],
)
def test_dtype_of_the_master_weights(master_dtype: str, autocast: bool, expected: torch.dtype, bases: Bases) -> None:
    """G9: only `master_dtype="base"` without PEFT's autocast trains in 16 bits."""
    config = config_for("llama", master_dtype=master_dtype)
    model = bases.base("llama", dtype=torch.bfloat16)
    student = get_bitdistiller_model(model, config, autocast_adapter_dtype=autocast)
    weights = {p.dtype for key, p in trainable(student).items() if key.endswith(".weight")}
    assert weights == {expected}
    # the student's values do not depend on it: bf16 weights are exact in fp32
    reference = get_bitdistiller_model(bases.base("llama", dtype=torch.bfloat16), config_for("llama"))
    assert torch.equal(logits(student), logits(reference))


def test_autocast_runs_a_fp32_student_in_bf16(bases: Bases) -> None:
    student = bases.student("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(student)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == p.dtype for p in trainable(student).values())


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@each_architecture
def test_gradient_checkpointing_changes_no_gradient(name: str, use_reentrant: bool, bases: Bases) -> None:
    student = without_dropout(bases.student(name, learn_zero_point=True)).train()
    plain = gradients(student)
    student.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        student.enable_input_require_grads()
    assert student.is_gradient_checkpointing
    assert_same_tensors(gradients(student), plain)


def test_gradient_checkpointing_chosen_before_wrapping_works_too(bases: Bases) -> None:
    """G18: PEFT asks the model about checkpointing while it wraps it."""
    model = bases.base("llama")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    student = get_bitdistiller_model(model, config_for("llama")).train()
    assert_same_tensors(gradients(student), gradients(bases.student("llama").train()))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_generation_works_and_repeats(name: str, bases: Bases) -> None:
    """Greedy generation of a student equals greedy decoding by hand."""
    student = get_bitdistiller_model(bases.base(name), config_for(name, task_type=TaskType.CAUSAL_LM))
    prompt = token_ids(1, 5)
    found = student.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False, eos_token_id=None
    )
    expected = prompt
    for _ in range(4):
        with torch.no_grad():
            expected = torch.cat([expected, student(expected).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, expected)


def test_input_embeddings_can_be_passed_and_get_their_gradient(bases: Bases) -> None:
    student = bases.student("llama")
    embeddings = student.get_input_embeddings()(token_ids()).detach().requires_grad_()
    out = student(inputs_embeds=embeddings).logits
    assert torch.equal(out, run(student))
    out.sum().backward()
    assert embeddings.grad.abs().sum() > 0


def test_a_student_can_be_copied(bases: Bases) -> None:
    student = bases.student("mixtral")
    twin = copy.deepcopy(student)
    expected = logits(student)
    train(student)
    assert torch.equal(logits(twin), expected)
    train(twin)
    assert torch.equal(logits(twin), logits(student))


def test_status_of_layers_and_model_is_regular(bases: Bases) -> None:
    student = bases.student("llama")
    status = student.get_model_status()
    assert (status.peft_types, status.enabled, status.merged_adapters) == ({"default": "BITDISTILLER"}, True, [])
    assert (status.active_adapters, status.requires_grad) == (["default"], {"default": True})
    assert status.num_adapter_layers == 14
    assert {layer.module_type for layer in student.get_layer_status()} == {"BitDistillerLinear"}
    assert "BitDistillerLinear" in repr(student)


# ---------------------------------------------------------------------------------------------- beyond transformers


def test_a_plain_torch_module_can_be_a_student() -> None:
    model = MLP()
    teacher = logits(model)
    student = get_peft_model(model, BitDistillerConfig(bits=2, group_size=32))
    assert set(overlays(student)) == {"lin0", "lin1"}
    assert not torch.equal(logits(student), teacher)
    before = copy_state(student)
    train(student)
    after = student.state_dict()
    assert {key for key in after if not torch.equal(after[key], before[key])} == set(trainable(student))
    assert torch.equal(teacher_logits(student), teacher)
    expected = logits(student)
    assert torch.equal(logits(student.merge_and_unload()), expected)


def test_a_nameless_stack_of_layers_can_be_a_student() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Sequential(nn.Linear(64, 8)))
    student = get_bitdistiller_model(model, BitDistillerConfig(group_size=32))
    assert set(overlays(student)) == {"0", "2.0"}


def test_unusual_inputs_of_a_linear_layer_work() -> None:
    """No leading axis, many leading axes, an empty batch, and a keyword."""
    student = get_bitdistiller_model(nn.Sequential(nn.Linear(32, 8)), BitDistillerConfig(group_size=32))
    layer = overlays(student)["0"]
    weight, bias = layer.student("weight", "default")(), layer.base_layer.bias
    for shape in [(32,), (2, 3, 4, 32), (0, 32)]:
        inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        assert torch.equal(layer(inputs), nn.functional.linear(inputs, weight, bias))
        assert torch.equal(layer(input=inputs), layer(inputs))


def test_low_level_injection_works_without_a_peft_model() -> None:
    """PEFT's `inject_adapter_in_model`, which transformers' `load_adapter` builds on."""
    from peft import inject_adapter_in_model

    model = inject_adapter_in_model(BitDistillerConfig(group_size=32), MLP(), adapter_name="mine")
    assert {name for name, module in model.named_modules() if isinstance(module, BitDistillerLayer)} == {"lin0", "lin1"}
    expected = get_bitdistiller_model(MLP(), BitDistillerConfig(group_size=32))
    assert torch.equal(logits(model), logits(expected))


def test_layer_attributes_that_models_read_stay_readable(bases: Bases) -> None:
    """Models look at `weight` and `bias` of their layers, for example to choose a dtype."""
    model = bases.base("qwen2")
    original = model.model.layers[0].self_attn.q_proj
    student = get_bitdistiller_model(model, config_for("qwen2"))
    layer = overlays(student)["model.layers.0.self_attn.q_proj"]
    assert layer.weight is original.weight
    assert layer.bias is original.bias
    assert (layer.in_features, layer.out_features) == (original.in_features, original.out_features)
    assert layer.get_base_layer() is original
    assert inputs_of(student).shape == (2, 9)


def test_weights_that_lie_on_other_ranks_are_gathered_to_be_checked_and_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """G32: under ZeRO-3 every rank holds a part, and a parameter looks empty unless it is gathered."""
    expected = logits(get_bitdistiller_model(MLP(), BitDistillerConfig(group_size=32)))
    model = MLP()
    whole = {parameter: parameter.data for parameter in (model.lin0.weight, model.lin1.weight)}
    for parameter in whole:
        parameter.data = torch.empty(0)

    @contextmanager
    def gather(parameters: nn.Parameter | list[nn.Parameter], **kwargs: object) -> Iterator[None]:
        parameters = [parameters] if isinstance(parameters, nn.Parameter) else parameters
        for parameter in parameters:
            parameter.data = whole[parameter]
        yield
        for parameter in parameters:
            parameter.data = torch.empty(0)

    for name in ("layer", "targets"):
        monkeypatch.setattr(f"bitdistiller_peft.tuner.{name}.gather_params_ctx", gather)
    student = get_bitdistiller_model(model, BitDistillerConfig(group_size=32))
    assert torch.equal(logits(student), expected)
    assert {parameter.numel() for parameter in whole} == {0}


@pytest.mark.slow
def test_a_student_trains_sharded_as_it_does_whole(bases: Bases, tmp_path: Path) -> None:
    """G16: FSDP2 with bf16 base weights beside fp32 trained ones; one process shows what the wrapping does."""
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    def student() -> PeftModel:
        return get_bitdistiller_model(bases.base("llama", dtype=torch.bfloat16), config_for("llama"))

    whole, sharded = student(), student()
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        for layer in sharded.get_base_model().model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        train(whole)
        train(sharded)
        assert torch.equal(logits(sharded), logits(whole))
        assert torch.equal(teacher_logits(sharded), teacher_logits(whole))
    finally:
        distributed.destroy_process_group()
