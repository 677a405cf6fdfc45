"""Steps on the student's own text: what is replaced, by what, when, and that a resumed run does the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bitdistiller_peft.errors import ConfigError
from tests.training import helpers

OWN = {"on_policy_share": 1.0, "on_policy_max_new_tokens": 6, "on_policy_prompt_tokens": 3}


def completed(run: Any, batch: dict[str, torch.Tensor], step: int = 0) -> dict[str, torch.Tensor]:
    (made,) = run._on_policy.complete(run.model, [batch], step)
    return made


@pytest.mark.parametrize("prompts", [True, False])
def test_prompts_stay_and_completions_are_targets(bases: Path, tmp_path: Path, prompts: bool) -> None:
    run = helpers.trainer(helpers.student(bases), tmp_path, **OWN)
    given = helpers.batch(helpers.dataset(6, prompts=prompts))
    made = completed(run, given)
    for row in range(6):
        length = int(given["attention_mask"][row].sum())
        first = length // 3
        prompt = given["input_ids"][row, : first if prompts and first > 1 else 3]
        text = made["input_ids"][row][made["attention_mask"][row].bool()].tolist()
        assert text[: len(prompt)] == prompt.tolist()
        completion = text[len(prompt) :]
        assert 1 <= len(completion) <= 6
        assert len(completion) == 6 or completion[-1] == 2  # the end of a text
        assert 2 not in completion[:-1]
        wanted = [-100] * len(prompt) + completion
        assert made["labels"][row].tolist() == wanted + [-100] * (made["labels"].shape[1] - len(wanted))


def test_the_quantized_student_is_asked_not_its_latent_weights_or_the_teacher(bases: Path, tmp_path: Path) -> None:
    run = helpers.trainer(helpers.student(bases), tmp_path, **{**OWN, "on_policy_temperature": 1e-6})
    made = completed(run, helpers.batch(helpers.dataset(4)))
    with torch.no_grad():  # nearly greedy: every target is what the quantized student finds likeliest
        logits = run.model.eval()(input_ids=made["input_ids"], attention_mask=made["attention_mask"]).logits
    targets = made["labels"][:, 1:]
    is_target = targets != -100
    assert torch.equal(logits[:, :-1].argmax(-1)[is_target], targets[is_target])
    with torch.no_grad(), run.model.disable_adapter():
        teacher = run.model(input_ids=made["input_ids"], attention_mask=made["attention_mask"]).logits
    assert not torch.equal(teacher[:, :-1].argmax(-1)[is_target], targets[is_target])


def test_sampling_leaves_the_model_and_the_random_state_as_they_were(bases: Path, tmp_path: Path) -> None:
    run = helpers.trainer(helpers.student(bases), tmp_path, **OWN)
    run.model.train()
    before, state = helpers.weights(run.model), torch.random.get_rng_state()
    caching = run.model.config.use_cache
    first = completed(run, helpers.batch(helpers.dataset(4)))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert run.model.training
    assert run.model.config.use_cache == caching
    assert helpers.difference(before, helpers.weights(run.model)) == 0
    again = completed(run, helpers.batch(helpers.dataset(4)))
    assert torch.equal(first["input_ids"], again["input_ids"])
    other = completed(run, helpers.batch(helpers.dataset(4)), step=1)
    assert first["input_ids"].shape != other["input_ids"].shape or not torch.equal(
        first["input_ids"], other["input_ids"]
    )


def test_the_second_phase_begins_when_it_is_said_and_is_logged(bases: Path, tmp_path: Path) -> None:
    run = helpers.trainer(helpers.student(bases), tmp_path, **OWN, on_policy_after=0.5, max_steps=4)
    run.train()
    assert helpers.history(run, "on_policy") == [0, 0, 1, 1]
    plain = helpers.trainer(helpers.student(bases), tmp_path, max_steps=4)
    plain.train()
    ours, theirs = helpers.history(run), helpers.history(plain)
    assert ours[:2] == theirs[:2]
    assert ours[2] != theirs[2]


def test_a_share_is_a_share(bases: Path, tmp_path: Path) -> None:
    run = helpers.trainer(helpers.student(bases), tmp_path, **{**OWN, "on_policy_share": 0.3})
    due = [run._on_policy.is_due(step, 1000) for step in range(1000)]
    assert 250 < sum(due) < 350


def test_a_resumed_run_ends_with_the_same_weights(bases: Path, tmp_path: Path) -> None:
    settings = {**OWN, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = helpers.trainer(helpers.student(bases), tmp_path / "whole", **settings)
    whole.train()
    again = helpers.trainer(helpers.student(bases), tmp_path / "again", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert helpers.difference(helpers.weights(whole.model), helpers.weights(again.model)) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"on_policy_share": 1.5}, "`on_policy_share` must lie in"),
        ({"on_policy_after": 1.0}, "`on_policy_after` must lie in"),
        ({"on_policy_temperature": 0.0}, "`on_policy_temperature` must be positive"),
        ({"on_policy_max_new_tokens": 0}, "`on_policy_max_new_tokens` must be a positive integer"),
        ({"on_policy_share": 1.0, "packing": True}, "`packing` must change for on_policy_share=1.0"),
        ({"on_policy_share": 0.5, "teacher": "cached", "teacher_cache": "x"}, "`teacher` must change"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        helpers.config(tmp_path, **changes)
