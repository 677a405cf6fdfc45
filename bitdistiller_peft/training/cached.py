"""A teacher that spoke before: its answers come from a cache, and nothing of it but a head is in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn

from bitdistiller_peft.errors import ConfigError, DataError
from bitdistiller_peft.losses import Head, Objective, SparseTeacher
from bitdistiller_peft.losses.sparse import check_computable
from bitdistiller_peft.training.cache_store import TeacherCache
from bitdistiller_peft.training.documents import digest_of, iter_documents, spans_of
from bitdistiller_peft.training.fingerprints import fingerprint_template, fingerprint_tokenizer, fingerprint_weights
from bitdistiller_peft.training.forward import HiddenStates, SparseStates, base_model_of
from bitdistiller_peft.training.heads import output_head
from bitdistiller_peft.training.teachers import Teacher
from bitdistiller_peft.tuner import BitDistillerLayer, full_precision

_REBUILD = "Call cache_teacher() again, with an output_dir of its own."


class CachedTeacher(Teacher):
    """Answers from a `TeacherCache`, by the tokens of each document in a batch.

    Args:
        cache: complete.
        student: the model to be trained; where its own frozen head is the teacher's, that one is used.
        objective: what to minimize.

    Raises:
        ConfigError: the cache has another vocabulary, is of other weights, or does not suffice for the objective.
    """

    def __init__(self, cache: TeacherCache, student: nn.Module, objective: Objective) -> None:
        self.cache = cache
        if cache.layout.kind == "topk":
            check_computable(objective)
        with full_precision(student):
            own = output_head(base_model_of(student))
        if len(own.weight) != cache.layout.vocab:
            raise ConfigError(
                f"`teacher_cache` must have the student's vocabulary: got {cache.layout.vocab} tokens in "
                f"{cache.folder} and {len(own.weight)} in the student."
            )
        _check_weights(cache, student)
        self._head = _shared(own, cache.head) if cache.layout.kind == "hidden" else None

    @property
    def description(self) -> str:
        """Whose answers they are, and of what kind."""
        return f"{self.cache.manifest['teacher']['name']} (cached, {self.cache.layout.kind})"

    def __call__(self, inputs: Mapping[str, Any]) -> HiddenStates | SparseStates:
        """Look a batch up.

        Raises:
            DataError: a document is not in the cache.
            ChecksumError: its file is damaged.
        """
        ids: Tensor = inputs["input_ids"]
        found = {
            name: torch.zeros(*ids.shape, *shape[1:], dtype=dtype)
            for name, (dtype, shape) in self.cache.layout.tensors(0).items()
        }
        for span in spans_of(inputs):
            if span.digest not in self.cache:
                raise _unknown(self.cache, ids[span.row, span.columns].tolist(), "a batch")
            for name, values in self.cache.read(span.digest).items():
                found[name][span.row, span.columns] = values
        found = {name: values.to(ids.device, non_blocking=True) for name, values in found.items()}
        if self._head is None:
            return SparseStates(SparseTeacher(**found))
        self._head = _moved(self._head, ids.device)
        return HiddenStates(found["hidden"], self._head, layer=None if self.hidden_layer is None else found["hidden"])

    def check(self, tokenizer: Any, **datasets: Any) -> None:
        """Refuse, before the first step, what the cache was not made for.

        Args:
            tokenizer: of the trainer; where the cache was made without, any will do.
            datasets: prepared, by name, or several by name each; streams are not looked at.

        Raises:
            ConfigError: another tokenizer or template.
            DataError: a document is missing.
        """
        self._check_tokenizer(tokenizer)
        for name, dataset in datasets.items():
            self._check_data(dataset, name)

    def _check_data(self, dataset: Any, name: str) -> None:
        if isinstance(dataset, Mapping):
            for key, part in dataset.items():
                self._check_data(part, f"{name}[{key!r}]")
        elif isinstance(dataset, Sized) and "input_ids" in (getattr(dataset, "column_names", None) or []):
            for document in iter_documents(dataset):
                if len(document) > 1 and digest_of(document) not in self.cache:
                    raise _unknown(self.cache, document.tolist(), f"`{name}`")

    def _check_tokenizer(self, tokenizer: Any) -> None:
        was = self.cache.manifest
        if tokenizer is None or was["tokenizer"] is None:
            return
        now = {"tokenizer": fingerprint_tokenizer(tokenizer), "template": fingerprint_template(tokenizer)}
        for key, value in now.items():
            if value != was[key]:
                raise ConfigError(
                    f"`teacher_cache` must be made with the same {key}: got {was[key]} in {self.cache.folder}, and "
                    f"{value} now. {_REBUILD}"
                )


def _check_weights(cache: TeacherCache, student: nn.Module) -> None:
    if not any(isinstance(module, BitDistillerLayer) for module in student.modules()):
        return  # trained in place: its weights are no longer those of any teacher
    teacher = cache.manifest["teacher"]
    base = base_model_of(student)
    name = str(getattr(base.config, "_name_or_path", ""))
    if not teacher["is_self"] and teacher["name"] != name:
        return  # another model than the student's own
    found = fingerprint_weights(base)
    if found != teacher["fingerprint"]:
        raise ConfigError(
            f"`teacher_cache` must be of the student's base weights: {cache.folder} has answers of {teacher['name']} "
            f"({teacher['fingerprint'][:12]}), and the base is {name or 'a model'} ({found[:12]}). Load it in the "
            f"dtype that it was cached in. Or: {_REBUILD}"
        )


def _shared(own: Head, kept: Head) -> Head:
    """The student's frozen head if it is the teacher's, which saves a copy; else the one that was kept."""
    plain = not own.weight.requires_grad and own.bias is None
    same = plain and kept.bias is None and own.weight.dtype == kept.weight.dtype
    is_equal = same and torch.equal(own.weight.cpu(), kept.weight)
    return Head(own.weight.detach(), None, kept.logit_scale, kept.logit_softcap) if is_equal else kept


def _moved(head: Head, device: torch.device) -> Head:
    if head.weight.device == device:
        return head
    bias = None if head.bias is None else head.bias.to(device)
    return Head(head.weight.to(device), bias, head.logit_scale, head.logit_softcap)


def _unknown(cache: TeacherCache, tokens: list[int], where: str) -> DataError:
    cache.verify("fast")  # perhaps it is the cache that is damaged, not the data that differ
    return DataError(
        f"every document must be in the teacher cache: {where} holds one of {len(tokens)} tokens, beginning "
        f"{tokens[:8]}, that {cache.folder} lacks. Prepare the data as when it was cached (tokenizer, template, "
        "max_length), or cache trainer.train_dataset and trainer.eval_dataset again."
    )
