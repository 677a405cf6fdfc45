"""Mixtures have the shares that were asked for, chat templates included, and say what is in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bitdistiller_peft.errors import ConfigError, DataError
from bitdistiller_peft.training import mix_data
from tests import standin
from tests.training import helpers

CHATS = [
    {"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"A number, {n}."}]}
    for n in range(8)
]
TEXTS = standin.english()[:12]
OWN = [{"prompt": "Say it: ", "completion": f"it is {n}", "num_tokens": 4} for n in range(4)]


def mix(sources: dict[str, Any], shares: dict[str, float], **changes: Any) -> Any:
    return mix_data(sources, shares, standin.tokenizer(), **{"num_tokens": 4000, "max_length": 128, **changes})


def masks(data: Any) -> list[list[bool]]:
    return [[label != -100 for label in labels] for labels in data["labels"]]


def test_shares_are_those_of_tokens() -> None:
    shares = {"web": 0.5, "chat": 0.3, "own": 0.2}
    data, report = mix({"web": TEXTS, "chat": CHATS, "own": OWN}, shares)
    assert sum(map(len, data["input_ids"])) == sum(row.tokens for row in report.sources)
    assert sum(map(sum, masks(data))) == sum(row.targets for row in report.sources)
    for row in report.sources:
        assert row.share == pytest.approx(shares[row.name], abs=0.01)
        assert row.asked == shares[row.name]
    web, chat, own = report.sources
    assert web.targets == web.tokens
    assert chat.targets < chat.tokens
    assert own.passes > 1  # short, so it came again
    assert own.documents == round(own.passes * len(OWN))
    assert max(map(len, data["input_ids"])) == 128
    header, *lines = str(report).splitlines()
    assert header.split()[:3] == ["source", "asked", "share"]
    assert [line.split()[:2] for line in lines] == [["web", "50.0%"], ["chat", "30.0%"], ["own", "20.0%"]]


def test_conversations_go_through_the_template_and_the_answer_is_the_target() -> None:
    fast = standin.tokenizer()
    data, _ = mix({"chat": CHATS[:1]}, {"chat": 1.0}, num_tokens=200)
    ids, mask = data[0]["input_ids"], masks(data)[0]
    assert fast.decode(ids) == fast.apply_chat_template(CHATS[0]["messages"], tokenize=False)
    assert fast.decode([i for i, m in zip(ids, mask, strict=True) if m]) == "A number, 0.<|im_end|>\n"
    turned = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    data, _ = mix({"chat": CHATS[:1]}, {"chat": 1.0}, num_tokens=200, chat_template=turned)
    assert fast.decode(data[0]["input_ids"]) == "user: What is 0?\nassistant: A number, 0.\n"


def test_teacher_data_of_both_kinds_are_read() -> None:
    fast = standin.tokenizer()
    chat = {"prompt": CHATS[0]["messages"][:1], "completion": CHATS[0]["messages"][1:]}
    data, _ = mix({"own": [chat]}, {"own": 1.0}, num_tokens=100)
    assert fast.decode(data[0]["input_ids"]) == fast.apply_chat_template(CHATS[0]["messages"], tokenize=False)
    data, _ = mix({"own": OWN[:1]}, {"own": 1.0}, num_tokens=100)
    ids, mask = data[0]["input_ids"], masks(data)[0]
    assert fast.decode([i for i, m in zip(ids, mask, strict=True) if m]) == "it is 0<|im_end|>"
    assert fast.decode([i for i, m in zip(ids, mask, strict=True) if not m]) == "Say it: "


def test_the_order_depends_on_the_seed_alone() -> None:
    sources, shares = {"web": TEXTS, "chat": CHATS}, {"web": 0.5, "chat": 0.5}
    first, again, other = (mix(sources, shares, seed=seed)[0]["input_ids"][:] for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("sources", "shares", "error", "message"),
    [
        ({"web": TEXTS}, {"wbe": 1.0}, ConfigError, "wbe"),
        ({"web": TEXTS}, {"web": 0.9}, ConfigError, "0.9"),
        ({"web": TEXTS, "chat": CHATS}, {"web": 1.0, "chat": 0.0}, ConfigError, "positive"),
        ({"web": []}, {"web": 1.0}, DataError, "source 'web'.*got none"),
        ({"web": [{"txt": "a"}]}, {"web": 1.0}, DataError, r"source 'web'.*\['txt'\] in row 0"),
        ({"web": [3]}, {"web": 1.0}, DataError, "int in row 0"),
        ({"c": [{"messages": CHATS[0]["messages"][:1]}]}, {"c": 1.0}, DataError, "must end with the assistant"),
        ({"c": [{"prompt": "long " * 200, "completion": "a"}]}, {"c": 1.0}, DataError, "max_length=128: row 0"),
    ],
)
def test_what_cannot_be_mixed_is_refused(sources: Any, shares: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mix(sources, shares)
    with pytest.raises(ConfigError, match="num_tokens=0"):
        mix({"web": TEXTS}, {"web": 1.0}, num_tokens=0)


def test_a_template_that_rewrites_the_question_is_refused() -> None:
    changing = "{% if add_generation_prompt %}now{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="keep what comes before"):
        mix({"chat": CHATS}, {"chat": 1.0}, chat_template=changing)


def test_the_trainer_takes_a_mixture(bases: Path, tmp_path: Path) -> None:
    data, report = mix({"web": TEXTS, "chat": CHATS}, {"web": 0.5, "chat": 0.5}, num_tokens=600, max_length=64)
    run = helpers.trainer(helpers.student(bases), tmp_path, data=data)
    targets = sum(int((run.data_collator([row])["labels"][:, 1:] != -100).sum()) for row in run.train_dataset)
    assert targets == sum(row.targets for row in report.sources) - sum(mask[0] for mask in masks(data))
