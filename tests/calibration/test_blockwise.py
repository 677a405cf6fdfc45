"""Block-wise reconstruction makes each block's output more like the full-precision block's, and keeps its promises."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitdistiller_peft.calibration import BlockReport, CalibrationResult, blockwise, calibrate, sweep
from bitdistiller_peft.calibration.slots import find_student
from bitdistiller_peft.errors import ConfigError, StateError, TrainingError, UnknownNameError
from bitdistiller_peft.tuner import full_precision
from tests.calibration.models import ARCHITECTURES, IDS, student

QUICK = {"method": "blockwise", "epochs": 4, "learning_rate": 0.02, "show_progress": False}


def run(model: nn.Module, **options: Any) -> CalibrationResult:
    return calibrate(model, None, IDS, **{**QUICK, **options})


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def final_error(model: nn.Module) -> float:
    """How far the student's logits are from the teacher's, relative."""
    base, _ = find_student(model)
    with torch.no_grad():
        with full_precision(base):
            target = base(input_ids=IDS).logits
        return float((base(input_ids=IDS).logits - target).square().sum() / target.square().sum())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_block_gets_better_and_only_the_student_changes(name: str, models: Path) -> None:
    model, clipped = student(models, name), student(models, name)
    before = state(model)
    calibrate(clipped, None, IDS, show_progress=False)
    result = run(model)
    assert len(result.blocks) == 2
    for report in result.blocks:
        assert report.error_after < report.error_clipped < report.error_before, report
    assert final_error(model) < final_error(clipped)
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert all(".bitdistiller_" in key for key in changed)
    for slot in find_student(model)[1]:
        assert f"base_model.model.{slot.layer_name}.bitdistiller_{slot.parameter}.default.weight" in changed
        assert f"base_model.model.{slot.layer_name}.bitdistiller_{slot.parameter}.default.weight_scale" in changed


def test_the_table_shows_the_blocks(models: Path) -> None:
    lines = str(run(student(models))).splitlines()
    assert lines[0].startswith("method=blockwise")
    assert lines[1].split() == ["block", "error", "before", "clipped", "after", "seconds"]
    assert [line.split()[0] for line in lines[3:5]] == ["model.layers.0", "model.layers.1"]


@pytest.mark.parametrize(
    "config", [{"learn_scale": False}, {"learn_zero_point": True}, {"grid": "nf"}, {"grid": "int_sym"}]
)
def test_every_kind_of_student_is_trained(config: dict[str, Any], models: Path) -> None:
    model = student(models, **config)
    before = state(model)
    result = run(model, scale_learning_rate=0.01)
    assert all(report.error_after < report.error_clipped for report in result.blocks)
    if config.get("learn_zero_point"):
        moved = [
            k for k, v in model.state_dict().items() if k.endswith("_zero_point") and not torch.equal(v, before[k])
        ]
        assert moved
        assert any((v % 1 != 0).any() for k, v in model.state_dict().items() if k in moved)


def test_only_scales_move_where_the_weights_rate_is_zero(models: Path) -> None:
    model = student(models)
    before = state(model)
    run(model, learning_rate=0, clip_search=False, scale_learning_rate=1e-3)
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed
    assert all(key.endswith("_scale") for key in changed)


def test_inputs_come_from_the_student_and_targets_from_where_asked(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[Tensor]] = {}
    original = blockwise._Block._train

    def train(self: Any, options: Any) -> None:
        if self.name.endswith(".1"):
            seen[options.targets] = [self.hidden[0].clone(), self.targets[0].clone()]
        original(self, options)

    monkeypatch.setattr(blockwise._Block, "_train", train)
    monkeypatch.setattr(blockwise, "_fast_dtype", lambda *of: nullcontext())
    model = student(models)
    run(model, targets="full", seed=3)
    base, _ = find_student(model)
    block = base.get_submodule("model.layers.1")
    entering: list[Tensor] = []
    leaving: list[Tensor] = []
    arguments: list[tuple[Any, Any]] = []

    def watch(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        entering.append(args[0])
        leaving.append(output)
        arguments.append((args, kwargs))

    handle = block.register_forward_hook(watch, with_kwargs=True)
    with torch.no_grad():
        base(input_ids=IDS[:1], use_cache=False)
        with full_precision(base):
            base(input_ids=IDS[:1], use_cache=False)
    handle.remove()
    torch.testing.assert_close(seen["full"][0], entering[0])
    torch.testing.assert_close(seen["full"][1], leaving[1])
    run(student(models), targets="quantized", seed=3)
    torch.testing.assert_close(seen["quantized"][0], entering[0])
    with torch.no_grad(), full_precision(base):
        target = block(*arguments[0][0], **arguments[0][1])
    torch.testing.assert_close(seen["quantized"][1], target)
    assert (target - leaving[1]).abs().max() > 0.01


def test_blocks_without_quantized_layers_are_passed_by(models: Path) -> None:
    result = run(student(models, layers_to_transform=[1]))
    assert [report.name for report in result.blocks] == ["model.layers.1"]
    result = run(student(models, layers_to_transform=[0]))
    assert [report.name for report in result.blocks] == ["model.layers.0"]


def test_a_targeted_head_is_clipped_at_the_end(models: Path) -> None:
    model = student(models, target_modules=["down_proj", "lm_head"])
    result = run(model)
    assert result.layers[-1].name == "lm_head.weight"
    head = find_student(model)[1][-1]
    assert torch.equal(head.student(), head.quantized_in(*result.ranges["lm_head.weight"]))
    assert result.layers[-1].error_after < result.layers[-1].error_before


def test_it_can_be_repeated_and_gives_back_what_it_borrowed(models: Path) -> None:
    model, twin = student(models, "gpt2").train(), student(models, "gpt2")
    norm = model.base_model.model.get_submodule("transformer.h.0.ln_1")
    norm.requires_grad_(True)
    grads = [parameter.requires_grad for parameter in model.parameters()]
    random_state = torch.get_rng_state()
    run(model)
    assert [parameter.requires_grad for parameter in model.parameters()] == grads
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random_state)
    torch.manual_seed(123)
    run(twin)
    other = twin.state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("at", ["_clip", "_train"])
def test_an_interrupted_run_keeps_finished_blocks_and_restores_the_one_at_work(
    at: str, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, whole = student(models), student(models)
    before = state(model)
    run(whole)
    original = getattr(blockwise._Block, at)

    def interrupted(self: Any, *args: Any) -> None:
        original(self, *args)
        if self.name.endswith(".1"):
            raise KeyboardInterrupt

    monkeypatch.setattr(blockwise._Block, at, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model)
    finished = whole.state_dict()
    for name, tensor in model.state_dict().items():
        expected = finished[name] if ".layers.0." in name else before[name]
        assert torch.equal(tensor, expected), name
    assert all("forward" not in slot.student.__dict__ for slot in find_student(model)[1])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_loss_that_is_not_finite_is_refused_with_the_block_named(models: Path) -> None:
    model = student(models)
    before = state(model)
    model.base_model.model.get_submodule("model.layers.0.post_attention_layernorm").weight.data[:] = 1e30
    with pytest.raises((TrainingError, ValueError), match=r"model\.layers\.0"):
        run(model, clip_search=False)
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items() if "bitdistiller" in k)


def test_a_model_that_is_no_row_of_blocks_is_refused(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise.BlockRunner, "create", lambda *args: None)
    with pytest.raises(StateError, match="method='clip'"):
        run(student(models))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epochs": -1}, ConfigError, "epochs"),
        ({"epochs": 1.5}, ConfigError, "epochs"),
        ({"learning_rate": -1}, ConfigError, "learning_rate"),
        ({"scale_learning_rate": 2}, ConfigError, "scale_learning_rate"),
        ({"warmup": 1}, ConfigError, "warmup"),
        ({"targets": "both"}, UnknownNameError, "targets"),
        ({"loss": "huber"}, UnknownNameError, "loss"),
        ({"clip_tokens": 0}, ConfigError, "clip_tokens"),
        ({"clip_tokens": 1e4}, ConfigError, "clip_tokens"),
        ({"learning_rates": 1}, UnknownNameError, "Did you mean 'learning_rate'"),
    ],
)
def test_options_outside_their_rule_are_refused(
    options: dict[str, Any], error: type[Exception], message: str, models: Path
) -> None:
    with pytest.raises(error, match=message):
        run(student(models), **options)


@pytest.mark.parametrize(("tokens", "batches"), [(1, 1), (2 * IDS.shape[1], 2), (10**6, len(IDS))])
def test_the_clip_search_looks_at_as_many_tokens_as_asked(
    tokens: int, batches: int, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[list[int]] = []

    def watch(stages: Any, run_batch: Any, num_batches: int, **options: Any) -> None:
        looked.append([])
        capture(stages, lambda index: (looked[-1].append(index), run_batch(index)), num_batches, **options)

    capture = sweep.capture
    monkeypatch.setattr(sweep, "capture", watch)
    run(student(models), epochs=0, clip_tokens=tokens)
    assert looked
    assert all(indices == list(range(batches)) for indices in looked)


def test_no_single_token_decides_a_normalized_loss(models: Path) -> None:
    """A decoder's first tokens have activations hundreds of times larger than all others."""
    losses = {}
    for loss in ("normalized", "mse"):
        work = blockwise._Block.__new__(blockwise._Block)
        output = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0))
        work.targets = [output.clone()]
        output[0, 3] += 1  # an error somewhere
        options = blockwise.BlockwiseOptions(loss=loss)
        alone = torch.nn.functional.mse_loss(*work._compared(output, 0, options))
        output[0, 0] *= 300
        work.targets[0][0, 0] *= 303  # one per cent off, at a huge token
        both = torch.nn.functional.mse_loss(*work._compared(output, 0, options))
        losses[loss] = float(both / alone)
    assert losses["normalized"] == pytest.approx(1, abs=1e-3)
    assert losses["mse"] > 5


def test_the_report_is_plain_data() -> None:
    report = BlockReport("model.layers.0", 0.3, 0.1, 0.05, 1.0)
    assert report == BlockReport("model.layers.0", 0.3, 0.1, 0.05, 1.0)


def test_a_head_that_cannot_be_searched_is_refused_before_anything_is_done(models: Path) -> None:
    model = student(models, grid="r2q", target_modules=["down_proj", "lm_head"])
    before = state(model)
    with pytest.raises(ConfigError, match=r"layer 'lm_head'.*in no decoder block.*skip=\('lm_head',\)"):
        run(model, clip_search=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    result = run(model, clip_search=False, skip=("lm_head",))
    assert {report.name: report.note for report in result.layers}["lm_head.weight"] == "skipped"
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all("down_proj" in name for name in changed)
