"""GPTQ chooses the codes of its slow derivation, is never worse than rounding, and the student holds what it chose."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitdistiller_peft.calibration import CalibrationResult, GptqOptions, calibrate, gptq_sweep
from bitdistiller_peft.calibration.gptq import Compensated, compensate
from bitdistiller_peft.calibration.slots import Slot, find_student
from bitdistiller_peft.errors import BitDistillerError, ConfigError, StateError
from bitdistiller_peft.layers import quantized
from bitdistiller_peft.quantizers import (
    QuantSpec,
    dequantize,
    fake_quantize,
    find_params,
    quantize,
    store_learned_params,
)
from tests.calibration.derivation import check_codes as check_derivation
from tests.calibration.derivation import correlated, gram_of
from tests.calibration.models import IDS, student
from tests.tiny import token_ids

OUT, IN, TOKENS = 8, 48, 200
GRIDS = [("int", 2), ("int", 4), ("int_sym", 3), ("nf", 3), ("nf_sym", 3)]
GROUP_SIZES: list[int | Literal["tensor"]] = [8, 24, -1, "tensor"]
ARCHITECTURES = ("llama", "qwen2", "gpt2", "gemma3", "mixtral", "qwen3-moe")


@pytest.fixture
def weight(generator: torch.Generator) -> Tensor:
    return 0.1 * torch.randn(OUT, IN, generator=generator)


@pytest.fixture
def inputs(generator: torch.Generator) -> Tensor:
    return correlated(generator, IN, TOKENS)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize(("grid", "bits"), GRIDS)
@pytest.mark.parametrize("options", [{}, {"clip_search": False}, {"clip_search": False, "act_order": True}], ids=str)
def test_the_codes_are_those_of_the_derivation(
    grid: str, bits: int, group_size: int | Literal["tensor"], options: dict[str, Any], weight: Tensor, inputs: Tensor
) -> None:
    spec = QuantSpec.create(grid, bits, group_size=group_size, scale_dtype="float32")
    check_derivation(weight, inputs, spec, GptqOptions(**options, damping=0.02, block_size=20))


def test_the_order_of_inputs_matters(weight: Tensor, inputs: Tensor) -> None:
    spec = QuantSpec.create("int", 3, group_size=8)
    by = {flag: compensate(weight, gram_of(inputs), spec, GptqOptions(act_order=flag)) for flag in (False, True)}
    assert not torch.equal(by[False].values, by[True].values)


def test_blocks_change_nothing(weight: Tensor, inputs: Tensor) -> None:
    spec = QuantSpec.create("int", 3, group_size=8)
    found = [compensate(weight, gram_of(inputs), spec, GptqOptions(block_size=size)).values for size in (1, 8, 20, 128)]
    assert all((values == found[0]).float().mean() > 0.97 for values in found[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"clip_search": False}, {"act_order": True}], ids=str)
@pytest.mark.parametrize(("grid", "bits"), GRIDS)
def test_the_kept_weight_has_the_codes_that_were_chosen(
    grid: str, bits: int, options: dict[str, Any], dtype: torch.dtype, weight: Tensor, inputs: Tensor
) -> None:
    spec = QuantSpec.create(grid, bits, group_size=8)
    weight[0, :8] = weight[0, :8].abs()  # no negative weight
    weight[1, 8:16] = 0
    found = compensate(weight.to(dtype), gram_of(inputs), spec, GptqOptions(**options))
    assert found.weight.dtype == dtype
    assert torch.equal(dequantize(quantize(found.weight, found.params, spec), found.params, spec), found.values)
    for stored, again in zip(found.params, store_learned_params(found.params, spec), strict=True):
        assert stored is again is None or torch.equal(stored, again)


@given(
    seed=st.integers(0, 2**31),
    grid=st.sampled_from(GRIDS),
    group_size=st.sampled_from(GROUP_SIZES),
    tokens=st.integers(1, 100),
    flags=st.tuples(st.booleans(), st.booleans()),
)
@settings(max_examples=40, deadline=None)
def test_no_output_channel_is_ever_worse_than_rounded(
    seed: int,
    grid: tuple[str, int],
    group_size: int | Literal["tensor"],
    tokens: int,
    flags: tuple[bool, bool],
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, IN, generator=generator) * torch.rand(5, 1, generator=generator)
    inputs = correlated(generator, IN, tokens)
    spec = QuantSpec.create(*grid, group_size=group_size)
    options = GptqOptions(act_order=flags[0], clip_search=flags[1], factors=(1.0, 0.8, 0.6))
    found = compensate(weight, gram_of(inputs), spec, options)

    def error(values: Tensor) -> Tensor:
        return ((values - weight).double() @ inputs.double().T).square().mean(-1)

    plain = error(
        dequantize(quantize(weight, (p := store_learned_params(find_params(weight, spec), spec)), spec), p, spec)
    )
    noise = 1e-5 * float(found.energy.max())  # of products in fp32
    if group_size == "tensor":  # rows with one scale are kept or given up together
        assert found.error_after.sum() <= found.error_before.sum()
    else:
        assert bool((found.error_after <= found.error_before).all())
    torch.testing.assert_close(found.error_before.double(), plain, rtol=1e-3, atol=noise)
    torch.testing.assert_close(found.error_after.double(), error(found.values), rtol=1e-3, atol=noise)
    after, before = error(found.values), plain
    if group_size == "tensor":
        after, before = after.sum(), before.sum()
    assert bool((after <= before * (1 + 1e-3) + noise).all())


def test_errors_are_made_up_for(weight: Tensor, inputs: Tensor) -> None:
    spec = QuantSpec.create("int", 3, group_size=8)
    found = compensate(weight, gram_of(inputs), spec, GptqOptions(clip_search=False))
    assert found.error_after.sum() < 0.5 * found.error_before.sum()
    moved = fake_quantize(weight, spec) - weight
    assert (found.values - weight).square().sum() > moved.square().sum(), "weights move more, outputs less"


def test_without_inputs_weights_are_rounded(weight: Tensor) -> None:
    spec = QuantSpec.create("int", 2, group_size=8)
    found = compensate(weight, torch.zeros(IN, IN), spec, GptqOptions(clip_search=False))
    assert torch.equal(found.values, fake_quantize(weight, spec))
    assert torch.equal(found.weight, weight)


def test_an_input_that_is_always_zero_keeps_its_weights(weight: Tensor, inputs: Tensor) -> None:
    inputs[:, 5] = 0
    spec = QuantSpec.create("int", 3, group_size=8)
    found = compensate(weight, gram_of(inputs), spec, GptqOptions(clip_search=False))
    assert torch.equal(found.weight[:, 5], weight[:, 5])


def test_too_little_damping_for_too_few_inputs_is_refused(weight: Tensor, inputs: Tensor) -> None:
    with pytest.raises(ConfigError, match=r"`damping`.*Use 0\.01"):
        compensate(weight, gram_of(inputs[:3]), QuantSpec.create("int", 2, group_size=8), GptqOptions(damping=1e-14))


# ------------------------------------------------------------------------------------------------ whole models


def run(model: Any, **options: Any) -> CalibrationResult:
    return calibrate(model, None, IDS, **{"method": "gptq", "batch_size": 4, "show_progress": False, **options})


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Compensated]:
    """What was found for each slot, in turn."""
    seen: list[Compensated] = []

    def noted(*args: Any) -> Compensated:
        seen.append(compensate(*args))
        return seen[-1]

    monkeypatch.setattr(gptq_sweep, "compensate", noted)
    return seen


def check_codes(slots: list[Slot], result: CalibrationResult, found: list[Compensated]) -> None:
    by_name = {slot.name: slot for slot in slots}
    assert len(found) == len(slots)
    for report, chosen in zip(result.layers, found, strict=True):
        slot = by_name[report.name]
        codes, params = quantized(slot.student, "weight")
        assert torch.equal(codes, quantize(chosen.weight, chosen.params, slot.spec)), report.name
        assert torch.equal(params.scale, chosen.params.scale), report.name
        assert torch.equal(slot.student(), chosen.values), report.name


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_student_has_exactly_the_codes_that_were_chosen(name: str, models: Path, found: list[Compensated]) -> None:
    model = student(models, name)
    with torch.no_grad(), model.disable_adapter():
        teacher = model(input_ids=IDS).logits
    result = run(model)
    _, slots = find_student(model)
    check_codes(slots, result, found)
    assert all(report.error_after < report.error_before for report in result.layers)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, teacher)
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
        assert torch.equal(model.base_model.pack_and_unload(progressbar=False)(input_ids=IDS).logits, logits)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({"grid": "nf", "bits": 3}, {}),
        ({"grid": "nf_sym", "bits": 3}, {"act_order": True}),
        ({"grid": "int_sym", "bits": 4, "group_size": -1}, {}),
        ({"group_size": "tensor"}, {}),
        ({"grid": "fp", "bits": 3}, {}),
        ({"grid": "ternary"}, {}),
        ({"grid": "r2q"}, {"clip_search": False}),
        ({"learn_zero_point": True}, {"clip_weights": True}),
        ({"zero_point_range": (1, 2)}, {"clip_search": False}),
        ({"master_dtype": "base"}, {"clip_weights": True}),
    ],
    ids=str,
)
def test_every_kind_of_student_holds_its_codes(
    config: dict[str, Any], options: dict[str, Any], models: Path, found: list[Compensated]
) -> None:
    dtype = torch.bfloat16 if config.get("master_dtype") == "base" else torch.float32
    model = student(models, dtype=dtype, **config)
    result = run(model, **options)
    check_codes(find_student(model)[1], result, found)


def test_a_layer_sees_what_the_finished_ones_before_it_make(models: Path, found: list[Compensated]) -> None:
    outputs = {}
    for inputs in ("quantized", "full"):
        found.clear()
        run(student(models), inputs=inputs)
        outputs[inputs] = [chosen.values for chosen in found]
    same = [torch.equal(a, b) for a, b in zip(outputs["quantized"], outputs["full"], strict=True)]
    assert same[:3] == [True] * 3  # queries, keys and values of the first block
    assert not any(same[3:])


def test_students_that_follow_their_weights_are_refused(models: Path) -> None:
    model = student(models, learn_scale=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError, match=r"layer 'model\.layers\.0.*learn_scale=True"):
        run(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_interrupted_run_leaves_the_model_as_it_was(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = student(models).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own = [set(module.__dict__) for module in model.modules()]
    count = iter(range(100))

    def interrupted(*args: Any) -> Compensated:
        if next(count) == 9:
            raise KeyboardInterrupt
        return compensate(*args)

    monkeypatch.setattr(gptq_sweep, "compensate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [set(module.__dict__) for module in model.modules()] == own
    assert model.training


def test_a_grid_without_ranges_says_what_to_do(models: Path) -> None:
    with pytest.raises(ConfigError, match=r"layer 'model\.layers\.0.*clip_search=False"):
        run(student(models, grid="r2q"))


def test_skipped_layers_keep_min_max(models: Path) -> None:
    model = student(models)
    result = run(model, skip=("q_proj",))
    for slot in find_student(model)[1]:
        is_skipped = slot.layer_name.endswith("q_proj")
        assert torch.equal(slot.student(), fake_quantize(slot.layer.base_weight("weight"), slot.spec)) is is_skipped
    assert [report.note for report in result.layers].count("skipped") == 2


def test_experts_without_tokens_are_rounded(models: Path) -> None:
    model = student(models, "mixtral")
    base, slots = find_student(model)
    for number in range(2):  # the last expert is never chosen
        router = base.get_submodule(f"model.layers.{number}.mlp.gate")
        router.register_forward_hook(lambda module, args, output: (*output[:2], output[2].clamp(max=2)))
    original = {slot.name: slot.weight.clone() for slot in slots}
    result = run(model)
    notes = {report.name: report.note for report in result.layers}
    for slot in (slot for slot in slots if "experts" in slot.name):
        assert "1 of 4 experts saw no token" in notes[slot.name]
        assert torch.equal(slot.student()[3], fake_quantize(original[slot.name][3], slot.spec))
        assert not torch.equal(slot.student()[0], fake_quantize(original[slot.name][0], slot.spec))


def test_a_bar_is_shown_and_the_result_is_kept(models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = student(models)
    result = run(model, show_progress=True, output_path=tmp_path / "gptq.safetensors")
    assert "14/14" in capfd.readouterr().err
    assert str(result).startswith("method=gptq, 14 of 14 parameters, 6 samples of 24 tokens")
    loaded = CalibrationResult.load(tmp_path / "gptq.safetensors")
    assert str(loaded) == str(result)
    with pytest.raises(StateError, match="save_pretrained"):
        loaded.apply(student(models))


def test_text_may_be_used_twice_without_harm(models: Path) -> None:
    model = student(models)
    run(model)
    first = [slot.student() for slot in find_student(model)[1]]
    calibrate(model, None, token_ids(1, 8), method="blockwise", clip_search=False, epochs=0, show_progress=False)
    assert all(torch.equal(slot.student(), values) for slot, values in zip(find_student(model)[1], first, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 0}, "damping"),
        ({"damping": "some"}, "damping"),
        ({"block_size": 0}, "block_size"),
        ({"act_order": 1}, "act_order"),
        ({"clip_search": None}, "clip_search"),
        ({"objective": "weight"}, "method='clip'"),
        ({"inputs": "clipped"}, "'quantized' or 'full'"),
        ({"epochs": 2}, "option"),
    ],
    ids=str,
)
def test_options_outside_their_rule_are_refused(options: dict[str, Any], message: str, models: Path) -> None:
    with pytest.raises(BitDistillerError, match=message):
        run(student(models), **options)
