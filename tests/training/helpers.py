"""Small students, a tokenizer without a download, and trainers whose runs can be compared bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from peft.utils.integrations import gather_params_ctx
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributions import Categorical, kl_divergence
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bitdistiller_peft import BitDistillerConfig, get_bitdistiller_model
from bitdistiller_peft.training import DistillConfig, DistillTrainer
from tests import tiny

WORDS = [f"w{i}" for i in range(tiny.VOCAB - 3)]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, 96 of them: what the tiny models speak."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {word: i + 3 for i, word in enumerate(WORDS)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def token_rows(count: int = 16, seed: int = 0, longest: int = 24) -> list[list[int]]:
    """Random rows of very different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, tiny.VOCAB, (n,), generator=generator).tolist() for n in lengths]


def dataset(count: int = 16, seed: int = 0, longest: int = 24, prompts: bool = True) -> Dataset:
    """Tokenized rows; the first third of each is a prompt that is not trained on, if there are to be prompts."""
    rows = token_rows(count, seed, longest)
    labels = [[-100] * (len(row) // 3) + row[len(row) // 3 :] if prompts else row for row in rows]
    return Dataset.from_dict({"input_ids": rows, "labels": labels})


def base(folder: Path, name: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A fresh full-precision model; a head of its own is scaled up, since a random one has next to no opinion."""
    model = tiny.load(tiny.save_base(name, folder, seed=seed, dtype=dtype))
    if not model.config.tie_word_embeddings:
        head = model.get_output_embeddings().weight
        with gather_params_ctx(head):  # under ZeRO-3, it was loaded in parts
            head.data.mul_(20)
    return model


def student(
    folder: Path, name: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any
) -> PeftModel:
    """A fresh quantized student of `base`."""
    model = base(folder, name, dtype, seed)
    return get_bitdistiller_model(model, BitDistillerConfig(**{"bits": 2, "group_size": 32, **config}))


def config(folder: Path, **changes: Any) -> DistillConfig:
    """Deterministic plain SGD in fp32 on the CPU, silent."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "optim": "sgd",
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "gamma": 0.4,
    }
    return DistillConfig(**settings | changes)


def trainer(model: Any, folder: Path, *, data: Any = None, eval_data: Any = None, teacher: Any = None, **changes: Any):
    """A trainer over the standard data; further keywords go to the config."""
    return DistillTrainer(
        model,
        config(folder, **changes),
        teacher=teacher,
        train_dataset=dataset() if data is None else data,
        eval_dataset=eval_data,
        processing_class=tokenizer(),
    )


def textbook_loss(model: PeftModel, inputs: dict[str, torch.Tensor], gamma: float) -> tuple[float, int]:
    """CAKLD from whole logits in fp64, summed over the targets of a padded batch, and their number."""
    labels = inputs["labels"]
    plain = {name: value for name, value in inputs.items() if name != "labels"}
    with torch.no_grad():
        student_logits = model(**plain).logits.double()
        with model.disable_adapter():
            teacher_logits = model(**plain).logits.double()
    total, count = 0.0, 0
    for row in range(len(labels)):
        for t in range(labels.shape[1] - 1):
            if labels[row, t + 1] == -100:
                continue
            s, t_ = (Categorical(logits=logits[row, t]) for logits in (student_logits, teacher_logits))
            total += float(gamma * kl_divergence(s, t_) + (1 - gamma) * kl_divergence(t_, s))
            count += 1
    return total, count


def batch(rows: Dataset) -> dict[str, torch.Tensor]:
    """Pad a few rows on the right."""
    longest = max(map(len, rows["input_ids"]))
    pad = [longest - len(row) for row in rows["input_ids"]]
    return {
        "input_ids": torch.tensor([row + [0] * n for row, n in zip(rows["input_ids"], pad, strict=True)]),
        "attention_mask": torch.tensor([[1] * len(r) + [0] * n for r, n in zip(rows["input_ids"], pad, strict=True)]),
        "labels": torch.tensor([row + [-100] * n for row, n in zip(rows["labels"], pad, strict=True)]),
    }


def weights(model: Any) -> dict[str, torch.Tensor]:
    """A copy of everything that is trained."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """The largest difference of two sets of weights."""
    assert left.keys() == right.keys()
    assert left
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def history(run: DistillTrainer, key: str = "loss") -> list[float]:
    """One figure of every log entry that has it."""
    return [entry[key] for entry in run.state.log_history if key in entry]


def assert_loss_and_gradients(
    run: DistillTrainer, inputs: dict, formula: Callable[[], torch.Tensor], rel: float, atol: float
) -> None:
    """The trainer's loss of a batch, and the gradient of every trained tensor, are those of a formula in fp64."""
    model = run.model.train()
    loss = run.compute_loss(model, inputs)
    loss.backward()
    ours = {name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected = formula()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=rel)
    assert ours
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(ours[name], parameter.grad.double(), rtol=1e-3, atol=atol)
