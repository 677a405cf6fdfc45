"""Every behaviour of TRL, transformers and PEFT that the trainer leans on, each in one test.

Nothing here tests our own code: when one fails, read what upstream changed before anything else.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState
from trl import SFTConfig, SFTTrainer

from tests import tiny
from tests.training import helpers


@pytest.fixture
def sft(bases: Path, tmp_path: Path) -> SFTTrainer:
    """TRL's own trainer on our student."""
    args = SFTConfig(
        str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", max_steps=1
    )
    return SFTTrainer(
        helpers.student(bases), args, train_dataset=helpers.dataset(8), processing_class=helpers.tokenizer()
    )


@pytest.mark.parametrize(
    ("cls", "method", "parameters"),
    [
        (SFTTrainer, "compute_loss", ["model", "inputs", "return_outputs", "num_items_in_batch"]),
        (SFTTrainer, "prediction_step", ["model", "inputs", "prediction_loss_only", "ignore_keys"]),
        (SFTTrainer, "log", ["logs", "start_time"]),
        (SFTTrainer, "create_model_card", ["model_name", "dataset_name", "tags"]),
        (Trainer, "train", ["resume_from_checkpoint", "trial", "ignore_keys_for_eval"]),
        (Trainer, "get_batch_samples", ["epoch_iterator", "num_batches", "device"]),
        (Trainer, "get_decay_parameter_names", ["model"]),
        (Trainer, "create_optimizer", ["model"]),
        (
            Trainer,
            "evaluation_loop",
            ["dataloader", "description", "prediction_loss_only", "ignore_keys", "metric_key_prefix"],
        ),
    ],
)
def test_the_methods_that_we_override_have_these_parameters(cls: type, method: str, parameters: list[str]) -> None:
    assert list(inspect.signature(getattr(cls, method)).parameters) == ["self", *parameters]


def test_a_loss_can_say_that_it_is_scaled_for_accumulation() -> None:
    assert Trainer.loss_is_scaled_for_ga is None


def test_sft_takes_only_its_own_losses(bases: Path, tmp_path: Path) -> None:
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, loss_type="cakld")
    with pytest.raises(ValueError, match="loss_type"):
        SFTTrainer(helpers.student(bases), args, train_dataset=helpers.dataset(2), processing_class=helpers.tokenizer())


def test_sft_refuses_adapters_on_the_head(bases: Path, tmp_path: Path) -> None:
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False)
    model = helpers.student(bases, target_modules=["lm_head"])
    with pytest.raises(ValueError, match="lm_head"):
        SFTTrainer(model, args, train_dataset=helpers.dataset(2), processing_class=helpers.tokenizer())


def test_sft_patches_the_forward_of_the_instance(sft: SFTTrainer) -> None:
    assert "forward" in vars(sft.model.get_base_model())


def test_sft_switches_the_cache_off_in_the_config(sft: SFTTrainer) -> None:
    assert sft.model.config.use_cache is False


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({}, {"input_ids", "labels", "attention_mask"}),
        ({"packing": True, "max_length": 32}, {"input_ids", "labels", "position_ids"}),
        ({"padding_free": True, "max_length": None}, {"input_ids", "labels", "position_ids"}),
    ],
    ids=["padded", "bfd", "padding_free"],
)
def test_the_collator_gives_these_keys(bases: Path, tmp_path: Path, changes: dict[str, Any], keys: set[str]) -> None:
    run = helpers.trainer(helpers.student(bases), tmp_path, **changes)
    batch = next(iter(run.get_train_dataloader()))
    assert keys <= set(batch)
    assert ("attention_mask" in batch) == ("attention_mask" in keys)


def test_flattened_documents_begin_without_a_label(bases: Path, tmp_path: Path) -> None:
    run = helpers.trainer(helpers.student(bases), tmp_path, padding_free=True, max_length=None)
    batch = run.data_collator([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}])
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9]]


def test_our_count_of_targets_is_that_of_transformers(bases: Path, tmp_path: Path) -> None:
    run = helpers.trainer(helpers.student(bases), tmp_path)
    batches = [run.data_collator(list(helpers.dataset(4, seed, prompts=False))) for seed in (1, 2)]
    _, theirs = Trainer.get_batch_samples(run, iter(batches), 2, torch.device("cpu"))
    _, ours = run.get_batch_samples(iter(batches), 2, torch.device("cpu"))
    assert int(ours) == int(theirs)


def test_the_first_loss_argument_reaches_the_training_step_undivided(bases: Path, tmp_path: Path) -> None:
    run = helpers.trainer(helpers.student(bases), tmp_path, gradient_accumulation_steps=2, max_steps=1)
    seen: list[torch.Tensor] = []
    backward = run.accelerator.backward
    run.accelerator.backward = lambda loss, **kwargs: (seen.append(loss.detach()), backward(loss, **kwargs))[1]
    compute = run.compute_loss
    given: list[torch.Tensor] = []

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        given.append(compute(*args, **kwargs))
        return given[-1]

    run.compute_loss = spy
    run.train()
    assert [loss.item() for loss in seen] == [loss.item() for loss in given]
    assert len(seen) == 2


def test_exported_state_stands_in_the_trainer_state_by_class_name(tmp_path: Path) -> None:
    class Remembers(TrainerCallback, ExportableState):
        def state(self) -> dict[str, Any]:
            return {"args": {}, "attributes": {"value": 3}}

    TrainerState(stateful_callbacks=[Remembers()]).save_to_json(str(tmp_path / "state.json"))
    loaded = TrainerState.load_from_json(str(tmp_path / "state.json"))
    assert loaded.stateful_callbacks["Remembers"]["attributes"] == {"value": 3}


def test_peft_passes_unknown_keywords_to_the_base_models_forward(bases: Path) -> None:
    model = helpers.student(bases)
    seen: dict[str, Any] = {}
    base = model.get_base_model()
    plain = base.forward

    def forward(*args: Any, distill: object = None, **kwargs: Any) -> Any:
        seen["distill"] = distill
        return plain(*args, **kwargs)

    base.forward = forward
    model(input_ids=tiny.token_ids(), distill="here")
    assert seen == {"distill": "here"}


def test_pefts_own_way_to_disable_adapters_unfreezes_what_a_user_froze(bases: Path) -> None:
    # the reason for `full_precision`; once this fails, disable_adapter() may do
    model = helpers.student(bases, train_other="norms")
    frozen = next(p for name, p in model.named_parameters() if "modules_to_save" in name)
    frozen.requires_grad_(False)
    with model.disable_adapter():
        pass
    assert frozen.requires_grad


def test_accelerate_leaves_objects_alone_that_it_does_not_know() -> None:
    from accelerate.utils import convert_outputs_to_fp32

    class Holder:
        hidden = torch.zeros(1, dtype=torch.bfloat16)

    assert convert_outputs_to_fp32(lambda: Holder())().hidden.dtype == torch.bfloat16
    assert convert_outputs_to_fp32(lambda: {"x": Holder.hidden})()["x"].dtype == torch.float32


def test_a_callback_can_have_a_step_saved_and_the_run_stopped_whatever_the_save_strategy(
    bases: Path, tmp_path: Path
) -> None:
    seen: list[tuple[int, bool]] = []

    class Stops(TrainerCallback):
        def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
            control.should_save = control.should_training_stop = True

        def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            seen.append((state.global_step, (folder / "optimizer.pt").exists()))  # everything is there by then

    run = helpers.trainer(helpers.student(bases), tmp_path, max_steps=5, save_strategy="no")
    run.add_callback(Stops())
    run.train()
    assert seen == [(1, True)]
    assert run.state.global_step == 1


def test_transformers_goes_on_without_optimizer_state_and_says_nothing(bases: Path, tmp_path: Path) -> None:
    # the reason for `resumable`; once this fails, transformers may refuse by itself
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    helpers.trainer(helpers.student(bases), tmp_path, **settings).train()
    run = helpers.trainer(helpers.student(bases), tmp_path, **settings | {"max_steps": 3})
    Trainer.train(run, resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert run.state.global_step == 3


def test_reduce_without_other_ranks_returns_what_it_was_given() -> None:
    assert Accelerator(cpu=True).reduce(torch.tensor([1.0, 2.0]), reduction="sum").tolist() == [1.0, 2.0]
