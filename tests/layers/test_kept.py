"""Values that are kept are computed once, serve graphs of their own, and never outlive a change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bitdistiller_peft.layers import FakeQuantWeight, KeptValues, Trained
from bitdistiller_peft.quantizers import QuantSpec, base
from tests.quantizers.samples import normal

SPEC = QuantSpec.create("int", 3, group_size=16)


def module(**trained: Any) -> FakeQuantWeight:
    return FakeQuantWeight(normal(8, 32), SPEC, Trained(**{"scale": True, **trained}))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How often a weight was quantized, on the reference's way."""
    calls: list[int] = []
    original = base.Sweeps.values

    def values(self: base.Sweeps, *args: Any) -> Tensor:
        calls.append(1)
        return original(self, *args)

    monkeypatch.setattr(base.Sweeps, "values", values)
    from bitdistiller_peft.kernels import use_backend

    with use_backend("reference"):
        yield calls


def gradients(weight: FakeQuantWeight, values: Tensor, seed: int) -> dict[str, Tensor]:
    named = {name: p for name, p in weight.named_parameters() if p.requires_grad}
    upstream = normal(*values.shape, seed=seed).to(values.dtype)
    grads = torch.autograd.grad(values, list(named.values()), upstream)
    return dict(zip(named, grads, strict=True))


def test_nothing_is_kept_unless_asked(counted: list[int]) -> None:
    weight = module()
    weight(), weight()
    assert len(counted) == 2


@pytest.mark.parametrize("trained", [{}, {"scale": False}, {"zero_point": True}, {"lora_rank": 2, "weight": False}])
def test_each_graph_gets_the_gradients_of_its_own(trained: dict[str, Any], counted: list[int]) -> None:
    weight = module(**trained)
    wanted = [gradients(weight, weight(), seed) for seed in (1, 2, 3)]
    once = KeptValues([weight])
    once.start()
    counted.clear()
    each = [weight() for _ in wanted]  # three graphs at a time
    got = [gradients(weight, values, seed) for seed, values in enumerate(each, start=1)]
    assert len(counted) == 1
    assert torch.equal(each[0], each[2])
    for ours, theirs in zip(got, wanted, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    once.stop()
    weight()
    assert len(counted) == 2


@pytest.mark.parametrize("name", ["weight", "weight_scale", "weight_zero_point", "weight_lora_B"])
def test_writing_in_place_is_noticed(name: str) -> None:
    weight = module(zero_point=True, lora_rank=2)
    once = KeptValues([weight])
    once.start()
    before = weight().detach().clone()
    with torch.no_grad():
        tensor = getattr(weight, name)
        tensor.add_(0.5 if name == "weight_zero_point" else 1.0)
    after = weight().detach().clone()
    once.stop()
    assert not torch.equal(before, after)
    assert torch.equal(after, weight())


def test_another_tensor_in_its_place_is_noticed() -> None:
    weight = module()
    once = KeptValues([weight])
    once.start()
    weight()
    weight.weight.data = normal(8, 32, seed=5)
    after = weight().detach().clone()
    once.stop()
    assert torch.equal(after, weight())


def test_what_is_written_past_the_counters_must_be_forgotten() -> None:
    weight = module()
    once = KeptValues([weight])
    once.start()
    before = weight().detach().clone()
    weight.weight.detach().numpy()[:] += 1.0  # as an optimizer with kernels of its own does
    assert torch.equal(weight(), before)
    once.forget()
    assert not torch.equal(weight(), before)


def test_dtypes_are_kept_apart_and_rounded_once() -> None:
    weight = module()
    once = KeptValues([weight])
    once.start()
    half, full = weight(torch.bfloat16), weight()
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, full.to(torch.bfloat16))
    assert full.dtype == torch.float32
    assert weight(torch.bfloat16).data_ptr() == half.data_ptr()
    assert weight().data_ptr() == full.data_ptr()
    grads = gradients(weight, half, 1)
    wanted = torch.autograd.grad(full, weight.weight, normal(8, 32, seed=1).bfloat16().float())
    assert torch.equal(grads["weight"], wanted[0])


def test_checkpoints_hold_nothing_of_it() -> None:
    weight = module()
    names = set(weight.state_dict())
    once = KeptValues([weight])
    once.start()
    weight()
    assert set(weight.state_dict()) == names
