"""Packed layers on the CPU kernels: what is stored never changes, what is cached follows it, and torch's tools work."""

from __future__ import annotations

import copy
import gc
import io
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from bitdistiller_peft.errors import WeightError
from bitdistiller_peft.kernels import release_streams, use_backend
from bitdistiller_peft.kernels.cpu import CpuBackend, ops
from bitdistiller_peft.kernels.cpu.library import load
from bitdistiller_peft.kernels.cpu.weights import STREAMS
from bitdistiller_peft.layers import PackedLinear
from bitdistiller_peft.quantizers import QuantSpec, find_params, quantize
from tests.quantizers.samples import normal

pytestmark = pytest.mark.skipif(load() is None, reason="the CPU kernels cannot be compiled on this machine")

SPEC = QuantSpec.create("int", 2, group_size=32)


def make_layer(seed: int = 0, bias: bool = False) -> PackedLinear:
    weight = normal(13, 96, seed=seed)
    params = find_params(weight, SPEC)
    return PackedLinear.from_codes(quantize(weight, params, SPEC), params, SPEC, normal(13, seed=2) if bias else None)


def expected(layer: PackedLinear, inputs: Tensor) -> Tensor:
    with use_backend("reference"):
        return layer(inputs)


def assert_follows(layer: PackedLinear) -> None:
    """The layer multiplies by what it stores now."""
    torch.testing.assert_close(layer(normal(2, 96)), expected(layer, normal(2, 96)))


def stored(layer: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in layer.state_dict().items()}


@pytest.fixture(autouse=True)
def _on_the_cpu_backend() -> object:
    with use_backend("cpu"):
        yield


def test_use_leaves_every_stored_byte_as_it_was() -> None:
    layer = make_layer(bias=True)
    before = stored(layer)
    layer(normal(2, 96))
    layer(normal(100, 96))
    assert stored(layer) == before
    assert set(before) == {"weight", "weight_scale", "weight_zero_point", "bias"}


def test_one_stream_serves_until_the_weight_changes() -> None:
    layer = make_layer()
    made = STREAMS.num_made
    for _ in range(3):
        assert_follows(layer)
    assert STREAMS.num_made == made + 1
    changes = (
        lambda: layer.load_state_dict(make_layer(1).state_dict()),
        lambda: layer.weight.zero_(),
        lambda: layer.weight_scale.mul_(2),
        lambda: setattr(layer, "weight", nn.Parameter(make_layer(3).weight.detach(), requires_grad=False)),
        lambda: layer.weight.data.copy_(make_layer(4).weight),
    )
    for change in changes:
        with torch.no_grad():
            change()
        if change is changes[-1]:
            release_streams()  # writing through `.data` goes unseen
        assert_follows(layer)


def test_a_stream_goes_with_its_weight() -> None:
    release_streams()
    layer = make_layer()
    layer(normal(2, 96))
    assert STREAMS.num_bytes() > 0
    del layer
    gc.collect()
    assert STREAMS.num_bytes() == 0


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_cast_layer_multiplies_in_the_new_dtype(cast: torch.dtype) -> None:
    layer = make_layer(bias=True)
    layer(normal(2, 96))
    layer.to(cast)
    inputs = normal(2, 96).to(cast)
    got = layer(inputs)
    assert got.dtype == cast
    torch.testing.assert_close(got, expected(layer, inputs), atol=0.05, rtol=0.05)
    layer.to("cpu")
    torch.testing.assert_close(layer(inputs), got)


def test_copies_and_pickles_carry_no_stream_and_stand_alone() -> None:
    layer = make_layer()
    wanted = layer(normal(2, 96))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    made = make_layer()
    fresh = io.BytesIO()
    torch.save(made, fresh)
    assert len(buffer.getvalue()) == len(fresh.getvalue())
    buffer.seek(0)
    twins = [copy.deepcopy(layer), copy.copy(layer), torch.load(buffer, weights_only=False)]
    for twin in twins:
        assert torch.equal(twin(normal(2, 96)), wanted)
    with torch.no_grad():
        layer.weight.zero_()
    assert torch.equal(twins[0](normal(2, 96)), wanted)
    assert_follows(twins[1])
    assert torch.equal(twins[2](normal(2, 96)), wanted)


def test_tensors_made_in_inference_mode_work() -> None:
    with torch.inference_mode():
        layer = make_layer()
        for _ in range(2):
            assert_follows(layer)


@pytest.mark.parametrize("tokens", [1, 3, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_those_of_the_reference(tokens: int, dtype: torch.dtype) -> None:
    layer = make_layer(bias=True).to(dtype)
    layer.bias.requires_grad_()
    upstream = normal(tokens, 13, seed=4).to(dtype)
    found = []
    for backend in ("cpu", "reference"):
        layer.bias.grad = None
        inputs = normal(tokens, 96).to(dtype).requires_grad_()
        with use_backend(backend):
            layer(inputs).backward(upstream)
        found.append((inputs.grad, layer.bias.grad))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
    assert layer.weight.grad is None


def test_under_autocast_it_multiplies_in_its_dtype() -> None:
    layer, inputs = make_layer(bias=True), normal(3, 96).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(inputs)
        wanted = expected(layer, inputs)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, wanted, atol=0.05, rtol=0.02)
    got.float().sum().backward()
    assert inputs.grad is not None
    assert inputs.grad.dtype == torch.float32


def test_under_autocast_a_bias_is_cast_with_inputs_that_are_already() -> None:
    layer, inputs = make_layer(bias=True), normal(3, 96).bfloat16()
    layer.bias.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        got, wanted = layer(inputs), expected(layer, inputs)
    torch.testing.assert_close(got, wanted, atol=0.05, rtol=0.02)
    got.sum().backward()
    assert layer.bias.grad is not None
    assert torch.equal(layer.bias.grad, torch.full_like(layer.bias, 3))


@pytest.mark.parametrize("tokens", [1, 100])
def test_a_bias_of_another_dtype_is_refused_as_torch_refuses_it(tokens: int) -> None:
    with pytest.raises(WeightError, match=r"bias must have the dtype of the inputs: got torch.float32 and torch.bfl"):
        make_layer(bias=True)(normal(tokens, 96).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(96,), (1, 96), (2, 3, 96), (100, 96), (0, 96)])
def test_a_plain_call_gives_what_the_operator_gives_without_it(
    dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, inputs = make_layer(bias=True).to(dtype), normal(*shape).to(dtype)
    with monkeypatch.context() as patch:
        patch.setattr(CpuBackend, "is_plain_call", lambda *call: False)
        wanted = layer(inputs)
    monkeypatch.setattr(CpuBackend, "linear", None)
    with torch.no_grad():
        assert torch.equal(layer(inputs), wanted)


class Seen(TorchDispatchMode):
    """The names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_whoever_looks_on_sees_the_operator() -> None:
    layer, inputs, others = make_layer(bias=True), normal(2, 96), normal(2, 96, seed=5)
    with Seen() as seen:
        layer(inputs)
    assert "packed_linear.default" in seen.names
    graph = make_fx(layer, tracing_mode="real")(inputs)
    torch.testing.assert_close(graph(others), layer(others))
    traced = torch.jit.trace(layer, (inputs,))
    torch.testing.assert_close(traced(others), layer(others))


@pytest.mark.parametrize("tokens", [1, pytest.param(40, marks=pytest.mark.slow)])
def test_the_operators_keep_torchs_rules(tokens: int) -> None:
    layer = make_layer(bias=True)
    weight = (layer.weight, layer.weight_scale, layer.weight_zero_point, "int", 2, 32, "bitstream")
    inputs = normal(tokens, 96).requires_grad_()
    torch.library.opcheck(torch.ops.bitdistiller.packed_linear.default, (inputs, layer.bias, *weight))
    torch.library.opcheck(torch.ops.bitdistiller.dequantize.default, (*weight, 96, torch.bfloat16))


def test_a_compiled_layer_is_one_graph_and_makes_one_stream() -> None:
    torch.compiler.reset()
    model = nn.Sequential(make_layer(bias=True), nn.ReLU(), nn.Linear(13, 3))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = normal(2, 96)
    made = STREAMS.num_made
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(compiled(inputs), model(inputs))
    trained = inputs.clone().requires_grad_()
    compiled(trained).sum().backward()
    wanted = inputs.clone().requires_grad_()
    model(wanted).sum().backward()
    torch.testing.assert_close(trained.grad, wanted.grad)
    assert STREAMS.num_made == made + 1


def test_two_threads_share_one_stream_and_agree() -> None:
    layer, inputs = make_layer(), normal(3, 96)
    wanted = expected(layer, inputs)
    made, found = STREAMS.num_made, []
    start = threading.Barrier(2)

    def work() -> None:
        start.wait()
        with use_backend("cpu"), torch.no_grad():
            for _ in range(50):
                found.append(layer(inputs))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert STREAMS.num_made == made + 1
    assert len(found) == 100
    assert all(torch.equal(result, found[0]) for result in found)
    torch.testing.assert_close(found[0], wanted)


def test_few_tokens_use_the_stream_and_many_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer()
    made = STREAMS.num_made
    layer(normal(1000, 96))
    assert STREAMS.num_made == made
    monkeypatch.setattr(ops, "PANEL_BYTES", 96 * 4 * 16)  # a panel of 16 rows is more than there are
    torch.testing.assert_close(layer(normal(1000, 96)), expected(layer, normal(1000, 96)))


def test_shapes_are_known_on_meta_devices() -> None:
    layer = make_layer().to("meta")
    assert layer(torch.empty(2, 5, 96, device="meta")).shape == (2, 5, 13)
