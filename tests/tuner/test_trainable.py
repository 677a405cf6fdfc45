"""What of a layer is trained: everything, scales alone, or a low-rank update inside the rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from bitdistiller_peft import BitDistillerConfig, calibrate, get_bitdistiller_model
from bitdistiller_peft.errors import ConfigError, StateError, UnknownNameError
from bitdistiller_peft.kernels import dequantize_packed, fake_quantize
from bitdistiller_peft.layers import FakeQuantWeight, iter_quantized, packed_params, quant_specs, quantized
from tests.tiny import token_ids
from tests.tuner.common import (
    Bases,
    gradients,
    logits,
    overlays,
    run,
    teacher_logits,
    train,
    trainable,
    without_dropout,
)

ARCHITECTURES = ["llama", "gpt2", "mixtral"]
LORA = {"trainable": "lora", "lora_rank": 4, "lora_alpha": 8.0}


def students(model: PeftModel) -> dict[str, FakeQuantWeight]:
    found = {}
    for name, layer in overlays(model).items():
        found |= {f"{name}.{parameter}": layer.active_student(parameter) for parameter in layer.parameter_names}
    return found


def textbook(student: FakeQuantWeight) -> Tensor:
    """W + alpha / rank * B A, expert by expert, in fp64."""
    weight, down, up = (getattr(student, f"weight{suffix}").detach() for suffix in ("", "_lora_A", "_lora_B"))
    stacks = [t.reshape(-1, *t.shape[-2:]).double() for t in (weight, down, up)]
    rows = [w + 8.0 / 4 * (b @ a) for w, a, b in zip(*stacks, strict=True)]
    return torch.stack(rows).reshape(weight.shape)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scales_alone_are_trained_and_weights_stay(name: str, bases: Bases) -> None:
    student = without_dropout(bases.student(name, trainable="quantization", learn_zero_point=True))
    assert {key.rpartition("weight")[2] for key in trainable(student)} == {"_scale", "_zero_point"}
    before = {key: module.weight.detach().clone() for key, module in students(student).items()}
    start = logits(student)
    train(student)
    assert not torch.equal(logits(student), start)
    assert all(torch.equal(module.weight, before[key]) for key, module in students(student).items())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_update_starts_at_nothing_and_is_inside_the_rounding(name: str, bases: Bases) -> None:
    plain, student = bases.student(name), without_dropout(bases.student(name, **LORA))
    assert torch.equal(logits(student), logits(plain))
    kinds = {key.rpartition("weight")[2] for key in trainable(student)}
    assert kinds == {"_scale", "_lora_A", "_lora_B"}
    train(student)
    for module in students(student).values():
        assert module.weight_lora_B.any()
        expected = fake_quantize(
            textbook(module).float(),
            quant_specs(module)["weight"],
            scale=module.weight_scale,
            zero_point=module.weight_zero_point,
        )
        share_equal = (module() == expected).double().mean()
        assert share_equal > 0.999  # fp64 sums round a value at a threshold to the other side now and then


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_update_is_gone_when_packed_and_nothing_changes(name: str, bases: Bases, tmp_path: Path) -> None:
    student = without_dropout(bases.student(name, **LORA))
    train(student)
    codes = {key: quantized(module, "weight")[0] for key, module in students(student).items()}
    values = {key: module().detach() for key, module in students(student).items()}
    expected = logits(student)
    student.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(bases.base(name), tmp_path)
    assert torch.equal(logits(again), expected)
    assert all(torch.equal(quantized(module, "weight")[0], codes[key]) for key, module in students(again).items())
    packed = student.pack_and_unload(progressbar=False)
    assert torch.equal(logits(packed), expected)
    for module_name, module, parameter, spec in iter_quantized(packed):
        key, params = f"{module_name}.{parameter}", packed_params(module, parameter)
        dense = dequantize_packed(getattr(module, parameter), params, spec, values[key].shape[-1], torch.float32)
        assert torch.equal(dense, values[key])


def test_gradients_of_the_factors_are_those_of_the_chain_rule(bases: Bases) -> None:
    """Through the gradient that a trained weight would get: dB = c G A^T, dA = c B^T G."""
    student = without_dropout(bases.student("llama", **LORA))
    train(student)
    twin = without_dropout(bases.student("llama"))
    with torch.no_grad():
        for key, module in students(twin).items():
            module.weight.copy_(textbook(students(student)[key]))
            module.weight_scale.copy_(students(student)[key].weight_scale)
    whole, parts = gradients(twin), gradients(student)
    for key, grad in whole.items():
        if not key.endswith("default.weight"):
            continue
        up, down = (dict(student.named_parameters())[key + s].detach().double() for s in ("_lora_B", "_lora_A"))
        torch.testing.assert_close(parts[key + "_lora_B"].double(), 2 * grad.double() @ down.T, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(parts[key + "_lora_A"].double(), 2 * up.T @ grad.double(), rtol=1e-3, atol=1e-6)


def test_frozen_weights_stay_frozen_however_adapters_are_switched(bases: Bases, tmp_path: Path) -> None:
    student = bases.student("llama", **LORA)
    student.add_adapter("scales", BitDistillerConfig(group_size=32, trainable="quantization"))
    student.set_adapter("scales")
    assert {key.rpartition("weight")[2] for key in trainable(student)} == {"_scale"}
    student.set_adapter("default")
    assert not any(key.endswith(".weight") for key in trainable(student))
    student.save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(bases.base("llama"), tmp_path)
    assert not trainable(frozen)
    resumed = PeftModel.from_pretrained(bases.base("llama"), tmp_path, is_trainable=True)
    assert {key.rpartition("weight")[2] for key in trainable(resumed)} == {"_scale", "_lora_A", "_lora_B"}


def test_the_teacher_is_the_base_and_merging_writes_what_was_trained(bases: Bases) -> None:
    student = without_dropout(bases.student("llama", **LORA))
    base = logits(bases.base("llama"))
    train(student)
    assert torch.equal(teacher_logits(student), base)
    expected = logits(student)
    torch.testing.assert_close(logits(student.merge_and_unload()), expected)


def test_frozen_bf16_weights_keep_updates_that_are_smaller_than_their_steps(bases: Bases) -> None:
    student = bases.student("llama", master_dtype="base", **LORA)
    module = next(iter(students(student).values()))
    module.weight.data = module.weight.data.bfloat16()
    with torch.no_grad():
        module.weight_lora_B.fill_(1e-5)
    from bitdistiller_peft.layers import latent_weight

    assert latent_weight(module, "weight").dtype == torch.float32
    assert not torch.equal(latent_weight(module, "weight"), module.weight.float())


def test_calibration_comes_before_the_update(bases: Bases) -> None:
    student = bases.student("llama", **LORA)
    calibrate(student, None, token_ids(), show_progress=False)
    train(student)
    with pytest.raises(StateError, match=r"calibrated before .* layer 'model\.layers\.0"):
        calibrate(student, None, token_ids(), show_progress=False)


@pytest.mark.parametrize("outputs_are", [torch.bfloat16])
def test_autocast_does_not_round_the_factors(bases: Bases, outputs_are: torch.dtype) -> None:
    student = without_dropout(bases.student("llama", **LORA))
    train(student)
    module = next(iter(students(student).values()))
    plain = module()
    with torch.autocast("cpu", outputs_are):
        assert torch.equal(module(), plain)
        assert run(student).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"trainable": "half"}, UnknownNameError, "trainable"),
        ({"trainable": "quantization", "learn_scale": False}, ConfigError, "nothing would be trained"),
        ({"trainable": "lora", "lora_rank": 0}, ConfigError, "`lora_rank` must be a positive integer"),
        ({"trainable": "lora", "lora_rank": True}, ConfigError, "`lora_rank` must be a positive integer"),
        ({"trainable": "lora", "lora_alpha": float("inf")}, ConfigError, "`lora_alpha` must be positive"),
    ],
    ids=["unknown", "nothing", "rank 0", "rank True", "alpha"],
)
def test_what_cannot_work_is_refused(changes: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BitDistillerConfig(**changes)


def test_scales_recomputed_from_the_updated_weight(bases: Bases) -> None:
    student = get_bitdistiller_model(bases.base("llama"), BitDistillerConfig(group_size=32, learn_scale=False, **LORA))
    train(without_dropout(student))
    for module in students(student).values():
        expected = fake_quantize(textbook(module).float(), quant_specs(module)["weight"])
        assert (module() - expected).abs().max() < 0.05 * expected.abs().max()
    packed = student.pack_and_unload(progressbar=False)
    assert logits(packed).isfinite().all()
