"""A gallery holds what the model says greedily, no more, no less, and leaves models as they were."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import asdict

import pytest
import torch
from transformers import GenerationConfig

from bitdistiller_peft.errors import ConfigError, DataError, StateError
from bitdistiller_peft.evaluation import generate_gallery
from bitdistiller_peft.evaluation.gallery import OPENINGS, QUESTIONS


def greedy(model, ids: list[int], stop: int, most: int) -> list[int]:
    """One forward pass per token, without a cache."""
    made: list[int] = []
    with torch.no_grad():
        while len(made) < most and stop not in made:
            made.append(int(model.eval()(torch.tensor([ids + made])).logits[0, -1].argmax()))
    return made


def chat(tokenizer, text: str) -> list[int]:
    return tokenizer(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]


def test_answers_are_the_greedy_ones_of_the_chat_template(model, tokenizer) -> None:
    found = generate_gallery(model, tokenizer, max_new_tokens=5, show_progress=False)
    assert [entry.prompt for entry in found.entries] == list(QUESTIONS)
    assert (found.state, found.teacher_state) == ("full_precision", None)
    for entry in found.entries[:3]:
        expected = greedy(model, chat(tokenizer, entry.prompt), tokenizer.eos_token_id, 5)
        assert entry.answer.text == tokenizer.decode(expected, skip_special_tokens=True)
        assert entry.answer.num_tokens == len(expected)
        assert entry.answer.is_finished == (expected[-1] == tokenizer.eos_token_id)
    assert "/prompts=8/chat=yes/max_new_tokens=5/" in found.protocol


def test_without_a_template_the_model_continues(model, with_bos) -> None:
    tokenizer = with_bos()
    tokenizer.chat_template = None
    found = generate_gallery(model, tokenizer, max_new_tokens=3, show_progress=False)
    assert [entry.prompt for entry in found.entries] == list(OPENINGS)
    ids = tokenizer(OPENINGS[0])["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id, "this tokenizer ends every text, and a prompt must not end"
    expected = greedy(model, ids[:-1], tokenizer.eos_token_id, 3)
    assert found.entries[0].answer.text == tokenizer.decode(expected, skip_special_tokens=True)


def test_the_teacher_of_a_student_answers_beside_it(student, twin, tokenizer) -> None:
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "bitdistiller" in name and parameter.requires_grad and parameter.ndim == 2:
                parameter.mul_(-1)
    student.train()
    mine = generate_gallery(student, tokenizer, QUESTIONS[:2], teacher="self", max_new_tokens=6, show_progress=False)
    assert (mine.state, mine.teacher_state) == ("student", "full_precision")
    assert student.training
    alone = generate_gallery(twin, tokenizer, QUESTIONS[:2], max_new_tokens=6, show_progress=False)
    assert [e.teacher_answer for e in mine.entries] == [e.answer for e in alone.entries]
    assert [e.answer for e in mine.entries] != [e.answer for e in alone.entries]
    other = generate_gallery(student, tokenizer, QUESTIONS[:2], teacher=twin, max_new_tokens=6, show_progress=False)
    assert other.entries == mine.entries
    assert other.protocol == mine.protocol == alone.protocol


def test_penalties_of_the_generation_config_are_left_out_and_come_back(model, tokenizer) -> None:
    plain = generate_gallery(model, tokenizer, QUESTIONS[:2], max_new_tokens=8, show_progress=False)
    bent = GenerationConfig(repetition_penalty=5.0, do_sample=True, eos_token_id=tokenizer.eos_token_id)
    model.generation_config = bent
    again = generate_gallery(model, tokenizer, QUESTIONS[:2], max_new_tokens=8, show_progress=False)
    assert again.entries == plain.entries
    assert model.generation_config is bent


def test_collapse_and_lost_ends_are_counted(model, tokenizer, monkeypatch) -> None:
    script = {"model": [[5] * 8, [1, 2, 3, 4, 5, 6, 7, 8]], "teacher": [[9, 2], [9, 2]]}
    teacher = deepcopy(model)
    eos = tokenizer.eos_token_id
    for name, one in (("model", model), ("teacher", teacher)):
        answers = iter(script[name])

        def speak(answers=answers, **kwargs):
            made = [eos if token == 2 else token for token in next(answers)]
            return torch.tensor([kwargs["input_ids"][0].tolist() + made])

        monkeypatch.setattr(one, "generate", speak)
    words = {(5,) * 8: "!!!!!!!!", (9, eos): "Hi."}
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **kwargs: words.get(tuple(ids), "some words"), raising=False)
    found = generate_gallery(model, tokenizer, QUESTIONS[:2], teacher=teacher, max_new_tokens=8, show_progress=False)
    first, second = found.entries
    assert first.answer.collapse.kind == "repeated character"
    assert first.has_lost_end
    assert first.teacher_answer is not None
    assert first.teacher_answer.is_finished
    assert second.answer.is_finished, "token 2 is the end in this script"
    assert (found.num_collapsed, found.num_lost_ends) == (1, 1)
    assert "1 of 2 answers collapsed" in str(found)
    assert json.loads(json.dumps(asdict(found)))["entries"][0]["answer"]["collapse"]["repeats"] == 8


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_new_tokens": 0}, ConfigError, "`max_new_tokens`"),
        ({"max_new_tokens": 100_000}, ConfigError, "leave room for the prompts in the context of the model"),
        ({"prompts": []}, DataError, "`prompts` must be a list"),
        ({"prompts": "Say hello."}, DataError, "`prompts` must be a list"),
        ({"prompts": ["a", " "]}, DataError, "none of them empty"),
        ({"teacher": "self"}, StateError, "needs a student"),
        ({"teacher": "other"}, ConfigError, "`teacher` must be a model or 'self'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_refused(model, tokenizer, options, error, message) -> None:
    with pytest.raises(error, match=message):
        generate_gallery(model, tokenizer, **options)
    with pytest.raises(StateError, match="must be another model"):
        generate_gallery(model, tokenizer, teacher=model)


def test_a_tokenizer_of_another_model_is_refused(model, tokenizer) -> None:
    model.config.vocab_size = 100
    with pytest.raises(DataError, match="must belong to the model"):
        generate_gallery(model, tokenizer)
