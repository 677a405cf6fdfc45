"""What cannot work is refused before the first step, and a run that breaks says so before it saves."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from bitdistiller_peft.errors import ConfigError, DataError, TrainingError, UnknownNameError
from bitdistiller_peft.kernels import precision
from bitdistiller_peft.training import DistillTrainer
from bitdistiller_peft.training.checks import (
    check_master_dtype,
    check_parallelism,
    check_tied_tables,
    warn_of_slow_dtype,
)
from tests.training import helpers


def test_an_empty_dataset_is_refused(bases: Path, tmp_path: Path) -> None:
    empty = Dataset.from_dict({"input_ids": [], "labels": []})
    with pytest.raises(DataError, match="empty dataset"):
        helpers.trainer(helpers.student(bases), tmp_path, data=empty)


def test_a_missing_dataset_is_refused(bases: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="None"):
        DistillTrainer(helpers.student(bases), helpers.config(tmp_path), processing_class=helpers.tokenizer())


@pytest.mark.parametrize("max_length", [2, None], ids=["cut", "whole"])
def test_data_without_targets_are_refused(bases: Path, tmp_path: Path, max_length: int | None) -> None:
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 4, "labels": [[-100, -100, 7 if max_length else -100]] * 4})
    with pytest.raises(DataError, match="target tokens"):
        helpers.trainer(helpers.student(bases), tmp_path, data=rows, max_length=max_length)


def test_a_label_on_the_first_token_alone_is_no_target(bases: Path, tmp_path: Path) -> None:
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 4, "labels": [[5, -100, -100]] * 4})
    with pytest.raises(DataError, match="target tokens"):
        helpers.trainer(helpers.student(bases), tmp_path, data=rows)


def test_a_student_that_is_not_quantized_is_refused(bases: Path, tmp_path: Path) -> None:
    plain = helpers.base(bases)
    with pytest.raises(ConfigError, match="get_bitdistiller_model"):
        helpers.trainer(plain, tmp_path)
    lora = get_peft_model(helpers.base(bases), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="get_bitdistiller_model"):
        helpers.trainer(lora, tmp_path)


def test_a_merged_or_frozen_student_is_refused(bases: Path, tmp_path: Path) -> None:
    merged = helpers.student(bases)
    merged.merge_adapter()
    with pytest.raises(ConfigError, match="merge"):
        helpers.trainer(merged, tmp_path)
    frozen = helpers.student(bases).requires_grad_(False)
    with pytest.raises(ConfigError, match="frozen"):
        helpers.trainer(frozen, tmp_path)


def test_prompt_learning_is_refused(bases: Path, tmp_path: Path) -> None:
    model = get_peft_model(helpers.base(bases), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ConfigError, match="prompt learning"):
        helpers.trainer(model, tmp_path)


def test_bf16_masters_that_cannot_move_are_refused_with_the_smallest_rate(bases: Path, tmp_path: Path) -> None:
    base = helpers.base(bases, dtype=torch.bfloat16)
    settings = helpers.BitDistillerConfig(bits=2, group_size=32, master_dtype="base")
    model = helpers.get_bitdistiller_model(base, settings, autocast_adapter_dtype=False)
    with pytest.raises(ConfigError, match=r"at least \d\.\de-05 for master weights in torch.bfloat16"):
        check_master_dtype(model, helpers.config(tmp_path, learning_rate=1e-6))
    check_master_dtype(model, helpers.config(tmp_path, learning_rate=1e-3))
    check_master_dtype(helpers.student(bases), helpers.config(tmp_path, learning_rate=1e-9))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_liger_kernel", True),
        ("label_smoothing_factor", 0.1),
        ("router_aux_loss_coef", 0.01),
        ("average_tokens_across_devices", False),
        ("gamma_num_batches", 0),
        ("loss_tile_tokens", 0),
        ("flip_rate_layers", 0),
        ("scale_learning_rate", -1.0),
        ("temperature", 0.0),
        ("ce_weight", -1.0),
        ("loss_weights", {"ce": 1.0}),
        ("loss_weights", "{broken"),
        ("teacher_init_kwargs", "[1]"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, name: str, value: object) -> None:
    pattern = "weights" if name == "loss_weights" else name
    with pytest.raises(ConfigError, match=pattern):
        helpers.config(tmp_path, **{name: value})


def test_an_unknown_loss_is_refused_with_the_nearest_one(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'cakld'"):
        helpers.config(tmp_path, loss_type="cakl")


@pytest.mark.parametrize("kind", ["cp", "sp", "tp"])
def test_splitting_sequences_or_layers_is_refused(kind: str) -> None:
    class Plan:
        pass

    class Machine:
        parallelism_config = Plan()

    setattr(Plan, f"{kind}_enabled", True)
    setattr(Plan, f"{kind}_size", 2)
    with pytest.raises(ConfigError, match=f"{kind}_size=2"):
        check_parallelism(Machine())  # type: ignore[arg-type]


def test_a_table_that_two_layers_share_is_refused_in_parts(bases: Path) -> None:
    shared = helpers.student(bases, "llama-tied", embedding_bits=8)
    with pytest.raises(ConfigError, match=r"got \['base_model.model.lm_head'\]. Use data parallelism"):
        check_tied_tables(shared, is_sharded=True)
    check_tied_tables(shared, is_sharded=False)
    check_tied_tables(helpers.student(bases, embedding_bits=8), is_sharded=True)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_checkpoint(bases: Path, tmp_path: Path) -> None:
    model = helpers.student(bases)
    run = helpers.trainer(model, tmp_path, max_steps=3, save_strategy="steps", save_steps=2, logging_steps=5)
    embeddings = model.get_input_embeddings()

    def poison(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * float("nan") if run.state.global_step == 2 else output

    embeddings.register_forward_hook(poison)
    with pytest.raises(TrainingError, match=r"loss must be finite: got nan at step 3.*checkpoint-2"):
        run.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2"]


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_step(bases: Path, tmp_path: Path) -> None:
    model = helpers.student(bases)
    run = helpers.trainer(model, tmp_path, save_strategy="steps", save_steps=1)
    name, parameter = next((n, p) for n, p in model.named_parameters() if p.requires_grad)
    before = helpers.weights(model)
    parameter.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(TrainingError, match=r"gradient norm must be finite.*No checkpoint was written"):
        run.train()
    assert torch.equal(before[name], parameter)


def test_only_a_distill_config_is_taken(bases: Path, tmp_path: Path) -> None:
    from trl import SFTConfig

    with pytest.raises(ConfigError, match="DistillConfig"):
        DistillTrainer(helpers.student(bases), SFTConfig(str(tmp_path), use_cpu=True, bf16=False))  # type: ignore[arg-type]


def test_a_batch_without_labels_is_refused(bases: Path, tmp_path: Path) -> None:
    run = helpers.trainer(helpers.student(bases), tmp_path)
    with pytest.raises(ConfigError, match="labels"):
        run.compute_loss(run.model, {"input_ids": torch.tensor([[5, 6]])})


@pytest.mark.parametrize(
    ("dtype", "bf16", "remedy"),
    [
        (torch.bfloat16, False, 'dtype="float32"'),
        (torch.bfloat16, True, 'dtype="float32"'),
        (torch.float32, True, "bf16=False"),
        (torch.float32, False, ""),
    ],
)
def test_slow_bf16_is_told_with_its_remedy(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    dtype: torch.dtype,
    bf16: bool,
    remedy: str,
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(precision, "_SAID", set())
    model = torch.nn.Linear(2, 2)
    model.dtype = dtype
    with caplog.at_level(logging.WARNING):
        warn_of_slow_dtype(model, helpers.config(tmp_path, bf16=bf16))
    assert [remedy in record.getMessage() for record in caplog.records] == ([True] if remedy else [])
