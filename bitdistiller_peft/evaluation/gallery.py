"""A small gallery: what a model says to fixed prompts, greedily, beside what its teacher says.

A perplexity can look fair while the model no longer ends a sentence. Eight answers show that at a glance, and
`detect_collapse` sees it without a reader. Each prompt runs alone, so that no answer depends on padding.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig

from bitdistiller_peft.errors import ConfigError, DataError
from bitdistiller_peft.evaluation.collapse import Collapse, detect_collapse
from bitdistiller_peft.evaluation.protocol import check_at_least, front_tokens, limits, tokenize
from bitdistiller_peft.evaluation.state import detect_state
from bitdistiller_peft.evaluation.teacher import check_teacher, speaking
from bitdistiller_peft.hub.generation import cut_at_stop, stop_and_pad_ids, without_generation_defaults
from bitdistiller_peft.tuner import borrowed

GALLERY_VERSION = 1
QUESTIONS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a short story about a lighthouse keeper.",
    "List three healthy breakfasts.",
    "Write a Python function that returns the largest number of a list.",
    "A train travels 120 km in 2 hours. How fast is it?",
    "Translate into German: The weather is nice today.",
    "Say hello.",
)
"""For tokenizers with a chat template."""
OPENINGS = (
    "The capital of France is",
    "The sky looks blue because",
    "Once upon a time, a lighthouse keeper",
    "Three healthy breakfasts are",
    "def largest(numbers):\n",
    "A train travels 120 km in 2 hours. Its speed is",
    "In German, 'The weather is nice today' is",
    "Dear Sir or Madam,",
)
"""For those without one."""


@dataclass(frozen=True)
class Generation:
    """What a model said.

    Attributes:
        text: without special tokens.
        num_tokens: how many tokens were made, the one that ended it included.
        is_finished: whether the model ended it, and not the limit.
        collapse: what `detect_collapse` found.
    """

    text: str
    num_tokens: int
    is_finished: bool
    collapse: Collapse


@dataclass(frozen=True)
class GalleryEntry:
    """One prompt.

    Attributes:
        prompt: as given.
        answer: the model's.
        teacher_answer: the teacher's, where there is one.
    """

    prompt: str
    answer: Generation
    teacher_answer: Generation | None = None

    @property
    def has_lost_end(self) -> bool:
        """Whether the teacher ended its answer and the model did not."""
        return self.teacher_answer is not None and self.teacher_answer.is_finished and not self.answer.is_finished


@dataclass(frozen=True)
class Gallery:
    """The answers of a model to all prompts; `str()` shows them.

    Attributes:
        entries: one per prompt.
        protocol: what the model read, and how far it could write; answers of one model under one id are the same.
        state: what was asked, see `detect_state`.
        teacher_state: state of the teacher; `None` without one.
        seconds: how long it took.
    """

    entries: tuple[GalleryEntry, ...]
    protocol: str
    state: str
    teacher_state: str | None
    seconds: float

    @property
    def num_collapsed(self) -> int:
        """Answers that are broken."""
        return sum(entry.answer.collapse.is_collapsed for entry in self.entries)

    @property
    def num_lost_ends(self) -> int:
        """Answers that do not end where the teacher's do."""
        return sum(entry.has_lost_end for entry in self.entries)

    def __str__(self) -> str:
        lines = [f"{self.num_collapsed} of {len(self.entries)} answers collapsed | {self.protocol} | {self.state}"]
        for entry in self.entries:
            lines += ["", f"> {entry.prompt}", entry.answer.text, f"[{entry.answer.collapse}]"]
            if entry.teacher_answer is not None:
                lines += ["teacher: " + entry.teacher_answer.text]
        return "\n".join(lines)


def generate_gallery(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str] | None = None,
    *,
    teacher: nn.Module | Literal["self"] | None = None,
    max_new_tokens: int = 64,
    allow_latent: bool = False,
    show_progress: bool = True,
) -> Gallery:
    """Let a model, and its teacher, answer prompts greedily, and look for collapse.

    Prompts are a user's message where the tokenizer has a chat template, and openings to be continued where it has
    none. Penalties and limits of the model's generation config are left out: they would hide what is looked for. Models
    are given back as they were.

    Args:
        model: a transformers model or a `PeftModel`, in whatever state; the state is found out and reported.
        tokenizer: the model's tokenizer.
        prompts: texts; `None` takes `QUESTIONS`, or `OPENINGS` without a chat template.
        teacher: another model that answers the same prompts, or ``"self"``: the student with its adapters disabled.
        max_new_tokens: what an answer may take.
        allow_latent: let the model be the float master weights of a latent checkpoint.
        show_progress: show a progress bar.

    Raises:
        ConfigError: `max_new_tokens` is out of range, or prompt and answer exceed the context.
        DataError: no prompts, an empty one, or the tokenizer is not the model's.
        StateError: as for `evaluate_divergence`.

    Example:
        >>> print(generate_gallery(model, tokenizer, teacher="self"))  # doctest: +SKIP
        0 of 8 answers collapsed | gallery/v1/prompts=8/chat=yes/max_new_tokens=64/tokens=... | student
    """
    check_at_least("max_new_tokens", max_new_tokens, 1, "Use max_new_tokens=64.")
    state = detect_state(model, allow_latent=allow_latent)
    teacher_state = None if teacher is None else check_teacher(model, teacher, state)
    has_template = bool(getattr(tokenizer, "chat_template", None))
    texts = (QUESTIONS if has_template else OPENINGS) if prompts is None else _checked(prompts)
    rows = [_encode(tokenizer, text, has_template) for text in texts]
    _check_rows(model, teacher, rows, max_new_tokens)
    others = [teacher] if isinstance(teacher, nn.Module) else []
    start = time.perf_counter()
    entries = []
    with borrowed(model, *others), tqdm(total=len(rows), desc="Gallery", disable=not show_progress) as bar:
        for text, ids in zip(texts, rows, strict=True):
            answer = _answer(model, tokenizer, ids, max_new_tokens)
            with speaking(teacher, model) if teacher is not None else nullcontext() as speaker:
                other = None if speaker is None else _answer(speaker, tokenizer, ids, max_new_tokens)
            entries.append(GalleryEntry(text, answer, other))
            bar.update()
    shape = f"prompts={len(rows)}/chat={'yes' if has_template else 'no'}/max_new_tokens={max_new_tokens}"
    digest = hashlib.sha256(repr(rows).encode()).hexdigest()[:12]
    protocol = f"gallery/v{GALLERY_VERSION}/{shape}/tokens={digest}"
    return Gallery(tuple(entries), protocol, state, teacher_state, time.perf_counter() - start)


def _answer(model: Any, tokenizer: Any, ids: list[int], max_new_tokens: int) -> Generation:
    base = model.get_base_model() if isinstance(model, PeftModel) else model  # its generate() writes into the config
    stop_ids, pad_id = stop_and_pad_ids(base, tokenizer)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=stop_ids or None,
        pad_token_id=pad_id,
        disable_compile=True,
    )
    row = torch.tensor([ids], device=base.get_input_embeddings().weight.device)
    with without_generation_defaults(base):
        output = base.generate(input_ids=row, attention_mask=torch.ones_like(row), generation_config=config)
    made, is_finished = cut_at_stop(output[0, len(ids) :].tolist(), stop_ids)
    text = tokenizer.decode(made, skip_special_tokens=True)
    return Generation(text, len(made), is_finished, detect_collapse(made, text, is_finished=is_finished))


def _encode(tokenizer: Any, text: str, has_template: bool) -> list[int]:
    if not has_template:
        return front_tokens(tokenizer) + tokenize(tokenizer, text, add_special_tokens=False)
    message = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return tokenize(tokenizer, rendered, add_special_tokens=False)


def _checked(prompts: Sequence[str]) -> tuple[str, ...]:
    if isinstance(prompts, str) or not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise DataError(f"`prompts` must be a list of texts, none of them empty: got {prompts!r}. Pass ['Say hello.'].")
    return tuple(prompts)


def _check_rows(model: nn.Module, teacher: nn.Module | str | None, rows: list[list[int]], max_new_tokens: int) -> None:
    """Refuse what a model cannot read, or what leaves no room for an answer."""
    empty = next((at for at, row in enumerate(rows) if not row), None)
    if empty is not None:
        raise DataError(f"every prompt must have a token: got none for prompt {empty}. Leave it out.")
    longest, largest = max(map(len, rows)), max(map(max, rows))
    for role, one in (("model", model), ("teacher", teacher)):
        context, vocab = limits(one) if isinstance(one, nn.Module) else (None, None)
        if context is not None and longest + max_new_tokens > context:
            raise ConfigError(
                f"`max_new_tokens` must leave room for the prompts in the context of the {role}: got max_new_tokens="
                f"{max_new_tokens} and a prompt of {longest} tokens, context={context}. Use shorter prompts, or "
                f"max_new_tokens={max(1, context - longest)}."
            )
        if vocab is not None and largest >= vocab:
            raise DataError(
                f"`tokenizer` must belong to the {role}: got token {largest}, but its vocabulary has {vocab} entries. "
                "Load both from the same place."
            )
