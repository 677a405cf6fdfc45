"""Perplexity is the definition, whatever batch, tile and dtype; and nothing uncertain becomes a number."""

from __future__ import annotations

import math

import pytest
import torch

from bitdistiller_peft.errors import ConfigError, DataError, StateError, TrainingError
from bitdistiller_peft.evaluation import forward
from bitdistiller_peft.evaluation.perplexity import evaluate_perplexity
from tests.evaluation.test_forward import snapshot


def measure(model, tokenizer, text, **changes):
    return evaluate_perplexity(
        model, tokenizer, text, **{"seq_len": 12, "max_chunks": 4, "show_progress": False, **changes}
    )


def textbook(model, tokenizer, text: str, seq_len: int, num_chunks: int) -> float:
    """Each token from its prefix alone, one forward pass per token, in fp64 Python numbers."""
    tokens, nats = tokenizer(text)["input_ids"], []
    for chunk in range(num_chunks):
        for at in range(1, seq_len):
            start = chunk * seq_len
            prefix = torch.tensor([tokens[start : start + at]])
            with torch.no_grad():
                logits = model(input_ids=prefix).logits[0, -1].tolist()
            top = max(logits)
            log_z = top + math.log(sum(math.exp(value - top) for value in logits))
            nats.append(log_z - logits[tokens[start + at]])
    return math.exp(sum(nats) / len(nats))


@pytest.mark.parametrize("kind", ["model", "student"])
def test_it_is_the_definition(kind: str, tokenizer, text, request) -> None:
    subject = request.getfixturevalue(kind)
    expected = textbook(subject, tokenizer, text, 12, 4)
    result = measure(subject, tokenizer, text)
    assert result.perplexity == pytest.approx(expected, rel=1e-5)
    assert result.nll_nats_per_token == pytest.approx(math.log(expected), rel=1e-6)
    assert (result.num_tokens, result.num_chunks) == (44, 4)


@pytest.mark.parametrize("changes", [{"batch_size": 3}, {"batch_size": 99}], ids=str)
def test_batches_change_nothing_but_speed(model, tokenizer, text, changes) -> None:
    one, other = measure(model, tokenizer, text), measure(model, tokenizer, text, **changes)
    assert other.perplexity == pytest.approx(one.perplexity, rel=1e-6)
    assert other.chunk_nll_nats == pytest.approx(one.chunk_nll_nats, rel=1e-5)
    assert other.protocol == one.protocol


def test_tiles_change_nothing(model, tokenizer, text, monkeypatch) -> None:
    whole = measure(model, tokenizer, text, batch_size=2)
    monkeypatch.setattr(forward, "_TILE_ELEMENTS", 5 * 512)
    assert measure(model, tokenizer, text, batch_size=2).perplexity == pytest.approx(whole.perplexity, rel=1e-7)


def test_half_precision_logits_are_scored_in_fp32(model, tokenizer, text) -> None:
    model.bfloat16()
    result = measure(model, tokenizer, text)
    tokens = torch.tensor(tokenizer(text)["input_ids"][:48]).view(4, 12)
    with torch.no_grad():
        logits = torch.cat([model(input_ids=row[None]).logits for row in tokens]).double()
    nats = -logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None]).mean().item()
    assert result.nll_nats_per_token == pytest.approx(nats, rel=1e-6)


def test_the_chunks_average_to_the_whole(model, tokenizer, text) -> None:
    result = measure(model, tokenizer, text)
    assert sum(result.chunk_nll_nats) / 4 == pytest.approx(result.nll_nats_per_token)
    assert len(set(result.chunk_nll_nats)) == 4


def test_rows_are_joined(model, tokenizer) -> None:
    rows = [" ", " = Title = ", " ", " Some text that goes on for a while . "]
    joined = "\n\n = Title = \n\n\n\n\n Some text that goes on for a while . \n"
    assert measure(model, tokenizer, rows).protocol == measure(model, tokenizer, joined).protocol


def test_the_result_says_what_was_measured_and_how(student, tokenizer, text) -> None:
    result = measure(student, tokenizer, text)
    assert str(result) == (
        f"perplexity {result.perplexity:,.2f} | ppl/v1/seq_len=12/chunks=4/bos=no/"
        f"tokens={result.protocol[-12:]} | evaluated as: student"
    )
    assert result.seconds > 0


def test_the_student_scores_as_what_is_packed_and_not_as_the_teacher(student, tokenizer, text) -> None:
    as_student = measure(student, tokenizer, text)
    with student.disable_adapter():
        as_teacher = measure(student, tokenizer, text)
    as_packed = measure(student.pack_and_unload(progressbar=False), tokenizer, text)
    assert as_packed.chunk_nll_nats == as_student.chunk_nll_nats
    assert as_teacher.nll_nats_per_token != pytest.approx(as_student.nll_nats_per_token, rel=1e-2)
    assert [r.state for r in (as_student, as_teacher, as_packed)] == ["student", "full_precision", "packed"]


def test_dropout_is_off_and_everything_is_given_back(student, tokenizer, text) -> None:
    expected = measure(student, tokenizer, text).perplexity
    for layer in student.base_model.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    student.train()
    before = snapshot(student)
    assert measure(student, tokenizer, text).perplexity == expected
    assert snapshot(student) == before


def test_progress_shows_the_perplexity_so_far(model, tokenizer, text, capsys) -> None:
    result = measure(model, tokenizer, text, show_progress=True)
    shown = capsys.readouterr().err
    assert "4/4" in shown
    assert f"perplexity={result.perplexity:,.2f}" in shown


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_refused_with_its_chunk(model, tokenizer, text, poison: float) -> None:
    tokens = tokenizer(text)["input_ids"][:48]
    last_chunk = next(token for token in tokens[36:47] if token not in tokens[:36])
    model.get_output_embeddings().weight = torch.nn.Parameter(model.get_output_embeddings().weight.clone())
    model.get_input_embeddings().weight.data[last_chunk] = poison
    with pytest.raises(TrainingError, match="got nan in chunk 3"):
        measure(model, tokenizer, text, batch_size=2)


def test_a_perplexity_beyond_all_numbers_is_infinite(model, tokenizer, text) -> None:
    model.get_output_embeddings().weight.data.mul_(1e6)
    result = measure(model, tokenizer, text)
    assert math.isinf(result.perplexity)
    assert math.isfinite(result.nll_nats_per_token)


def test_what_cannot_be_measured_is_refused_before_anything_runs(model, tokenizer, text) -> None:
    model.forward = None  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="`batch_size` must be a whole number of at least 1: got batch_size=0"):
        measure(model, tokenizer, text, batch_size=0)
    with pytest.raises(ConfigError, match="context=2048"):
        measure(model, tokenizer, text, seq_len=2049)
    with pytest.raises(DataError, match="must not be empty"):
        measure(model, tokenizer, "")
    model.config.quantization_config = {"quant_method": "bitdistiller", "state": "latent"}
    with pytest.raises(StateError, match="master weights"):
        measure(model, tokenizer, text)


def test_master_weights_are_scored_on_request_and_labelled(model, tokenizer, text) -> None:
    plain = measure(model, tokenizer, text)
    model.config.quantization_config = {"quant_method": "bitdistiller", "state": "latent"}
    assert measure(model, tokenizer, text, allow_latent=True).state == "latent_float"
    assert measure(model, tokenizer, text, allow_latent=True).perplexity == plain.perplexity
