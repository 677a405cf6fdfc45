"""Fused experts run their own forward on quantized weights; the module is untouched, also by two threads at once."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitdistiller_peft.layers import (
    FakeQuantExperts,
    PackedExperts,
    attach_learned_params,
    forward_with,
    packed_tensors,
    quant_specs,
    quantized,
    to_fake_quant_experts,
    to_packed_experts,
)
from bitdistiller_peft.quantizers import QuantSpec, fake_quantize
from tests.quantizers.samples import each_grid, normal

NAMES = ("gate_up_proj", "down_proj")
EXPERTS, WIDTH, INNER = 3, 8, 12


class Experts(nn.Module):
    """As models have them: 3-D parameters and a forward that reads them by name."""

    meeting: threading.Barrier | None = None

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(normal(EXPERTS, 2 * INNER, WIDTH))
        self.gate_up_proj_bias = nn.Parameter(normal(EXPERTS, 2 * INNER, seed=1))
        self.down_proj = nn.Parameter(normal(EXPERTS, WIDTH, INNER, seed=2))
        self.act = nn.SiLU()

    def mix(self, hidden: Tensor, expert: int) -> Tensor:
        gate, up = F.linear(hidden, self.gate_up_proj[expert], self.gate_up_proj_bias[expert]).chunk(2, -1)
        return self.act(gate) * up

    def forward(self, hidden_states: Tensor, chosen: list[int], *, factor: float = 1.0) -> Tensor:
        if self.meeting is not None:
            self.meeting.wait()  # both threads are inside
        return factor * sum(F.linear(self.mix(hidden_states, expert), self.down_proj[expert]) for expert in chosen)


def specs(grid: str = "int", bits: int = 3) -> dict[str, QuantSpec]:
    return {name: QuantSpec.create(grid, bits, group_size=4) for name in NAMES}


def fake(grid: str = "int", bits: int = 3, *, learn_scale: bool = True) -> Experts:
    experts = Experts()
    to_fake_quant_experts(experts)
    for name, spec in specs(grid, bits).items():
        attach_learned_params(experts, name, spec, learn_scale=learn_scale, learn_zero_point=False)
    return experts


def packed(grid: str = "int", bits: int = 3) -> Experts:
    experts, source = Experts(), fake(grid, bits)
    for name, spec in specs(grid, bits).items():
        width = getattr(experts, name).shape[-1]
        to_packed_experts(experts, name, spec, packed_tensors(*quantized(source, name), spec), width)
    return experts


def dense(grid: str, bits: int, dtype: torch.dtype = torch.float32) -> Experts:
    """The same experts with the quantized values written into ordinary parameters."""
    experts = Experts().to(dtype)
    for name, spec in specs(grid, bits).items():
        setattr(experts, name, nn.Parameter(fake_quantize(getattr(Experts(), name), spec).to(dtype)))
    return experts


def everything_in(module: nn.Module) -> dict[str, object]:
    return {
        **{key: value for key, value in module.__dict__.items() if not isinstance(value, dict)},
        **{key: dict(value) for key, value in module.__dict__.items() if isinstance(value, dict)},
    }


hidden = normal(5, WIDTH, seed=3)


@each_grid
def test_experts_in_training_run_on_the_quantized_values(grid: str, bits: int) -> None:
    wanted = dense(grid, bits)(hidden, [0, 2], factor=0.5)
    for learn_scale in (False, True):
        assert torch.equal(fake(grid, bits, learn_scale=learn_scale)(hidden, [0, 2], factor=0.5), wanted)


@each_grid
def test_packed_experts_run_on_the_quantized_values(grid: str, bits: int) -> None:
    assert torch.equal(packed(grid, bits)(hidden, [0, 2], factor=0.5), dense(grid, bits)(hidden, [0, 2], factor=0.5))


@pytest.mark.parametrize("make", [fake, packed])
def test_low_precision_and_autocast_are_followed(make: object) -> None:
    experts = make()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(experts(hidden, [1]), dense("int", 3)(hidden, [1]))
    low = hidden.bfloat16()
    experts.gate_up_proj_bias.data = experts.gate_up_proj_bias.bfloat16()
    assert torch.equal(experts(low, [1]), dense("int", 3, torch.bfloat16)(low, [1]))


@each_grid
def test_gradients_are_those_of_the_fake_quantized_stack(grid: str, bits: int) -> None:
    experts = fake(grid, bits)
    experts(hidden, [0, 2]).square().sum().backward()
    plain = dense(grid, bits)
    plain(hidden, [0, 2]).square().sum().backward()
    for name, spec in specs(grid, bits).items():
        weight = getattr(Experts(), name).detach().requires_grad_()
        scale = getattr(experts, name + "_scale").detach()
        zero_point, negative = (getattr(experts, name + suffix, None) for suffix in ("_zero_point", "_scale_negative"))
        value = fake_quantize(weight, spec, scale=scale, zero_point=zero_point, scale_negative=negative)
        value.backward(getattr(plain, name).grad)
        assert torch.equal(getattr(experts, name).grad, weight.grad)
        assert not bool(getattr(experts, name).grad[1].any())  # the expert that was not chosen
        assert bool(getattr(experts, name + "_scale").grad.any())


@pytest.mark.parametrize("make", [fake, packed])
def test_a_forward_leaves_the_module_as_it_was(make: object) -> None:
    experts = make()
    before = everything_in(experts)
    experts(hidden, [0, 1])
    assert everything_in(experts) == before
    assert not set(NAMES) & set(experts.__dict__)


def test_a_forward_that_fails_leaves_the_module_as_it_was() -> None:
    experts = packed()
    before = everything_in(experts)
    with pytest.raises(IndexError):
        experts(hidden, [EXPERTS])
    assert everything_in(experts) == before


@pytest.mark.parametrize("make", [fake, packed])
def test_two_threads_can_be_inside_at_once(make: object) -> None:
    experts = make()
    wanted = [experts(hidden * factor, [0, 1]).detach() for factor in (1.0, 2.0)]
    experts.meeting = threading.Barrier(2, timeout=10)
    got: list[Tensor | None] = [None, None]

    def run(index: int, factor: float) -> None:
        got[index] = experts(hidden * factor, [0, 1]).detach()

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate((1.0, 2.0))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])


def test_a_stand_in_shows_other_tensors_and_shares_the_rest() -> None:
    experts = Experts()
    zeros = torch.zeros_like(experts.down_proj)
    assert not bool(forward_with(experts, {"down_proj": zeros}, Experts.forward, hidden, [0]).any())
    assert bool(experts(hidden, [0]).any())
    seen = forward_with(experts, {}, lambda stand_in: (type(stand_in), stand_in.act, stand_in.down_proj))
    assert seen == (Experts, experts.act, experts.down_proj)


def test_the_class_keeps_its_name_and_is_mixed_only_once() -> None:
    experts = packed()
    assert type(experts).__name__ == "Experts"
    assert type(experts).__module__ == Experts.__module__
    assert isinstance(experts, Experts)
    assert [base.__name__ for base in type(experts).__mro__].count("PackedExperts") == 1
    assert isinstance(experts, PackedExperts)
    training = fake()
    kind = type(training)
    to_fake_quant_experts(training)
    assert type(training) is kind
    assert isinstance(training, FakeQuantExperts)
    assert type(Experts()) is Experts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_changes_the_bias_beside_a_packed_weight_and_nothing_that_is_packed(dtype: torch.dtype) -> None:
    experts = packed("nf", 3)
    before = {name: tensor.clone() for name, tensor in experts.state_dict().items()}
    nn.Sequential(experts).to(dtype)
    for name, tensor in experts.state_dict().items():
        if name == "gate_up_proj_bias":
            assert tensor.dtype == dtype
        else:
            assert tensor.dtype == before[name].dtype, name
            assert torch.equal(tensor, before[name]), name
    assert experts(hidden.to(dtype), [0, 1]).dtype == dtype


@pytest.mark.parametrize("make", [fake, packed])
def test_copies_and_state_dicts_carry_everything(make: object) -> None:
    experts = make()
    wanted = experts(hidden, [0, 1]).detach()
    twin, other = copy.deepcopy(experts), make()
    other.load_state_dict(experts.state_dict())
    assert torch.equal(twin(hidden, [0, 1]), wanted)
    assert torch.equal(other(hidden, [0, 1]), wanted)
    assert quant_specs(twin) == specs()
    assert twin.gate_up_proj is not experts.gate_up_proj
