"""What the doctor measures is right: against slow formulas, on every grid, and at a bounded cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bitdistiller_peft.layers import companion, quantized
from bitdistiller_peft.training.doctor import Probes
from bitdistiller_peft.training.doctor.probes import OSCILLATION_LOOKS, Probe
from bitdistiller_peft.training.metrics import trained_weights
from tests.training import helpers


class Holder(torch.nn.Module):
    """A weight whose codes are what a test says: 2 bits, symmetric, scale 1, levels -2 to 1."""

    def __init__(self, codes: list[int]) -> None:
        from bitdistiller_peft.layers import attach_learned_params
        from bitdistiller_peft.quantizers import QuantParams, QuantSpec

        super().__init__()
        self.weight = torch.nn.Parameter(self.of(codes))
        self.spec = QuantSpec.create("int_sym", 2, group_size=-1, scale_dtype="float32")
        params = QuantParams(torch.ones(1, 1))
        attach_learned_params(self, "weight", self.spec, learn_scale=True, learn_zero_point=False, params=params)

    @staticmethod
    def of(codes: list[int]) -> torch.Tensor:
        return torch.tensor([codes], dtype=torch.float32) - 2

    def probe(self) -> Probe:
        return Probe(self, "weight", spec=self.spec, num_weights=100, expects_scales=True)


def swinging(history: list[list[int]]) -> list[float]:
    """The share of oscillating codes after every look, one code and one look at a time."""
    shares = []
    for now in range(1, len(history)):
        count = 0
        for place in range(len(history[0])):
            last_direction, last_back = 0, None
            for look in range(1, now + 1):
                change = history[look][place] - history[look - 1][place]
                if change and last_direction and (change > 0) != (last_direction > 0):
                    last_back = look
                last_direction = change or last_direction
            count += last_back is not None and now - last_back < OSCILLATION_LOOKS
        shares.append(count / len(history[0]))
    return shares


def test_a_code_oscillates_where_it_turns_back_and_for_a_few_looks() -> None:
    generator = torch.Generator().manual_seed(0)
    # held, then random: many turn back, some rest for longer than they count
    history = [torch.randint(0, 4, (16,), generator=generator).tolist() for _ in range(8)]
    history += [history[-1]] * (OSCILLATION_LOOKS + 1) + [[0] * 16, [1] * 16, [2] * 16, [1] * 16]
    holder = Holder(history[0])
    probe = holder.probe()
    seen = []
    for codes in history[1:]:
        holder.weight.data.copy_(holder.of(codes))
        count, total = probe.look().counts["oscillation"]
        seen.append(count / total)
    assert seen == swinging(history)
    assert 0 in seen
    assert max(seen) > 0.5


def test_rest_does_not_make_a_code_swing() -> None:
    holder = Holder([0, 1, 2, 3])
    probe = holder.probe()
    for _ in range(300):  # more looks than the counter holds
        assert probe.look().counts["oscillation"][0] == 0


@pytest.mark.parametrize(("weight", "is_clamped"), [(1.49, 0), (1.51, 1), (-2.49, 0), (-2.51, 1), (0.0, 0)])
def test_a_weight_is_clamped_half_a_step_beyond_the_last_level(weight: float, is_clamped: int) -> None:
    holder = Holder([0, 1, 2, 3])
    probe = holder.probe()
    holder.weight.data[0, 0] = weight
    assert probe.look().counts["clamped"] == (is_clamped, 4)


def test_levels_without_a_weight_are_dead() -> None:
    holder = Holder([0, 1, 2, 3])
    probe = holder.probe()
    assert probe.look().counts["dead_levels"] == (0, 4)
    holder.weight.data.copy_(holder.of([2, 2, 2, 1]))
    assert probe.look().counts["dead_levels"] == (2, 4)


def test_scales_are_dead_at_the_floor_or_where_they_never_moved(bases: Path) -> None:
    model = helpers.student(bases)
    probes = Probes(model)
    assert probes.look()["dead_scales"] == 1.0  # none has moved yet
    scales = [companion(module, name, "_scale") for module, name, _ in trained_weights(model)]
    with torch.no_grad():
        for scale in scales:
            scale.mul_(1.25)
        assert probes.look()["dead_scales"] == 0.0
        scales[0].fill_(-1.0)
    found = probes.look()
    assert found["dead_scales"] == pytest.approx(scales[0].numel() / sum(s.numel() for s in scales))
    worst = max(probes.by_layer, key=lambda name: probes.by_layer[name]["dead_scales"])
    assert worst == "model.layers.0.self_attn.q_proj.weight"
    assert probes.by_layer[worst]["dead_scales"] == 1.0


def test_drift_is_relative_to_the_start(bases: Path) -> None:
    model = helpers.student(bases)
    probes = Probes(model)
    with torch.no_grad():
        for number, (module, name, _) in enumerate(trained_weights(model)):
            companion(module, name, "_scale").mul_(1.5 if number == 3 else 0.9)
    found = probes.look()
    assert found["scale_drift"] == pytest.approx(0.1, rel=1e-5)
    assert found["scale_drift_max"] == pytest.approx(0.5, rel=1e-5)
    assert probes.look() == found, "what was there at the start stays the reference"


def test_frozen_scales_are_not_expected_to_move(bases: Path) -> None:
    model = helpers.student(bases)
    assert "dead_scales" not in Probes(model, expects_scales=False).look()
    assert "dead_scales" not in Probes(helpers.student(bases, learn_scale=False)).look()


def test_half_precision_weights_that_do_not_move_are_counted(bases: Path) -> None:
    assert "stuck_weights" not in Probes(helpers.student(bases)).look()
    model = helpers.student(bases).to(torch.bfloat16)
    probes = Probes(model)
    assert probes.look()["stuck_weights"] == 1.0
    weights = [getattr(module, name) for module, name, _ in trained_weights(model)]
    with torch.no_grad():
        for weight in weights:
            weight[: len(weight) // 2] += 1e-3
    clamped = probes.look()
    assert clamped["stuck_weights"] == pytest.approx(0.5, abs=0.01)


GRIDS: dict[str, dict[str, Any]] = {
    "int": {}, "recomputed": {"learn_scale": False}, "zero-points": {"learn_zero_point": True},
    "int8": {"bits": 8}, "nf": {"grid": "nf"}, "fp3": {"grid": "fp", "bits": 3}, "nf4": {"grid": "nf4", "bits": 4},
    "ternary": {"grid": "ternary", "group_size": "tensor"}, "r2q": {"grid": "r2q"}, "rows": {"group_size": -1},
}  # fmt: skip


@pytest.mark.parametrize("name", GRIDS)
def test_every_grid_can_be_looked_at_and_codes_are_those_that_are_packed(name: str, bases: Path) -> None:
    model = helpers.student(bases, **GRIDS[name])
    probes = Probes(model)
    found = probes.look()
    assert all(0 <= value <= 1 for value in found.values())
    assert found["oscillation"] == found["scale_drift"] == 0
    assert ("dead_levels" in found) == (name != "int8")
    for probe, (module, parameter, _) in zip(probes._probes.values(), trained_weights(model), strict=True):
        codes = quantized(module, parameter)[0]
        assert torch.equal(probe._codes.reshape(codes.shape), codes)


def test_a_low_rank_update_is_looked_at_where_it_is_rounded(bases: Path) -> None:
    model = helpers.student(bases, trainable="lora", lora_rank=2)
    probes = Probes(model)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_(std=0.02, generator=generator)
    assert probes.look()["clamped"] > 0, "weights have moved"
    for probe, (module, parameter, _) in zip(probes._probes.values(), trained_weights(model), strict=True):
        codes = quantized(module, parameter)[0]
        assert torch.equal(probe._codes.reshape(codes.shape), codes)


@pytest.mark.parametrize("name", ["mixtral", "gpt2"])
def test_experts_and_transposed_layers_are_looked_at(name: str, bases: Path) -> None:
    found = Probes(helpers.student(bases, name=name))
    found.look()
    assert len(found.by_layer) == len(trained_weights(helpers.student(bases, name=name)))


def test_the_cost_does_not_grow_with_the_model(bases: Path) -> None:
    model = helpers.student(bases)
    widths = sum(getattr(module, name).shape[-1] for module, name, _ in trained_weights(model))
    probes = Probes(model, num_weights=4096)
    sizes = [probe._codes.numel() for probe in probes._probes.values()]
    assert sum(sizes) <= 4096 + widths  # at most a row more each
    whole = Probes(model).look()
    part = probes.look()
    assert part["clamped"] == pytest.approx(whole["clamped"], abs=0.01)
    assert set(part) == set(whole)
