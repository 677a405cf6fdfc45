"""The divergence equals torch.distributions, position by position, and `self` is the model with its adapters off."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from transformers import LlamaConfig, LlamaForCausalLM

from bitdistiller_peft.errors import ConfigError, StateError, TrainingError
from bitdistiller_peft.evaluation import forward
from bitdistiller_peft.evaluation.divergence import evaluate_divergence
from tests.evaluation.test_forward import snapshot


def measure(student, teacher, tokenizer, text, **changes):
    settings = {"seq_len": 12, "max_chunks": 4, "show_progress": False, **changes}
    return evaluate_divergence(student, teacher, tokenizer, text, **settings)


@pytest.fixture
def logits(student, tokenizer, text) -> tuple[torch.Tensor, torch.Tensor]:
    """Student's and teacher's logits at the predicting positions, `[44, vocab]` in fp64."""
    ids = torch.tensor(tokenizer(text)["input_ids"][:48]).view(4, 12)
    with torch.no_grad():
        ours = student(input_ids=ids).logits[:, :-1].flatten(0, 1).double()
        with student.disable_adapter():
            theirs = student(input_ids=ids).logits[:, :-1].flatten(0, 1).double()
    return ours, theirs


@pytest.mark.parametrize("batch_size", [1, 3])
def test_it_agrees_with_torch_distributions(student, logits, tokenizer, text, batch_size: int, monkeypatch) -> None:
    monkeypatch.setattr(forward, "_TILE_ELEMENTS", 5 * 512)
    result = measure(student, "self", tokenizer, text, batch_size=batch_size)
    ours, theirs = logits
    kl = kl_divergence(Categorical(logits=theirs), Categorical(logits=ours))
    assert result.mean_kl_nats == pytest.approx(kl.mean().item(), rel=1e-5)
    assert result.p95_kl_nats == pytest.approx(np.quantile(kl.numpy(), 0.95), rel=1e-5)
    assert result.top1_agreement == (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()
    assert 0 < result.top1_agreement < 1
    assert (result.num_tokens, result.num_chunks) == (44, 4)
    assert (result.state, result.teacher_state) == ("student", "full_precision")
    assert result.protocol.startswith("kl/v1/seq_len=12/chunks=4/bos=no/tokens=")


def test_self_and_a_separate_teacher_agree(student, twin, tokenizer, text) -> None:
    own = measure(student, "self", tokenizer, text)
    separate = measure(student, twin, tokenizer, text)
    assert separate.mean_kl_nats == own.mean_kl_nats
    packed = student.pack_and_unload(progressbar=False)
    assert measure(packed, twin, tokenizer, text).p95_kl_nats == own.p95_kl_nats


def test_a_model_like_its_teacher_has_no_divergence(model, twin, tokenizer, text) -> None:
    result = measure(model, twin, tokenizer, text)
    assert (result.mean_kl_nats, result.p95_kl_nats, result.top1_agreement) == (0.0, 0.0, 1.0)


def test_both_models_are_given_back_as_they_were(student, twin, tokenizer, text) -> None:
    teacher = twin.train()
    student.train()
    next(p for name, p in student.named_parameters() if name.endswith("weight_scale")).requires_grad_(False)
    before = snapshot(student), snapshot(teacher)
    measure(student, teacher, tokenizer, text)
    measure(student, "self", tokenizer, text)
    assert (snapshot(student), snapshot(teacher)) == before
    assert not any(layer.disable_adapters for _, layer in student.base_model.student_layers())


def test_what_would_come_out_as_zero_is_refused(student, model, tokenizer, text) -> None:
    for part in (student, student.get_base_model()):
        with pytest.raises(StateError, match="got the student"):
            measure(student, part, tokenizer, text)
    with student.disable_adapter(), pytest.raises(StateError, match="state 'full_precision'"):
        measure(student, "self", tokenizer, text)
    student.merge_adapter()  # disabling it would unmerge it for good
    with pytest.raises(StateError, match="a merged student"):
        measure(student, "self", tokenizer, text)
    with pytest.raises(ConfigError, match="'sefl'"):
        measure(student, "sefl", tokenizer, text)  # type: ignore[arg-type]


def test_models_that_do_not_fit_are_refused(student, tokenizer, text) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    wider = LlamaForCausalLM(LlamaConfig(vocab_size=640, **sizes))
    with pytest.raises(ConfigError, match="640"):
        measure(student, wider, tokenizer, text)
    shorter = LlamaForCausalLM(LlamaConfig(vocab_size=512, max_position_embeddings=8, **sizes))
    with pytest.raises(ConfigError, match="context of the teacher"):
        measure(student, shorter, tokenizer, text)


def test_a_divergence_that_is_not_finite_is_refused_with_its_chunk(student, tokenizer, text) -> None:
    tokens = tokenizer(text)["input_ids"][:48]
    late = next(token for token in tokens[36:47] if token not in tokens[:36])
    head = student.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())  # untied: only the inputs are poisoned
    student.get_input_embeddings().weight.data[late] = torch.nan
    with pytest.raises(TrainingError, match="in chunk 3"):
        measure(student, "self", tokenizer, text, batch_size=2)


def test_the_result_reads_as_one_line(student, tokenizer, text) -> None:
    line = str(measure(student, "self", tokenizer, text))
    assert "KL(teacher ‖ student)" in line
    assert line.endswith("evaluated as: student, teacher: full_precision")
