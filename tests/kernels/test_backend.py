"""The best backend for a device is chosen, one can be forced in one thread, and no name is taken twice or unknown."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from bitdistiller_peft.errors import ConfigError, UnknownNameError
from bitdistiller_peft.kernels import (
    Backend,
    ReferenceBackend,
    backend_info,
    backend_names,
    dequantize_packed,
    get_backend,
    packed_embedding,
    packed_linear,
    register_backend,
    select_backend,
    set_backend,
    use_backend,
)
from bitdistiller_peft.kernels import backend as module
from bitdistiller_peft.quantizers import QuantParams, QuantSpec

CPU = torch.device("cpu")


class Ones(Backend):
    """Everything is one, so that its results are known when they are seen."""

    def __init__(self, name: str, device: str = "cpu") -> None:
        self.name, self.device = name, device

    def is_available(self, device: torch.device) -> bool:
        return device.type == self.device

    def dequantize(
        self, words: Tensor, params: QuantParams, spec: QuantSpec, in_features: int, dtype: torch.dtype
    ) -> Tensor:
        return torch.ones(*words.shape[:-1], in_features, dtype=dtype)

    def packed_linear(
        self, inputs: Tensor, words: Tensor, params: QuantParams, spec: QuantSpec, bias: Tensor | None
    ) -> Tensor:
        return torch.ones(*inputs.shape[:-1], words.shape[0])


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BACKENDS", {"reference": module._BACKENDS["reference"]})
    monkeypatch.setattr(module, "_selected", {})
    monkeypatch.setattr(module, "_default", ["auto"])


def test_the_reference_is_always_there() -> None:
    assert "reference" in backend_names()
    assert isinstance(get_backend(CPU), ReferenceBackend)
    assert isinstance(get_backend(torch.device("cuda", 3)), ReferenceBackend)


def test_the_last_one_registered_that_is_available_is_preferred() -> None:
    register_backend(Ones("first"))
    register_backend(Ones("second"))
    register_backend(Ones("elsewhere", device="cuda"))
    assert backend_names() == ["reference", "first", "second", "elsewhere"]
    assert get_backend(CPU).name == "second"
    assert get_backend(torch.device("cuda")).name == "elsewhere"
    assert get_backend(torch.device("meta")).name == "reference"


def test_every_operation_goes_to_the_chosen_backend() -> None:
    register_backend(Ones("ones"))
    spec = QuantSpec.create("int", 2, group_size=-1)
    words, params = torch.zeros(3, 1, dtype=torch.int32), QuantParams(torch.ones(3, 1))
    assert torch.equal(dequantize_packed(words, params, spec, 16, torch.float32), torch.ones(3, 16))
    assert torch.equal(packed_linear(torch.zeros(2, 16), words, params, spec), torch.ones(2, 3))


def test_a_backend_can_be_forced_and_let_go() -> None:
    register_backend(Ones("ones"))
    with use_backend("reference"):
        assert get_backend(CPU).name == "reference"
        with use_backend("ones"):
            assert get_backend(CPU).name == "ones"
        assert get_backend(CPU).name == "reference"
    assert get_backend(CPU).name == "ones"


def test_a_backend_is_let_go_after_an_error_too() -> None:
    register_backend(Ones("ones"))
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        raise ZeroDivisionError
    assert get_backend(CPU).name == "ones"


def test_a_backend_is_forced_in_this_thread_only() -> None:
    register_backend(Ones("ones"))
    seen: list[str] = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(get_backend(CPU).name))
        thread.start()
        thread.join()
    assert seen == ["ones"]


class Picky(Ones):
    """Takes fp32 only."""

    def supports(self, spec: QuantSpec, dtype: torch.dtype) -> bool:
        return dtype == torch.float32

    def details(self) -> str:
        return "fp32"


def test_a_backend_that_cannot_take_a_weight_is_left_for_the_next_one() -> None:
    register_backend(Ones("ones"))
    register_backend(Picky("picky"))
    spec = QuantSpec.create("int", 2, group_size=-1)
    assert select_backend(CPU, spec, torch.float32).name == "picky"
    assert select_backend(CPU, spec, torch.float16).name == "ones"
    base3 = QuantSpec.create("ternary", 2, group_size=-1).packed_as("base3")
    assert select_backend(CPU, base3, torch.float16).name == "reference"


def test_a_forced_backend_is_left_with_one_notice(caplog: pytest.LogCaptureFixture) -> None:
    module._notice.cache_clear()
    register_backend(Picky("picky"))
    spec = QuantSpec.create("int", 2, group_size=-1)
    with use_backend("picky"):
        names = [select_backend(CPU, spec, torch.float16).name for _ in range(3)]
    assert names == ["reference"] * 3
    (record,) = caplog.records
    assert "backend 'picky' cannot multiply grid='int', bits=2 in torch.float16" in record.getMessage()


def test_a_backend_can_be_set_for_the_process() -> None:
    register_backend(Picky("picky"))
    set_backend("reference")
    assert get_backend(CPU).name == "reference"
    seen: list[str] = []
    thread = threading.Thread(target=lambda: seen.append(get_backend(CPU).name))
    thread.start()
    thread.join()
    assert seen == ["reference"]
    with use_backend("picky"):
        assert backend_info() == "picky (fp32)"
    assert backend_info("cpu") == "reference"
    set_backend("auto")
    assert get_backend(CPU).name == "picky"
    with pytest.raises(UnknownNameError, match="must be one of"):
        set_backend("nobody")


def test_rows_are_looked_up_by_any_backend(generator: torch.Generator) -> None:
    words = torch.randint(-(2**31), 2**31 - 1, (7, 2), dtype=torch.int32, generator=generator)
    scale = torch.rand(7, 2, generator=generator).half() + 0.5
    for group_size, params in ((16, QuantParams(scale)), ("tensor", QuantParams(scale[:1, :1]))):
        spec = QuantSpec.create("int_sym", 2, group_size=group_size)
        dense = dequantize_packed(words, params, spec, 32, torch.float32)
        for ids in (torch.tensor([[0, 6], [3, 3]]), torch.tensor(5), torch.empty(0, 2, dtype=torch.long)):
            found = packed_embedding(ids, words, params, spec, 32, torch.bfloat16)
            assert torch.equal(found, dense[ids].bfloat16())


def test_an_unknown_backend_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UnknownNameError) as refusal, use_backend("referenc"):
        pass
    assert str(refusal.value) == (
        "`backend` must be one of ['reference']: got backend='referenc'. Did you mean 'reference'?"
    )


def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"`name` must be new: got name='reference'\. Registered backends: \['reference'\]"
    ):
        register_backend(Ones("reference"))
