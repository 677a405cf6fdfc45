"""Prompts for the teacher: checked, rendered, tokenized, and each with a seed of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bitdistiller_peft.errors import DataError
from bitdistiller_peft.training.fingerprints import sha256_of

Message = dict[str, str]
MESSAGE_KEYS = {"role", "content"}
_MAX_NAMED = 5


@dataclass(frozen=True)
class Prompt:
    """One prompt, ready to be continued.

    Attributes:
        index: its place in the list that was given.
        value: the text or messages as given.
        ids: the tokens that the teacher reads.
        seed: of its random stream. It comes from the prompt itself, so neither the place in the list nor what else is
            in the list changes it; a prompt that comes again gets another seed each time.
    """

    index: int
    value: str | list[Message]
    ids: list[int] = field(repr=False)
    seed: int


def prepare_prompts(tokenizer: Any, prompts: Sequence[Any], *, seed: int, chat_template: str | None) -> list[Prompt]:
    """Check and tokenize prompts.

    Text is read as it is, after the tokens that the tokenizer puts before any text. Messages go through the chat
    template, up to where the assistant's turn begins.

    Args:
        tokenizer: the teacher's tokenizer; it is not changed.
        prompts: strings, or lists of messages ``{"role": ..., "content": ...}``; not both.
        seed: what all seeds are derived from.
        chat_template: a template in place of the tokenizer's own.

    Raises:
        DataError: no prompts, an empty or malformed one (its index is named), or messages without a template.
    """
    if isinstance(prompts, (str, bytes)):
        raise DataError("`prompts` must be a list: got a single text. Pass [text].")
    values = list(prompts)
    if not values:
        raise DataError("`prompts` must not be empty: got no prompt. A few thousand are a good start.")
    for index, value in enumerate(values):
        _check_prompt(index, value, is_text=isinstance(values[0], str))
    if isinstance(values[0], str):
        front = _front_tokens(tokenizer)
        rows = [front + _tokenize(tokenizer, value) for value in values]
    else:
        rows = [_tokenize(tokenizer, text) for text in _render(tokenizer, values, chat_template)]
    for index, ids in enumerate(rows):
        if not ids:
            raise DataError(f"every prompt must have a token: got none for prompt {index}, {values[index]!r}.")
    seeds = _seeds(values, seed)
    return [Prompt(*row) for row in zip(range(len(values)), values, rows, seeds, strict=True)]


def check_lengths(prompts: Sequence[Prompt], max_new_tokens: int, context: int | None) -> None:
    """Refuse prompts that leave no room for an answer.

    Args:
        prompts: all of them.
        max_new_tokens: what an answer may take.
        context: the teacher's context in tokens, if it has a bound.

    Raises:
        DataError: prompts are too long; the first few are named with their lengths.
    """
    if context is None or context <= 0:
        return
    too_long = [prompt for prompt in prompts if len(prompt.ids) + max_new_tokens > context]
    if not too_long:
        return
    named = ", ".join(f"prompt {prompt.index} ({len(prompt.ids)} tokens)" for prompt in too_long[:_MAX_NAMED])
    more = f" and {len(too_long) - _MAX_NAMED} more" if len(too_long) > _MAX_NAMED else ""
    raise DataError(
        f"every prompt must fit the teacher's context of {context} tokens together with max_new_tokens="
        f"{max_new_tokens}: got {named}{more}. Shorten or leave out these prompts, or lower max_new_tokens."
    )


def fingerprint_prompts(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of the prompts as given and as tokenized."""
    return sha256_of([[prompt.value, prompt.ids] for prompt in prompts])


def _check_prompt(index: int, value: Any, *, is_text: bool) -> None:
    if isinstance(value, str) != is_text:
        raise DataError(f"`prompts` must be all texts or all messages: prompt {index} is not like prompt 0.")
    if is_text:
        if not value.strip():
            raise DataError(f"every prompt must have text: got {value!r} for prompt {index}. Leave it out.")
        return
    if not isinstance(value, (list, tuple)) or not all(_is_message(message) for message in value):
        raise DataError(
            f"every prompt must be a text or a list of messages {{'role': ..., 'content': ...}}: got {value!r} for "
            f"prompt {index}."
        )
    if not value or not value[-1]["content"].strip() or value[-1]["role"] == "assistant":
        raise DataError(
            f"every prompt must end with a message to be answered: got {value!r} for prompt {index}. Leave it out, or "
            "drop the assistant's last message."
        )


def _is_message(message: Any) -> bool:
    is_complete = isinstance(message, dict) and message.keys() == MESSAGE_KEYS
    return is_complete and all(isinstance(text, str) for text in message.values())


def _render(tokenizer: Any, values: list[list[Message]], chat_template: str | None) -> list[str]:
    if chat_template is None and not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "`chat_template` must be given for messages: got prompts of messages, and the tokenizer has no template. "
            "Pass chat_template=..., or the prompts as text."
        )
    options = {"tokenize": False, "add_generation_prompt": True, "chat_template": chat_template}
    return [tokenizer.apply_chat_template(list(value), **options) for value in values]


def _front_tokens(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts before any text; one behind it would end the prompt."""
    bare = _tokenize(tokenizer, "a")
    whole = list(tokenizer("a")["input_ids"])
    fronts = (whole[:at] for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
    return next(fronts, [])


def _tokenize(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])


def _seeds(values: list[Any], seed: int) -> list[int]:
    """One 63-bit seed per prompt: a hash of the given seed, the prompt, and how often it came before."""
    seen: Counter[str] = Counter()
    seeds = []
    for value in values:
        key = sha256_of(value)
        seeds.append(int(sha256_of([seed, key, seen[key]])[:16], 16) >> 1)
        seen[key] += 1
    return seeds
