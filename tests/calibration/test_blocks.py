"""A model run block by block is the model; models for which that is not so are recognised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitdistiller_peft.calibration.blocks import BlockRunner, EarlyStop, find_blocks
from bitdistiller_peft.calibration.slots import find_student
from tests.calibration.models import ARCHITECTURES, IDS, student
from tests.tiny import VOCAB

BLOCKS = {"gpt2": "transformer.h", "opt": "model.decoder.layers"}


def make_runner(model: nn.Module) -> BlockRunner | None:
    return BlockRunner.create(model, [m for m in model.modules() if isinstance(m, nn.Linear)], IDS)


@torch.no_grad()
def run_all(runner: BlockRunner, batches: list[Tensor]) -> list[Tensor]:
    hidden = runner.record(batches)
    for number in range(len(runner.blocks)):
        hidden = [runner.run(number, index, states) for index, states in enumerate(hidden)]
    return hidden


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_blocks_run_alone_give_the_logits_of_the_model(name: str, models: Path) -> None:
    base, slots = find_student(student(models, name))
    batches = [IDS[:4], IDS[4:]]  # of different sizes
    runner = BlockRunner.create(base, [slot.layer for slot in slots], batches[0])
    assert runner is not None
    list_name = BLOCKS.get(name, "model.layers")
    assert runner.names == [f"{list_name}.0", f"{list_name}.1"]
    hidden = run_all(runner, batches)
    for batch, states in zip(batches, hidden, strict=True):
        logits: list[Tensor] = []
        handle = base.get_output_embeddings().register_forward_hook(lambda m, a, out, seen=logits: seen.append(out))
        runner.run_after(batch, states)
        handle.remove()
        base(input_ids=batch)
        assert len(logits) == 1
        expected = base.get_output_embeddings()(base.base_model(input_ids=batch).last_hidden_state)
        torch.testing.assert_close(logits[0], expected)


def test_stand_ins_leave_nothing_behind(models: Path) -> None:
    base, slots = find_student(student(models))
    before = [dict(module.__dict__) for module in base.modules()]
    runner = BlockRunner.create(base, [slot.layer for slot in slots], IDS)
    assert runner is not None
    runner.record([IDS])
    runner.run_before(IDS)
    assert [dict(module.__dict__) for module in base.modules()] == before


def test_a_forward_that_sits_on_a_block_already_comes_back(models: Path) -> None:
    base, slots = find_student(student(models))
    block = base.get_submodule("model.layers.0")
    own = block.forward
    calls: list[int] = []

    def wrapped(*args: Any, **kwargs: Any) -> Any:  # as accelerate's hooks are put
        calls.append(1)
        return own(*args, **kwargs)

    block.forward = wrapped
    runner = BlockRunner.create(base, [slot.layer for slot in slots], IDS)
    assert runner is not None
    assert block.forward is wrapped
    assert calls


def test_equal_arguments_of_different_batches_are_kept_once(models: Path) -> None:
    base, slots = find_student(student(models))
    runner = BlockRunner.create(base, [slot.layer for slot in slots], IDS)
    assert runner is not None
    runner.record([IDS[:3], IDS[3:]])
    first, second = (calls.kwargs["position_embeddings"] for calls in runner._calls[1])
    assert first[0] is second[0]


class Toy(nn.Module):
    """A language model whose blocks a test can arrange as it likes."""

    def __init__(self, run: Callable[[nn.ModuleList, Tensor], Tensor], block: type[nn.Module] | None = None) -> None:
        super().__init__()
        self.embed, self.head, self._run = nn.Embedding(VOCAB, 32), nn.Linear(32, VOCAB), run
        self.blocks = nn.ModuleList([(block or Residual)() for _ in range(3)])
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for parameter in self.parameters():
                nn.init.normal_(parameter, std=0.3)

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        logits: Tensor = self.head(self._run(self.blocks, self.embed(input_ids)))
        return logits


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.linear(hidden_states).tanh()


class WithTuple(Residual):
    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(hidden_states), None


def in_a_row(blocks: nn.ModuleList, hidden: Tensor) -> Tensor:
    for block in blocks:
        hidden = block(hidden)
    return hidden


def by_keyword(blocks: nn.ModuleList, hidden: Tensor) -> Tensor:
    for block in blocks:
        hidden = block(hidden_states=hidden)
    return hidden


def first_of_tuples(blocks: nn.ModuleList, hidden: Tensor) -> Tensor:
    for block in blocks:
        hidden = block(hidden)[0]
    return hidden


def skipping(blocks: nn.ModuleList, hidden: Tensor) -> Tensor:
    return blocks[2](blocks[0](hidden))


def twice(blocks: nn.ModuleList, hidden: Tensor) -> Tensor:
    return in_a_row(blocks, in_a_row(blocks, hidden))


def with_a_shortcut(blocks: nn.ModuleList, hidden: Tensor) -> Tensor:
    return blocks[2](blocks[1](blocks[0](hidden)) + hidden)


def backwards(blocks: nn.ModuleList, hidden: Tensor) -> Tensor:
    return blocks[0](blocks[1](blocks[2](hidden)))


@pytest.mark.parametrize(("run", "block"), [(in_a_row, Residual), (by_keyword, Residual), (first_of_tuples, WithTuple)])
@torch.no_grad()
def test_blocks_may_take_keywords_and_return_tuples(
    run: Callable[[nn.ModuleList, Tensor], Tensor], block: type[nn.Module]
) -> None:
    model = Toy(run, block).eval()
    runner = make_runner(model)
    assert runner is not None
    (hidden,) = run_all(runner, [IDS])
    torch.testing.assert_close(model.head(hidden), model(IDS))


@pytest.mark.parametrize("run", [skipping, twice, with_a_shortcut, backwards])
def test_models_that_are_no_row_of_blocks_are_recognised(run: Callable[[nn.ModuleList, Tensor], Tensor]) -> None:
    assert make_runner(Toy(run).eval()) is None


def test_a_model_without_a_list_has_no_blocks() -> None:
    assert find_blocks(nn.Sequential(nn.Linear(4, 4)), []) is None
    assert make_runner(nn.Sequential(nn.Linear(4, 4))) is None


def test_of_lists_inside_one_another_the_outer_one_counts() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})])
    found = find_blocks(model, [m for m in model.modules() if isinstance(m, nn.Linear)])
    assert found is not None
    assert found[0] == "layers"


def test_running_what_comes_before_stops_at_the_first_block() -> None:
    model = Toy(in_a_row).eval()
    runner = make_runner(model)
    assert runner is not None
    reached: list[str] = []
    model.blocks[0].linear.register_forward_hook(lambda *_: reached.append("block"))
    model.embed.register_forward_hook(lambda *_: reached.append("embed"))
    runner.run_before(IDS)
    assert reached == ["embed"]
    assert not issubclass(EarlyStop, (ValueError, RuntimeError))
