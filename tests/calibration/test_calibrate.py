"""`calibrate` fits every linear layer, front to back, and gives back all it borrowed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitdistiller_peft.calibration import CalibrationResult, calibrate, sweep
from bitdistiller_peft.calibration.capture import Gram
from bitdistiller_peft.calibration.clip import search_range
from bitdistiller_peft.calibration.slots import Slot, find_student
from bitdistiller_peft.errors import BitDistillerError, ConfigError, DataError, StateError, UnknownNameError
from bitdistiller_peft.layers import set_learned_params
from bitdistiller_peft.quantizers import find_params, get_quantizer
from tests.calibration.models import ARCHITECTURES, IDS, student
from tests.tiny import load, save_base, token_ids


def run(model: nn.Module, **options: Any) -> CalibrationResult:
    return calibrate(model, None, IDS, **{"batch_size": 4, "show_progress": False, **options})


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


@contextmanager
def inputs_of(slots: list[Slot], width: int = 32) -> Iterator[dict[str, Gram]]:
    """Gram matrices of what enters linear layers while the block runs."""
    grams = {slot.name: Gram(width) for slot in slots}
    handles = [
        slot.layer.register_forward_pre_hook(lambda module, args, gram=grams[slot.name]: gram.add(args[0]))
        for slot in slots
    ]
    yield grams
    for handle in handles:
        handle.remove()


def gram(grams: dict[str, Gram], slot: Slot) -> Tensor:
    mean = grams[slot.name].mean()
    assert mean is not None
    return mean


# ------------------------------------------------------------------------------------------------ what it does


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_quantized_parameter_gets_better_and_only_the_student_changes(name: str, models: Path) -> None:
    model = student(models, name)
    before = state(model)
    with torch.no_grad(), model.disable_adapter():
        teacher = model(input_ids=IDS).logits
    result = run(model)
    _, slots = find_student(model)
    assert sorted(report.name for report in result.layers) == sorted(slot.name for slot in slots)
    for report in result.layers:
        assert report.error_after < report.error_before, report
        assert report.shrink_low < 1, report
        assert report.shrink_high < 1, report
        assert not report.note
    touched = changed(model, before)
    assert all(".bitdistiller_" in key for key in touched)
    assert sum(key.endswith("_scale") for key in touched) == len(slots)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, teacher)


@pytest.mark.parametrize("grid", ["int", "int_sym", "nf", "ternary"])
def test_the_student_shows_what_was_found(grid: str, models: Path) -> None:
    model = student(models, grid=grid)
    _, slots = find_student(model)
    originals = {slot.name: slot.weight.clone() for slot in slots}
    result = run(model)
    for slot in slots:
        low, high = result.ranges[slot.name]
        params = get_quantizer(slot.spec.grid).params_from_range(low, high, slot.spec)
        fresh = student(models, grid=grid).base_model.model.get_submodule(slot.layer_name).active_student("weight")
        set_learned_params(fresh, "weight", params)
        assert torch.equal(fresh.weight, originals[slot.name])
        assert torch.equal(slot.student(), fresh()), f"{slot.name}: clamping the master weight changed a value"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"grid": "r2q"}, "got grid='r2q', .* Use refine='alternating'"),
        ({"grid": "ternary", "learn_scale": False}, "grid='ternary': got learn_scale=False"),
    ],
    ids=["r2q", "ternary"],
)
def test_a_grid_whose_scales_follow_from_no_range_is_refused_before_anything_runs(
    config: dict[str, Any], says: str, models: Path
) -> None:
    model = student(models, **config)
    before = state(model)
    for method in ("clip", "blockwise"):
        with pytest.raises(ConfigError, match=rf"^In layer 'model\.layers\.0\..*{says}"):
            run(model, method=method)
    assert not changed(model, before)
    others = student(models, **{"overrides": {"down_proj": config}} if "learn_scale" not in config else config)
    result = run(others, skip=("down_proj",) if "learn_scale" not in config else (".*_proj",))
    assert {report.note for report in result.layers if "down_proj" in report.name} == {"skipped"}


@torch.no_grad()
def test_each_layer_was_searched_on_inputs_made_by_the_calibrated_ones_before_it(models: Path) -> None:
    model = student(models)
    result = run(model, clip_weights=False)
    base, slots = find_student(model)
    with inputs_of(slots) as grams:
        for batch in IDS.split(4):
            base(input_ids=batch)
    for slot in slots:  # a layer's own weights do not change its inputs, so the finished model shows the same ones
        again = search_range(slot.weight, gram(grams, slot), slot.spec)
        low, high = result.ranges[slot.name]
        assert (again.low == low).float().mean() > 0.99, slot.name
        assert (again.high == high).float().mean() > 0.99, slot.name
    plain = student(models)
    base, slots = find_student(plain)
    with inputs_of(slots) as grams:
        base(input_ids=IDS)
    last = slots[-1]
    naive = search_range(last.weight, gram(grams, last), last.spec)
    assert not torch.equal(naive.low, result.ranges[last.name][0]), "the test could not tell the difference"


@torch.no_grad()
def test_as_published_the_prefix_is_clipped_but_not_rounded(models: Path) -> None:
    model = student(models, learn_scale=False)
    originals = {slot.name: slot.weight.clone() for slot in find_student(model)[1]}
    skip = ("q_proj", "k_proj")
    result = run(model, inputs="clipped", order="block", skip=skip)
    _, slots = find_student(model)
    assert sorted(result.ranges) == sorted(
        name for name in originals if not name.endswith(("q_proj.weight", "k_proj.weight"))
    )
    # the first layer that is searched in the second block sees the first block, all of it, clipped
    values = next(slot for slot in slots if slot.name == "model.layers.1.self_attn.v_proj.weight")
    clipped = load(save_base("llama", models))
    for slot in slots:
        clipped.get_submodule(slot.layer_name).weight.data = slot.weight.clone()
    hooked: list[Tensor] = []
    clipped.get_submodule(values.layer_name).register_forward_pre_hook(lambda module, args: hooked.append(args[0]))
    clipped(input_ids=IDS)
    seen = Gram(32)
    seen.add(hooked[0])
    mean = seen.mean()
    assert mean is not None
    again = search_range(originals[values.name], mean, values.spec, clamp_weight=True)
    assert (again.low == result.ranges[values.name][0]).float().mean() > 0.99


def test_without_learned_scales_the_master_weights_are_clipped(models: Path) -> None:
    model = student(models, learn_scale=False)
    result = run(model)
    for slot in find_student(model)[1]:
        low, high = slot.min_max()
        assert torch.equal(low, result.ranges[slot.name][0])
        assert torch.equal(high, result.ranges[slot.name][1])
        torch.testing.assert_close(slot.student(), slot.quantized_in(low, high), rtol=0, atol=0)


def test_master_weights_stay_whole_unless_asked(models: Path) -> None:
    model = student(models)
    before = {slot.name: slot.weight.clone() for slot in find_student(model)[1]}
    run(model, clip_weights=False)
    assert all(torch.equal(slot.weight, before[slot.name]) for slot in find_student(model)[1])
    run(model, clip_weights=True)
    assert not any(torch.equal(slot.weight, before[slot.name]) for slot in find_student(model)[1])


def test_the_search_can_be_repeated(models: Path) -> None:
    model = student(models)
    first, second = run(model), run(model)
    assert str(first).splitlines()[3].split()[1:5] == str(second).splitlines()[3].split()[1:5]
    for name, (low, high) in first.ranges.items():
        assert torch.equal(second.ranges[name][0], low)
        assert torch.equal(second.ranges[name][1], high)


def test_skipped_layers_keep_min_max_and_are_reported(models: Path) -> None:
    model = student(models)
    result = run(model, skip=("q_proj", "k_proj"))
    for slot in find_student(model)[1]:
        is_skipped = slot.layer_name.endswith(("q_proj", "k_proj"))
        assert (slot.name in result.ranges) is not is_skipped
        if is_skipped:
            params = find_params(slot.weight, slot.spec)
            assert torch.equal(slot.student.weight_scale, params.scale.float())
    assert [report.note for report in result.layers].count("skipped") == 4


def test_the_weight_objective_needs_no_forward_pass(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = student(models)

    def never(*args: Any) -> None:
        raise AssertionError("ran the model")

    monkeypatch.setattr(model.base_model.model, "forward", never)
    result = calibrate(model, None, None, objective="weight", show_progress=False)
    assert len(result.ranges) == 14
    with pytest.raises(DataError, match="must be given"):
        calibrate(model, None, None, show_progress=False)
    slot = find_student(model)[1][0]
    reference = search_range(
        student(models).base_model.model.get_submodule(slot.layer_name).base_weight("weight"),
        torch.eye(32).expand(2, 32, 32),
        slot.spec,
    )
    assert torch.equal(reference.low, result.ranges[slot.name][0])


def test_a_targeted_head_is_calibrated_too_and_last(models: Path) -> None:
    model = student(models, target_modules=["q_proj", "down_proj", "lm_head"])
    result = run(model)
    assert [report.name for report in result.layers][-1] == "lm_head.weight"
    assert result.layers[-1].error_after < result.layers[-1].error_before
    base, slots = find_student(model)
    with torch.no_grad(), inputs_of([slots[-1]]) as grams:
        for batch in IDS.split(4):
            base(input_ids=batch)
    fresh = student(models, target_modules=["lm_head"])
    original = find_student(fresh)[1][0]
    again = search_range(original.weight, gram(grams, slots[-1]), original.spec)
    assert (again.low == result.ranges["lm_head.weight"][0]).float().mean() > 0.99


def test_a_model_that_is_no_row_of_blocks_is_calibrated_on_one_pass(
    models: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sweep.BlockRunner, "create", lambda *args: None)
    result = run(student(models))
    assert "block by block" in caplog.text
    assert len(result.ranges) == 14
    assert all(report.error_after < report.error_before for report in result.layers)


def test_experts_without_tokens_keep_min_max_and_are_reported(models: Path) -> None:
    model = student(models, "mixtral")
    base, slots = find_student(model)
    for number in range(2):  # the last expert is never chosen
        router = base.get_submodule(f"model.layers.{number}.mlp.gate")
        router.register_forward_hook(lambda module, args, output: (*output[:2], output[2].clamp(max=2)))
    whole = {slot.name: slot.min_max() for slot in slots}
    result = run(model)
    reports = {report.name: report for report in result.layers}
    experts = [slot.name for slot in slots if "experts" in slot.name]
    assert len(experts) == 4
    for name in experts:
        assert "1 of 4 experts saw no token" in reports[name].note
        assert torch.equal(result.ranges[name][0][3], whole[name][0][3])
        assert not torch.equal(result.ranges[name][0][0], whole[name][0][0])


@pytest.mark.parametrize(
    "config", [{"group_size": -1}, {"group_size": "tensor"}, {"learn_zero_point": True}, {"bits": 3}]
)
def test_every_kind_of_student_is_served(config: dict[str, Any], models: Path) -> None:
    result = run(student(models, **config))
    assert all(report.error_after < report.error_before for report in result.layers)


def test_a_bf16_model_is_calibrated(models: Path) -> None:
    result = run(student(models, dtype=torch.bfloat16))
    assert all(report.error_after < report.error_before for report in result.layers)


# ------------------------------------------------------------------------------------------------ what it gives back


def test_train_mode_gradients_and_random_states_are_given_back(models: Path) -> None:
    model = student(models, "gpt2").train()
    base, slots = find_student(model)
    base.get_submodule("transformer.h.1.mlp").eval()
    slots[3].student.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    grads = [parameter.requires_grad for parameter in model.parameters()]
    own = [set(module.__dict__) for module in model.modules()]
    random_state = torch.get_rng_state()
    run(model)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == grads
    assert [set(module.__dict__) for module in model.modules()] == own
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_an_interrupted_search_leaves_the_model_as_it_was(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = student(models).train()
    before = state(model)
    own = [set(module.__dict__) for module in model.modules()]
    count = iter(range(100))

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if next(count) == 9:
            raise KeyboardInterrupt
        return search_range(*args, **kwargs)

    monkeypatch.setattr(sweep, "search_range", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model)
    assert not changed(model, before)
    assert [set(module.__dict__) for module in model.modules()] == own
    assert model.training


def test_the_result_does_not_depend_on_the_batches(models: Path) -> None:
    one, many = (run(student(models), batch_size=size) for size in (1, 6))
    for name in one.ranges:
        assert (one.ranges[name][0] == many.ranges[name][0]).float().mean() > 0.98, name


def test_the_inner_tuner_model_is_accepted(models: Path) -> None:
    peft_model = student(models)
    assert len(run(peft_model.base_model).ranges) == 14


# ------------------------------------------------------------------------------------------------ what it refuses


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "clips"}, UnknownNameError, "Did you mean 'clip'"),
        ({"factor": (1.0,)}, UnknownNameError, "Did you mean 'factors'"),
        ({"epochs": 2}, UnknownNameError, "option"),
        ({"objective": "loss"}, UnknownNameError, "objective"),
        ({"inputs": "raw"}, UnknownNameError, "inputs"),
        ({"order": "random"}, UnknownNameError, "order"),
        ({"factors": (0.9, 0.8)}, ConfigError, "with 1 among them"),
        ({"factors": (1.0, 0.0)}, ConfigError, r"\(0, 1\]"),
        ({"factors": "many"}, ConfigError, "numbers"),
        ({"skip": "q_proj"}, ConfigError, r"Pass \('q_proj',\)"),
        ({"skip": ("query",)}, ConfigError, "must name quantized layers"),
        ({"batch_size": 0}, ConfigError, "batch_size"),
        ({"num_samples": 0}, ConfigError, "num_samples"),
    ],
)
def test_options_outside_their_rule_are_refused(
    options: dict[str, Any], error: type[BitDistillerError], message: str, models: Path
) -> None:
    model = student(models)
    before = state(model)
    with pytest.raises(error, match=message):
        run(model, **options)
    assert not changed(model, before)


def test_other_models_are_refused(models: Path) -> None:
    with pytest.raises(StateError, match="must come from get_bitdistiller_model"):
        run(load(save_base("llama", models)))
    model = student(models)
    with model.disable_adapter(), pytest.raises(StateError, match=r"enabled: layer 'model\.layers\.0"):
        run(model)
    model.merge_adapter()
    with pytest.raises(StateError, match=r"merged: layer 'model\.layers\.0"):
        run(model)
    packed = student(models).base_model.pack_and_unload(progressbar=False)
    with pytest.raises(StateError, match="cannot be calibrated"):
        run(packed)


def test_windows_longer_than_the_model_are_refused(models: Path) -> None:
    with pytest.raises(ConfigError, match="at most 128"):
        calibrate(student(models), None, token_ids(1, 129), show_progress=False)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_activations_that_are_not_finite_are_refused_with_the_layer_named(models: Path) -> None:
    model = student(models)
    base, slots = find_student(model)
    base.get_submodule("model.layers.1.input_layernorm").weight.data[3] = torch.nan
    before = state(model)
    with pytest.raises(DataError, match=r"input of layer 'model\.layers\.1\.self_attn\.q_proj'"):
        run(model)
    assert not any(".bitdistiller_" in name for name in changed(model, before))
    assert all("forward" not in slot.student.__dict__ for slot in slots)


def test_a_weight_that_is_not_finite_is_refused_with_the_layer_named(models: Path) -> None:
    model = student(models)
    slot = find_student(model)[1][8]
    slot.student.weight.data[0, 0] = torch.inf
    with pytest.raises(BitDistillerError, match=slot.layer_name.replace(".", r"\.")):
        run(model)


def test_a_bar_is_shown_only_when_asked(models: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(student(models))
    assert "Calibrating" not in capfd.readouterr().err
    run(student(models), show_progress=True)
    assert "14/14" in capfd.readouterr().err
