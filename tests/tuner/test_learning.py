"""A student learns: every trainable tensor has a gradient, every knob turns something, and training beats rounding."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, Trainer, TrainingArguments

from bitdistiller_peft import BitDistillerConfig, get_bitdistiller_model
from bitdistiller_peft.layers import quantized, set_learned_params
from bitdistiller_peft.quantizers import QuantParams
from tests.tiny import CONFIGS, load
from tests.tuner.common import (
    Bases,
    assert_same_tensors,
    config_for,
    copy_state,
    gradients,
    logits,
    loss_of,
    overlays,
    run,
    train,
    trainable,
)


def narrow(student: PeftModel, factor: float = 0.6) -> PeftModel:
    """Shrink every learned scale, so that weights are clamped and zero points have a gradient."""
    with torch.no_grad():
        for name, parameter in trainable(student).items():
            if name.endswith(("weight_scale", "weight_scale_negative", "weight_scale_residual")):
                parameter.mul_(factor)
    return student


# ----------------------------------------------------------------------------------------------------- gradients

KINDS = [
    {"learn_zero_point": True},
    {"learn_zero_point": True, "zero_point_range": (1, 2)},
    {"learn_scale": False},
    {"learn_scale": False, "gradient": "ste"},
    {"grid": "int_sym", "bits": 4},
    {"grid": "nf", "bits": 3},
    {"grid": "nf_sym", "bits": 3},
    {"grid": "fp", "bits": 3},
    {"grid": "ternary"},
    {"grid": "ternary", "learn_scale": False, "gradient": "ste"},
    {"grid": "r2q"},
    {"grid": "r2q", "learn_scale": False, "refine": "least_squares"},
    {"group_size": -1},
    {"train_other": "norms"},
    {"bits": 8},
]


@pytest.mark.parametrize("kwargs", KINDS, ids=lambda k: "-".join(f"{key}={value}" for key, value in k.items()))
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_every_trainable_tensor_gets_a_finite_gradient(name: str, kwargs: dict[str, object], bases: Bases) -> None:
    student = narrow(bases.student(name, **kwargs))
    grads = gradients(student)
    assert set(grads) == set(trainable(student))
    assert not [key for key, grad in grads.items() if not torch.isfinite(grad).all()]
    assert not [key for key, grad in grads.items() if not grad.abs().sum() > 0]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_passes_gradients_to_every_tensor(name: str, bases: Bases) -> None:
    grads = gradients(narrow(bases.student(name, learn_zero_point=True)))
    assert not [key for key, grad in grads.items() if not (torch.isfinite(grad).all() and grad.abs().sum() > 0)]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_gradient_of_a_weight_inside_the_range_is_the_dense_one(name: str, bases: Bases) -> None:
    """Rounding is seen as the identity; so a dense model that holds the student's values has the same gradient."""
    student = bases.student(name, gradient="ste", learn_scale=False)
    grads = gradients(student)
    values = {key: layer.active_student("weight")().detach() for key, layer in overlays(student).items()}
    dense = bases.base(name)
    with torch.no_grad():
        for key, value in values.items():
            weight = dense.get_submodule(key).weight
            weight.copy_(value.T if name == "gpt2" else value)
    expected = gradients(dense)
    for key in values:
        found = grads[f"base_model.model.{key}.bitdistiller_weight.default.weight"]
        wanted = expected[f"{key}.weight"]
        torch.testing.assert_close(found, wanted.T if name == "gpt2" else wanted, rtol=1e-4, atol=1e-6)


def test_a_clamped_weight_gets_no_gradient_and_its_scale_does(bases: Bases) -> None:
    student = narrow(bases.student("llama"), 0.3)
    layer = overlays(student)["model.layers.0.mlp.up_proj"].active_student("weight")
    steps = layer.weight.view(128, 2, 32) / layer.weight_scale.half().float().unsqueeze(-1)
    codes = steps.round() + layer.weight_zero_point.unsqueeze(-1)
    clamped = ((codes < 0) | (codes > 3)).view(128, 64)
    assert 0.1 < clamped.float().mean() < 0.9
    loss_of(student).backward()
    assert not layer.weight.grad[clamped].any()
    assert (layer.weight.grad[~clamped] != 0).float().mean() > 0.99
    assert (layer.weight_scale.grad != 0).float().mean() > 0.99


def test_the_published_gradient_reaches_the_extremes_of_each_group(bases: Bases) -> None:
    exact = gradients(bases.student("llama", learn_scale=False))
    ste = gradients(bases.student("llama", learn_scale=False, gradient="ste"))
    weights = bases.base("llama").state_dict()
    for key in exact:
        differs = (exact[key] != ste[key]).view(exact[key].shape[0], -1, 32)
        groups = weights[key.split("base_model.model.")[1].split(".bitdistiller_")[0] + ".weight"].view(differs.shape)
        rows = torch.arange(differs.shape[0]).unsqueeze(-1)
        cols = torch.arange(differs.shape[1])
        extremes = torch.zeros_like(differs)
        extremes[rows, cols, groups.argmin(-1)] = extremes[rows, cols, groups.argmax(-1)] = True
        assert not (differs & ~extremes).any()
        assert differs.any()


# ----------------------------------------------------------------------------------------- scales and zero points


def mse_step(student: PeftModel, target: Tensor, only: str, lr: float, steps: int) -> list[float]:
    """Train only the tensors whose name ends like this towards given logits; returns the losses."""
    chosen = {key: p for key, p in trainable(student).items() if key.endswith(only)}
    assert chosen
    optimizer = torch.optim.Adam(chosen.values(), lr=lr)
    losses = []
    for _ in range(steps):
        student.zero_grad()
        loss = F.mse_loss(run(student), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("grid", ["int", "int_sym", "nf", "nf_sym"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_learned_scales_alone_bring_the_student_closer_to_its_teacher(name: str, grid: str, bases: Bases) -> None:
    student = bases.student(name, grid=grid)
    losses = mse_step(student, logits(bases.base(name)), "weight_scale", lr=1e-3, steps=12)
    assert losses[-1] < 0.9 * losses[0]


def test_negative_scales_learn_on_their_own(bases: Bases) -> None:
    student = bases.student("llama", grid="nf")
    losses = mse_step(student, logits(bases.base("llama")), "weight_scale_negative", lr=1e-3, steps=12)
    assert losses[-1] < 0.95 * losses[0]


def test_learned_zero_points_move_to_other_codes_and_bring_the_student_closer(bases: Bases) -> None:
    student = narrow(bases.student("llama", learn_zero_point=True), 0.7)
    before = {key: layer.active_student("weight") for key, layer in overlays(student).items()}
    codes = {key: quantized(module, "weight")[1].zero_point.clone() for key, module in before.items()}
    losses = mse_step(student, logits(bases.base("llama")), "weight_zero_point", lr=0.1, steps=15)
    assert min(losses) < losses[0]
    moved = [
        key for key, module in before.items() if not torch.equal(quantized(module, "weight")[1].zero_point, codes[key])
    ]
    assert moved
    expected = logits(student)
    assert torch.equal(logits(student.pack_and_unload(progressbar=False)), expected)


def test_calibrated_start_values_are_used_saved_and_packed(bases: Bases, tmp_path: Path) -> None:
    """The zero point that is not trained is a buffer: it is set, saved and loaded all the same."""
    student = bases.student("llama")
    start = logits(student)
    for layer in overlays(student).values():
        weight = layer.active_student("weight")
        params = quantized(weight, "weight")[1]
        set_learned_params(weight, "weight", QuantParams(params.scale * 0.8, (params.zero_point + 1).clamp(max=3)))
    calibrated = logits(student)
    assert not torch.equal(calibrated, start)
    student.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(bases.base("llama"), tmp_path)), calibrated)
    assert torch.equal(logits(student.pack_and_unload(progressbar=False)), calibrated)


def test_a_scale_that_an_optimizer_pushes_below_zero_stays_usable(bases: Bases) -> None:
    student = bases.student("llama")
    with torch.no_grad():
        overlays(student)["model.layers.0.mlp.up_proj"].active_student("weight").weight_scale.neg_()
    assert torch.isfinite(logits(student)).all()
    assert all(torch.isfinite(grad).all() for grad in gradients(student).values())
    expected = logits(student)
    assert torch.equal(logits(student.pack_and_unload(progressbar=False)), expected)


def test_without_learned_scales_the_range_follows_the_weights(bases: Bases) -> None:
    """BitDistiller as published: min and max are taken anew on every forward pass."""
    student = bases.student("llama", learn_scale=False)
    assert not [key for key in student.state_dict() if "scale" in key or "zero_point" in key]
    weight = overlays(student)["model.layers.0.mlp.up_proj"].active_student("weight")
    with torch.no_grad():
        weight.weight[0, 0] = 7.0
    assert weight()[0, 0].item() == pytest.approx(7.0, rel=0.02)  # zero is a code as well


# --------------------------------------------------------------------------------------------------------- knobs


def start_logits(student: PeftModel) -> object:
    return logits(student)


def trainable_names(student: PeftModel) -> object:
    return sorted(trainable(student))


def trainable_dtypes(student: PeftModel) -> object:
    return {str(parameter.dtype) for parameter in trainable(student).values()}


@torch.no_grad()
def updated_logits(student: PeftModel) -> object:
    """Of a student whose factors have the same entries whatever their number."""
    for name, parameter in student.named_parameters():
        if "_lora_" in name:
            parameter.fill_(0.05)
            parameter[..., 1:, :] *= -1 if name.endswith("_B") else 0
    return logits(student)


def all_gradients(student: PeftModel) -> object:
    return torch.cat([grad.flatten() for grad in gradients(student).values()])


KNOBS = {
    "bits": (3, start_logits, {}),
    "group_size": (64, start_logits, {}),
    "grid": ("nf", start_logits, {}),
    "scale_dtype": ("bfloat16", start_logits, {}),
    "zero_point_range": ((1, 2), start_logits, {}),
    "arithmetic": ("released", start_logits, {"learn_scale": False}),
    "gradient": ("ste", all_gradients, {"learn_scale": False}),
    "learn_scale": (False, trainable_names, {}),
    "learn_zero_point": (True, trainable_names, {}),
    "trainable": ("quantization", trainable_names, {}),
    "lora_rank": (4, updated_logits, {"trainable": "lora", "lora_alpha": 1.0}),
    "lora_alpha": (1.0, updated_logits, {"trainable": "lora"}),
    "master_dtype": ("base", trainable_dtypes, {}),
    "train_other": ("norms", trainable_names, {}),
    "embedding_bits": (8, trainable_names, {}),
    "head_bits": (8, trainable_names, {}),
    "overrides": ({"down_proj": {"bits": 4}}, start_logits, {}),
    "refine": ("least_squares", start_logits, {"grid": "r2q", "learn_scale": False}),
    "tied": (True, start_logits, {"grid": "r2q"}),
    "activation_bits": (8, start_logits, {}),
    "subln": ("all", trainable_names, {}),
    "subln_eps": (0.1, start_logits, {"subln": "all"}),
    "subln_modules": (["q_proj"], trainable_names, {"subln": "output"}),
    "packing": ("base3", start_logits, {"grid": "ternary"}),
    "provenance": ({"loss": "cakld"}, start_logits, {}),
    "target": ("transformers", start_logits, {}),
    "target_modules": (["q_proj"], trainable_names, {}),
    "exclude_modules": (["q_proj"], trainable_names, {}),
    "modules_to_save": (["lm_head"], trainable_names, {}),
    "layers_to_transform": ([1], trainable_names, {}),
    "layers_pattern": ("layers", trainable_names, {"layers_to_transform": [1]}),
    "target_parameters": (None, trainable_names, {}),
}
# they change nothing on a model where their default finds all, or only the file or what is refused
ONLY_CHECKED = ("layers_pattern", "target_parameters", "packing", "provenance", "target")


def test_every_knob_of_the_config_is_tried() -> None:
    ours = {f.name for f in dataclasses.fields(BitDistillerConfig)} - {f.name for f in dataclasses.fields(PeftConfig)}
    assert ours == set(KNOBS)
    assert all(f.metadata.get("help") for f in dataclasses.fields(BitDistillerConfig) if f.name in ours)


@pytest.mark.parametrize("knob", KNOBS)
def test_a_knob_turns_something(knob: str, bases: Bases) -> None:
    value, what, others = KNOBS[knob]
    config = config_for("llama", **others)
    assert getattr(config, knob) != value or knob in ONLY_CHECKED, "the default is no test"

    def seen(**kwargs: object) -> object:
        model = bases.base("llama", dtype=torch.bfloat16)
        student = get_bitdistiller_model(model, config_for("llama", **others, **kwargs), autocast_adapter_dtype=False)
        return what(student)

    plain, turned = seen(), seen(**{knob: value})
    if isinstance(plain, Tensor):
        plain, turned = plain.tolist(), turned.tolist()
    assert (plain == turned) == (knob in ONLY_CHECKED)


def test_more_bits_and_smaller_groups_are_closer_to_the_teacher(bases: Bases) -> None:
    teacher = logits(bases.base("llama"))

    def error(**kwargs: object) -> float:
        return F.mse_loss(logits(bases.student("llama", **kwargs)), teacher).item()

    by_bits = [error(bits=bits) for bits in (2, 3, 4, 8)]
    assert by_bits == sorted(by_bits, reverse=True)
    assert by_bits[-1] < 1e-3 * by_bits[0]
    by_group = [error(group_size=size) for size in (-1, 32, 8)]
    assert by_group == sorted(by_group, reverse=True)


# ------------------------------------------------------------------------------------------------------ a real task


def repeated_words(number: int, seed: int) -> Tensor:
    """Sequences of a random word of five symbols, four times over: to go on, a model must look five back."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 51, (number, 5), generator=generator).repeat(1, 4)


@torch.no_grad()
def cross_entropy(model: nn.Module, blocks: Tensor) -> float:
    """Nats per token."""
    model.eval()
    return model(input_ids=blocks, labels=blocks).loss.item()


def fine_tune(model: nn.Module, folder: Path, steps: int, lr: float) -> None:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=lr,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    examples = [{"input_ids": row, "labels": row} for row in repeated_words(4000, seed=0)]
    Trainer(model=model, args=arguments, train_dataset=examples).train()


@pytest.fixture(scope="module")
def skilled(tmp_path_factory: pytest.TempPathFactory, bases: Bases) -> Path:
    """A full-precision model that has learned the task."""
    folder = tmp_path_factory.mktemp("skilled")
    model = bases.base("llama")
    fine_tune(model, folder / "runs", steps=250, lr=5e-3)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "kwargs",
    [{}, pytest.param({"learn_scale": False}, marks=pytest.mark.slow), {"grid": "nf", "train_other": "norms"}],
    ids=lambda k: "-".join(k) or "default",
)
def test_quantization_aware_fine_tuning_beats_rounding_and_packs(
    kwargs: dict[str, object], skilled: Path, tmp_path: Path
) -> None:
    """Without a teacher: plain `Trainer`, plain cross-entropy, 2 bits."""
    held_out = repeated_words(256, seed=1)
    full = cross_entropy(load(skilled), held_out)
    student = get_bitdistiller_model(load(skilled), config_for("llama", group_size="tensor", **kwargs))
    rounded = cross_entropy(student, held_out)
    teacher_before = copy_state(load(skilled))
    fine_tune(student, tmp_path, steps=60, lr=2e-3)
    trained = cross_entropy(student, held_out)
    print(f"full precision {full:.3f}, rounded {rounded:.3f}, trained {trained:.3f}")
    assert rounded > full + 0.3, "the task is too easy to tell"
    assert trained < full + 0.25 * (rounded - full)
    with student.disable_adapter():
        assert cross_entropy(student, held_out) == full
    packed: PreTrainedModel = student.pack_and_unload(progressbar=False)
    assert cross_entropy(packed, held_out) == trained
    packed.save_pretrained(tmp_path / "packed")
    assert cross_entropy(load(tmp_path / "packed"), held_out) == trained
    assert_same_tensors(copy_state(load(skilled)), teacher_before)


def test_training_is_repeatable(bases: Bases) -> None:
    def final() -> Tensor:
        student = bases.student("mixtral", learn_zero_point=True)
        train(student, steps=4)
        return logits(student)

    assert torch.equal(final(), final())
