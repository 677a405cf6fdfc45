"""Trainers that know nothing of us train a student, save it, and resume to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments

from bitdistiller_peft import get_bitdistiller_model
from tests.tiny import VOCAB, load
from tests.tuner.common import (
    Bases,
    assert_same_tensors,
    config_for,
    copy_state,
    logits,
    teacher_logits,
    trainable,
)


def examples(number: int = 32, length: int = 12) -> list[dict[str, Tensor]]:
    ids = torch.randint(3, VOCAB, (number, length), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(folder: Path, **kwargs: object) -> TrainingArguments:
    settings = {
        "output_dir": str(folder),
        "max_steps": 6,
        "save_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    return TrainingArguments(**settings | kwargs)


def trainer(model: PreTrainedModel | PeftModel, folder: Path, **kwargs: object) -> Trainer:
    return Trainer(model=model, args=arguments(folder, **kwargs), train_dataset=examples())


RESUMED = [
    ("llama", {}, {}),
    ("llama", {"learn_zero_point": True, "train_other": "norms"}, {"gradient_accumulation_steps": 2}),
    ("gpt2", {"learn_scale": False}, {"lr_scheduler_type": "cosine", "warmup_steps": 2}),
    ("mixtral", {"grid": "nf", "scale_dtype": "float32", "bits": 3}, {"optim": "sgd"}),
    ("gemma3", {}, {"bf16": True}),
]


@pytest.mark.parametrize(
    ("name", "config", "settings"), RESUMED, ids=[f"{name}-{'-'.join({**a, **b})}" for name, a, b in RESUMED]
)
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(
    name: str, config: dict[str, object], settings: dict[str, object], bases: Bases, tmp_path: Path
) -> None:
    """Bit for bit: weights, scales, zero points and norms, optimizer and data order included."""
    student = bases.student(name, **config)
    start = logits(student)
    trainer(student, tmp_path, **settings).train()
    checkpoints = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-3", "checkpoint-6"]
    assert not torch.equal(logits(student.eval()), start)
    with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in settings):  # as the Trainer does for good
        assert torch.equal(teacher_logits(student), logits(bases.base(name)).float())

    resumed = bases.student(name, **config)
    trainer(resumed, tmp_path / "again", **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same_tensors(copy_state(resumed), copy_state(student))
    assert torch.equal(logits(resumed.eval()), logits(student))


def test_a_checkpoint_is_an_ordinary_adapter_folder(bases: Bases, tmp_path: Path) -> None:
    student = bases.student("mixtral")
    trainer(student, tmp_path).train()
    loaded = PeftModel.from_pretrained(bases.base("mixtral"), tmp_path / "checkpoint-6")
    assert torch.equal(logits(loaded), logits(student.eval()))
    names = {path.name for path in (tmp_path / "checkpoint-6").iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names, "the base model was saved as well"


def test_the_best_model_is_loaded_at_the_end(bases: Bases, tmp_path: Path) -> None:
    student = bases.student("llama", train_other="norms")
    run = Trainer(
        model=student,
        args=arguments(
            tmp_path, max_steps=4, save_steps=2, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
            greater_is_better=True,  # so that the first checkpoint, whose loss is higher, is the best
        ),
        train_dataset=examples(),
        eval_dataset=examples(8),
    )  # fmt: skip
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    best = PeftModel.from_pretrained(bases.base("llama"), tmp_path / "checkpoint-2")
    assert torch.equal(logits(student.eval()), logits(best))


def test_gradient_checkpointing_in_the_trainer_changes_nothing(bases: Bases, tmp_path: Path) -> None:
    finals = []
    for on in (False, True):
        student = bases.student("llama")
        checkpointing = {"gradient_checkpointing": on, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        trainer(student, tmp_path / str(on), save_strategy="no", **checkpointing).train()
        finals.append(copy_state(student))
    assert_same_tensors(*finals)


def test_the_trainers_model_is_packed_after_training(bases: Bases, tmp_path: Path) -> None:
    student = get_bitdistiller_model(bases.base("llama", dtype=torch.bfloat16), config_for("llama"))
    trainer(student, tmp_path, save_strategy="no").train()
    expected = logits(student.eval())
    packed = student.pack_and_unload(progressbar=False)
    assert torch.equal(logits(packed), expected)
    packed.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), expected)


def test_a_student_loaded_by_transformers_trains_in_the_trainer(bases: Bases, tmp_path: Path) -> None:
    bases.student("llama").save_pretrained(tmp_path / "start")
    model = bases.base("llama")
    model.load_adapter(str(tmp_path / "start"), is_trainable=True)
    names = set(trainable(model))
    assert len(names) == 28
    before = copy_state(model)
    trainer(model, tmp_path, max_steps=2, save_steps=2).train()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == names
    again = bases.base("llama")
    again.load_adapter(str(tmp_path / "checkpoint-2"))
    assert torch.equal(logits(again.eval()), logits(model.eval()))


# -------------------------------------------------------------------------------------------------------------- TRL


def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocab = {f"w{i}": i for i in range(VOCAB)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocab, unk_token="w0")), unk_token="w0", pad_token="w1", eos_token="w2"
    )


@pytest.mark.slow
def test_trls_trainer_wraps_trains_and_saves_a_student(bases: Bases, tmp_path: Path) -> None:
    """G7, G9: TRL reads and writes several fields of the config before it wraps the model."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [{"input_ids": example["input_ids"].tolist()} for example in examples()]
    run = SFTTrainer(
        model=bases.base("llama"),
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=3,
            save_steps=3,
            per_device_train_batch_size=4,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=config_for("llama"),
    )
    start = copy_state(run.model)
    run.train()
    changed = {key for key, value in run.model.state_dict().items() if not torch.equal(value, start[key])}
    assert changed == set(trainable(run.model))
    loaded = PeftModel.from_pretrained(bases.base("llama"), tmp_path / "checkpoint-3")
    assert torch.equal(logits(loaded), logits(run.model.eval()))


@pytest.mark.slow
@pytest.mark.parametrize("wrapped", [False, True], ids=["config", "peft-model"])
def test_trls_preference_trainer_refers_to_the_teacher_or_to_a_copy(
    wrapped: bool, bases: Bases, tmp_path: Path
) -> None:
    """G19: with a config the reference is the teacher; with a student it is a frozen copy of that student."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [{"prompt": f"w{i} w{i + 1}", "chosen": f" w{i + 2}", "rejected": f" w{i + 3}"} for i in range(3, 19)]
    student = bases.student("llama")
    with torch.no_grad():
        for parameter in trainable(student).values():
            parameter.mul_(1.1)
    at_first = logits(student)
    run = DPOTrainer(
        model=student if wrapped else bases.base("llama"),
        args=DPOConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            learning_rate=1e-2,
            save_strategy="no",
            per_device_train_batch_size=4,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=None if wrapped else config_for("llama"),
    )
    run.train()
    assert torch.equal(teacher_logits(run.model.eval()), logits(bases.base("llama")))
    if wrapped:
        assert not torch.equal(logits(run.model), at_first)
        run.model.set_adapter("ref")
        assert torch.equal(logits(run.model), at_first)
