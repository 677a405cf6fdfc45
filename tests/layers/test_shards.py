"""What is sharded is told from what is not, and put together only for as long as it is asked for."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from bitdistiller_peft.layers import gathered, is_sharded, unsharded, whole
from tests.sharding import process_group


def test_modules_hold_whole_parameters_for_the_time_being(generator: torch.Generator) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    values = torch.randn(3, 4, generator=generator)
    model[0].weight.data.copy_(values)
    model[1].weight.requires_grad_(False)
    with process_group():
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        parts = dict(model.named_parameters())
        assert all(is_sharded(parameter) for parameter in parts.values())
        with unsharded(model, None):
            assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
            assert torch.equal(model[0].weight, values)
            assert [p.requires_grad for p in model.parameters()] == [True, True, False, True]
        assert all(parts[name] is parameter for name, parameter in model.named_parameters())
        with pytest.raises(ZeroDivisionError), unsharded(model):
            raise ZeroDivisionError
        assert all(parts[name] is parameter for name, parameter in model.named_parameters())


def test_what_is_whole_stays_what_it_is() -> None:
    layer = nn.Linear(4, 3)
    weight = layer.weight
    assert not is_sharded(weight)
    assert whole(weight) is weight
    with gathered([weight]), unsharded(layer):
        assert layer.weight is weight
