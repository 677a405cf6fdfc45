"""Every engine and any number of processes write what one process writes batch by batch, also after a kill."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from bitdistiller_peft.errors import ConfigError, TrainingError, UnknownNameError
from bitdistiller_peft.training import teacher_data_engines as engines
from bitdistiller_peft.training import teacher_data_store as store
from bitdistiller_peft.training.data import generate_teacher_data, load_teacher_data
from tests import standin
from tests.training.test_teacher_data import PROMPTS, generate, lines, opinionated

DEFAULTS = {"max_new_tokens": 6, "batch_size": 3, "temperature": 1.0, "show_progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return standin.save_standin(tmp_path_factory.mktemp("standin"))


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return opinionated(folder)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return standin.tokenizer()


# ------------------------------------------------------------------------------------------------- continuous batching


@pytest.mark.parametrize("changes", [{}, {"top_k": 5, "top_p": 0.8}, {"temperature": 0}], ids=str)
def test_continuous_batches_draw_what_padded_ones_draw(model: PreTrainedModel, tokenizer: Any, changes: dict) -> None:
    expected = generate(model, tokenizer, **changes).to_list()
    attention = model.config._attn_implementation
    assert generate(model, tokenizer, engine="continuous", batch_size=2, **changes).to_list() == expected
    assert model.config._attn_implementation == attention
    assert "_get_logits_processor" not in vars(model)


def test_a_killed_continuous_run_goes_on_with_the_first_window_that_is_missing(
    model: PreTrainedModel, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "_BATCHES_PER_WINDOW", 2)
    options = {"engine": "continuous", "batch_size": 1, "output_dir": tmp_path}
    append = store.TeacherDataStore.append

    def append_or_die(self: Any, rows: list[store.Row]) -> None:
        if len(self.rows) == 4:
            with (tmp_path / store.PART_NAME).open("ab") as file:
                file.write(store._line(rows[0]))
            raise KeyboardInterrupt
        append(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(store.TeacherDataStore, "append", append_or_die)
        with pytest.raises(KeyboardInterrupt):
            generate(model, tokenizer, **options)
    assert len(lines(tmp_path)) == 5
    with pytest.raises(ConfigError, match="engine was 'continuous', is None"):
        generate(model, tokenizer, output_dir=tmp_path, batch_size=1)
    assert generate(model, tokenizer, **options).to_list() == generate(model, tokenizer).to_list()


def test_a_failed_request_is_not_taken_for_an_answer(
    model: PreTrainedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> torch.Tensor:
        raise RuntimeError("out of noise")

    monkeypatch.setattr(engines.RequestNoise, "__call__", broken)
    with pytest.raises(TrainingError, match="continuous batching"):
        generate(model, tokenizer, engine="continuous")


# -------------------------------------------------------------------------------------------------------------- shards


def test_processes_share_the_prompts_and_the_last_one_puts_them_together(
    model: PreTrainedModel, tokenizer: Any, tmp_path: Path
) -> None:
    # as many rows at once as in a run that is not shared, which is why the answers are the same to the last token
    expected = generate(model, tokenizer, batch_size=1).to_list()
    options = {"output_dir": tmp_path, "batch_size": 1}
    first = generate(model, tokenizer, shard=(1, 3), **options).to_list()
    assert first == expected[1::3]
    assert not (tmp_path / store.DATA_NAME).exists()
    generate(model, tokenizer, shard=(0, 3), **options)
    assert generate(model, tokenizer, shard=(2, 3), **options).to_list() == expected
    assert load_teacher_data(tmp_path).to_list() == expected
    for again in ((0, 3), None):  # a finished folder is returned, whoever asks
        assert generate(model, tokenizer, shard=again, **options).to_list() == expected
    with pytest.raises(ConfigError, match="must hold data of the same run"):
        generate(model, tokenizer, shard=(0, 3), seed=1, **options)


def test_the_environment_says_which_share(
    model: PreTrainedModel, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert generate(model, tokenizer, output_dir=tmp_path)["prompt_id"] == [1, 3, 5]
    with pytest.raises(ConfigError, match="must be given to 2 processes"):
        generate(model, tokenizer)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="has shard-00001-of-00002"):
        generate(model, tokenizer, output_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"got shard=\(4, 4\)"):
        generate(model, tokenizer, output_dir=tmp_path, shard=(4, 4))


# ---------------------------------------------------------------------------------------------------------------- vLLM


class FakeEngine:
    """Stands in for `vllm.LLM`: answers with the number of tokens of a prompt, then an end."""

    made: list[dict[str, Any]] = []  # noqa: RUF012
    asked: list[Any] = []  # noqa: RUF012

    def __init__(self, **options: Any) -> None:
        self.made.append(options)

    def generate(self, prompts: list[dict[str, Any]], params: list[Any], use_tqdm: bool) -> list[Any]:
        self.asked += params
        ids = [[len(prompt["prompt_token_ids"]) + 3, params[0].stop_token_ids[0], 7] for prompt in prompts]
        return [types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=tuple(row))]) for row in ids]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    module: Any = types.ModuleType("vllm")
    module.__spec__ = types.SimpleNamespace()
    module.LLM, module.SamplingParams = FakeEngine, types.SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", module)
    FakeEngine.made, FakeEngine.asked = [], []
    return FakeEngine


def test_vllm_is_told_everything_and_every_prompt_has_its_seed(
    folder: Path, tokenizer: Any, vllm: type[FakeEngine], tmp_path: Path
) -> None:
    options = {**DEFAULTS, "top_k": 4, "engine": "vllm", "engine_options": {"tensor_parallel_size": 2}}
    rows = generate_teacher_data(str(folder), tokenizer, PROMPTS, output_dir=tmp_path, **options)
    assert rows["finish_reason"] == ["eos"] * len(PROMPTS)
    assert rows["num_tokens"] == [2] * len(PROMPTS)
    (made,) = vllm.made
    assert (made["model"], made["max_num_seqs"], made["tensor_parallel_size"]) == (str(folder), 3, 2)
    assert {(p.temperature, p.top_p, p.top_k, p.max_tokens) for p in vllm.asked} == {(1.0, 1.0, 4, 6)}
    assert len({p.seed for p in vllm.asked}) == len(PROMPTS)  # also for the prompt that comes twice
    again = generate_teacher_data(str(folder), tokenizer, PROMPTS, output_dir=tmp_path, **options)
    assert again.to_list() == rows.to_list()
    assert len(vllm.made) == 1  # a finished folder loads no model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "vllm"}, r"must be a folder or Hub name for engine='vllm'"),
        ({"engine_options": {"seed": 1}}, "`engine_options` must be None"),
    ],
)
def test_what_does_not_go_with_an_engine_is_refused(
    model: PreTrainedModel, tokenizer: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        generate(model, tokenizer, **changes)


def test_names_that_mean_nothing_here_are_refused(folder: Path, model: PreTrainedModel, tokenizer: Any) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'continuous'"):
        generate(model, tokenizer, engine="continous")
    with pytest.raises(ConfigError, match="must be a loaded model for engine='static'"):
        generate(str(folder), tokenizer)
    with pytest.raises(ConfigError, match="pip install vllm"):
        generate(str(folder), tokenizer, engine="vllm")
