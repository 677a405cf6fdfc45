"""Activation-aware scaling leaves the student's function and the teacher's bits, and never makes rounding worse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from bitdistiller_peft import BitDistillerConfig, get_bitdistiller_model
from bitdistiller_peft.calibration import CalibrationResult, awq, calibrate
from bitdistiller_peft.calibration.awq import input_scale
from bitdistiller_peft.calibration.slots import Display, find_student
from bitdistiller_peft.errors import BitDistillerError, ConfigError, StateError
from bitdistiller_peft.quantizers import fake_quantize
from tests.calibration.models import IDS, student
from tests.tiny import load, save_base

ALPHAS = (0.0, 0.3, 0.6)
NOT_SCALED = "not scaled"


def uneven(folder: Path, name: str = "llama", *, bits: int = 2, **config: Any) -> PeftModel:
    """A student of a model whose norms make some features larger than others, as in trained models."""
    base = load(save_base(name, folder))
    random = torch.Generator().manual_seed(1)
    for key, parameter in base.named_parameters():
        if parameter.ndim == 1 and key.endswith("weight"):
            parameter.data += 3 * torch.rand(parameter.shape, generator=random)
    return get_bitdistiller_model(base, BitDistillerConfig(bits=bits, group_size=32, **config))


def run(model: nn.Module, **options: Any) -> CalibrationResult:
    return calibrate(
        model, None, IDS, **{"method": "awq", "batch_size": 4, "alphas": ALPHAS, "show_progress": False, **options}
    )


@torch.no_grad()
def teacher(model: Any) -> Tensor:
    with model.disable_adapter():
        return model(input_ids=IDS).logits


@torch.no_grad()
def unrounded(model: Any) -> Tensor:
    """What the student would say if nothing were rounded."""
    with Display() as display:
        for slot in find_student(model)[1]:
            display.show(slot, slot.weight)
        return model(input_ids=IDS).logits


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def scaled(result: CalibrationResult) -> dict[str, str]:
    """Where the scales of each scaled layer of the first block were taken back."""
    notes = {report.name: report.note for report in result.layers if ".0." in report.name}
    return {
        name.removesuffix(".weight").rpartition(".")[2]: note.partition("taken back in ")[2]
        .strip("'")
        .rpartition(".")[2]
        for name, note in notes.items()
        if NOT_SCALED not in note
    }


INPUT = {"q_proj": "input_layernorm", "k_proj": "input_layernorm", "v_proj": "input_layernorm"}
MLP = {"gate_proj": "post_attention_layernorm", "up_proj": "post_attention_layernorm", "down_proj": "up_proj"}
GEMMA = {**MLP, "gate_proj": "pre_feedforward_layernorm", "up_proj": "pre_feedforward_layernorm"}
OPT = dict.fromkeys(INPUT, "self_attn_layer_norm") | {"fc1": "final_layer_norm"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", {**INPUT, **MLP}),
        ("qwen2", {**INPUT, **MLP}),
        ("gpt2", {"c_attn": "ln_1", "c_fc": "ln_2"}),
        ("opt", OPT),
        ("gemma3", {**INPUT, **GEMMA}),  # gains are stored without the one that is added to them
        ("mixtral", INPUT),  # the router reads what the experts read
    ],
)
def test_scales_are_taken_back_exactly_and_in_the_student_alone(
    name: str, expected: dict[str, str], models: Path
) -> None:
    model = uneven(models, name, train_other="norms")
    exact, before = teacher(model), state(model)
    result = run(model)
    assert scaled(result) == expected
    assert torch.equal(teacher(model), exact)
    torch.testing.assert_close(unrounded(model), exact, rtol=1e-4, atol=1e-5)
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert any("modules_to_save" in key for key in changed)
    assert all("modules_to_save" in key or ".bitdistiller_" in key for key in changed)


def test_values_take_back_the_scales_of_the_output_projection_where_heads_share_none(
    models: Path,
) -> None:
    # in OPT every head has values of its own; without its biases, which are the teacher's, they can be scaled
    model = student(models, "opt")
    base, _ = find_student(model)
    for module in base.modules():
        if isinstance(module, nn.Linear):
            module.bias = None
    exact = teacher(model)
    result = run(model)
    assert scaled(result) == {"out_proj": "v_proj", "fc2": "fc1"}  # ReLU lets positive scales pass
    torch.testing.assert_close(unrounded(model), exact, rtol=1e-4, atol=1e-5)


def test_a_norm_that_the_student_puts_before_a_layer_takes_its_scales_back(models: Path) -> None:
    model = uneven(models, subln="output")
    random = torch.Generator().manual_seed(2)
    for slot in find_student(model)[1]:
        norm = slot.layer.input_norm("default")
        if norm is not None:
            norm.weight.data.uniform_(0.2, 4, generator=random)
    exact, before = teacher(model), unrounded(model)
    found = scaled(run(model))
    assert {name: fold for name, fold in found.items() if name in ("o_proj", "down_proj")} == {
        "o_proj": "default",
        "down_proj": "default",
    }
    assert torch.equal(teacher(model), exact)
    torch.testing.assert_close(unrounded(model), before, rtol=1e-4, atol=1e-5)


def test_without_norms_of_its_own_the_student_leaves_layers_unscaled_and_says_so(models: Path) -> None:
    model = student(models)
    exact = teacher(model)
    result = run(model)
    assert scaled(result) == {"down_proj": "up_proj"}
    notes = {report.name: report.note for report in result.layers}
    assert "train_other='norms'" in notes["model.layers.0.self_attn.q_proj.weight"]
    assert "nothing before it" in notes["model.layers.0.self_attn.o_proj.weight"]
    assert torch.equal(teacher(model), exact)


@pytest.mark.parametrize("config", [{}, {"grid": "nf", "bits": 3}, {"learn_scale": False}], ids=str)
def test_no_set_of_layers_is_worse_than_unscaled(config: dict[str, Any], models: Path) -> None:
    model = uneven(models, train_other="norms", **config)
    result = run(model)
    errors = {r.name: (r.error_before, r.error_after) for r in result.layers}
    stages = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
    for block in (0, 1):
        for stage in stages:
            pairs = [e for n, e in errors.items() if f".{block}." in n and n.removesuffix(".weight").endswith(stage)]
            assert len(pairs) == len(stage)
            assert sum(after for _, after in pairs) <= sum(before for before, _ in pairs)
    assert sum(after for _, after in errors.values()) < 0.97 * sum(before for before, _ in errors.values())


@torch.no_grad()
def test_the_reported_errors_are_those_of_the_outputs(models: Path) -> None:
    model = student(models, train_other="norms")
    base, slots = find_student(model)
    slot = next(slot for slot in slots if slot.name == "model.layers.0.mlp.down_proj.weight")
    original, seen = slot.weight.clone(), []
    handle = slot.layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with model.disable_adapter():
        base(input_ids=IDS)
    handle.remove()
    inputs = seen[0].flatten(0, 1).double()
    report = next(r for r in run(model, clip_search=False).layers if r.name == slot.name)
    scale = slot.weight / original
    torch.testing.assert_close(scale, scale[:1].expand_as(scale))
    moved = (slot.student() / scale - original).double()
    energy = (inputs @ original.double().T).square().sum()
    assert report.error_after == pytest.approx(float((inputs @ moved.T).square().sum() / energy), rel=1e-3)
    plain = (fake_quantize(original, slot.spec) - original).double()
    assert report.error_before == pytest.approx(float((inputs @ plain.T).square().sum() / energy), rel=1e-3)


def test_scales_follow_the_magnitudes() -> None:
    magnitude = torch.tensor([1.0, 4.0, 16.0, 0.0])
    assert torch.equal(input_scale(magnitude, 0.0), torch.ones(4))
    torch.testing.assert_close(input_scale(magnitude, 0.5), torch.tensor([0.5, 1.0, 2.0, 1.0]))
    assert torch.equal(input_scale(torch.zeros(3), 0.5), torch.ones(3))


def test_what_was_scaled_is_saved_loaded_and_packed(models: Path, tmp_path: Path) -> None:
    model = student(models, "qwen2", train_other="norms")
    run(model, output_path=tmp_path / "awq.safetensors")
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(load(save_base("qwen2", models)), tmp_path / "adapter")
        assert torch.equal(again(input_ids=IDS).logits, logits)
        assert torch.equal(model.base_model.pack_and_unload(progressbar=False)(input_ids=IDS).logits, logits)
    with pytest.raises(StateError, match="save_pretrained"):
        CalibrationResult.load(tmp_path / "awq.safetensors").apply(again)


def test_skipped_layers_and_those_that_share_their_inputs_stay_unscaled(models: Path) -> None:
    model = uneven(models, train_other="norms")
    result = run(model, skip=("q_proj",))
    assert scaled(result) == MLP
    notes = {report.name: report.note for report in result.layers}
    assert notes["model.layers.0.self_attn.q_proj.weight"] == "not scaled: skipped; skipped"
    assert notes["model.layers.0.self_attn.k_proj.weight"] == "not scaled: skipped"


def test_a_head_outside_of_the_blocks_is_searched_but_not_scaled(models: Path) -> None:
    model = student(models, target_modules=["down_proj", "lm_head"])
    report = run(model).layers[-1]
    assert report.name == "lm_head.weight"
    assert report.note == "not scaled: outside of the blocks"
    assert report.shrink_low < 1


@pytest.mark.parametrize("moment", ["scaling", "searching"])
def test_an_interrupted_run_leaves_the_model_as_it_was(
    moment: str, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = student(models, train_other="norms").train()
    before = state(model)
    own = [set(module.__dict__) for module in model.modules()]

    def stop(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(awq, "input_scale" if moment == "scaling" else "segments", stop)
    with pytest.raises(KeyboardInterrupt):
        run(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [set(module.__dict__) for module in model.modules()] == own
    assert model.training


def test_a_bar_counts_both_passes(models: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(student(models), show_progress=True)
    assert "28/28" in capfd.readouterr().err
    run(student(models), show_progress=True, clip_search=False)
    assert "14/14" in capfd.readouterr().err


def test_a_model_that_is_no_row_of_blocks_is_refused(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(awq.BlockRunner, "create", lambda *args: None)
    with pytest.raises(StateError, match="block by block"):
        run(student(models))


def test_a_grid_without_ranges_is_scaled_but_not_searched(models: Path) -> None:
    model = uneven(models, train_other="norms", grid="r2q")
    before = state(model)
    with pytest.raises(ConfigError, match=r"layer 'model\.layers\.0.*clip_search=False"):
        run(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    exact = teacher(model)
    result = run(model, clip_search=False)
    assert sum(r.error_after for r in result.layers) <= sum(r.error_before for r in result.layers)
    for slot in find_student(model)[1]:
        assert torch.equal(slot.student(), fake_quantize(slot.weight, slot.spec))
    assert torch.equal(teacher(model), exact)
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
        assert torch.equal(model.base_model.pack_and_unload(progressbar=False)(input_ids=IDS).logits, logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alphas": (0.5,)}, "with 0 among them"),
        ({"alphas": (0.0, 1.5)}, r"\[0, 1\]"),
        ({"alphas": "all"}, "numbers"),
        ({"clip_search": 1}, "clip_search"),
        ({"objective": "weight"}, "method='clip'"),
        ({"damping": 0.1}, "option"),
    ],
    ids=str,
)
def test_options_outside_their_rule_are_refused(options: dict[str, Any], message: str, models: Path) -> None:
    with pytest.raises(BitDistillerError, match=message):
        run(student(models), **options)
