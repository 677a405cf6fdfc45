"""`cache_teacher`: let a teacher speak once, and keep what it said."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from bitdistiller_peft.errors import ConfigError, DataError, StateError, TrainingError
from bitdistiller_peft.hub.atomic import write_tensors
from bitdistiller_peft.layers import iter_quantized
from bitdistiller_peft.losses import Head
from bitdistiller_peft.losses.projection import project
from bitdistiller_peft.training.cache_estimate import CacheEstimate, check_room, estimate
from bitdistiller_peft.training.cache_store import (
    HEAD_NAME,
    CacheLayout,
    TeacherCache,
    begin,
    finish,
    shard_path,
)
from bitdistiller_peft.training.documents import Document, digest_of, fingerprint_documents, iter_documents
from bitdistiller_peft.training.fingerprints import fingerprint_template, fingerprint_tokenizer, fingerprint_weights
from bitdistiller_peft.training.forward import base_model_of, hidden_states
from bitdistiller_peft.training.heads import output_head
from bitdistiller_peft.tuner import BitDistillerLayer, full_precision

_LOGITS_AT_ONCE = 1 << 24


def cache_teacher(
    model: PreTrainedModel | PeftModel,
    tokenizer: Any,
    dataset: Any,
    output_dir: str | os.PathLike[str],
    *,
    kind: str = "hidden",
    k: int = 64,
    dtype: str | None = None,
    batch_size: int = 8,
    shard_bytes: int = 1 << 28,
    show_progress: bool = True,
    tell: Callable[[CacheEstimate], object] | None = None,
) -> TeacherCache:
    """Ask a teacher once about every document, and write the answers to disk.

    Training with ``DistillConfig(teacher="cached", teacher_cache=output_dir)`` then needs no teacher in memory, and may
    shuffle, pack, pad and split the same documents as it likes: an answer is found by the document's tokens.

    The size is logged before the first batch. After a kill or Ctrl-C the same call goes on with the first shard that is
    missing; a call with another model, data or settings is refused. A complete cache is returned as it is.

    Args:
        model: the teacher on its device; of a student of ours, the base model with its adapters off.
        tokenizer: what made the tokens, so that training can refuse another one; None leaves that unchecked.
        dataset: tokenized documents, ``trainer.train_dataset``, or a list of such, e.g. with the evaluation data.
        output_dir: a folder of its own.
        kind: ``"hidden"`` keeps last hidden states, and the head once: whole distributions, of any temperature, for
            any loss. ``"topk"`` keeps the k largest log-probabilities, the label's among them, and the rest as one sum;
            smaller for wide models, and a lower bound of the divergences.
        k: for ``"topk"``, tokens per position; from 2 to the vocabulary.
        dtype: ``"float16"``, ``"bfloat16"`` (hidden states only) or ``"float32"``. By default bf16 for hidden states of
            a teacher that computes in it, which loses nothing, and else fp16.
        batch_size: documents per forward pass.
        shard_bytes: size of a file, and what a kill may cost.
        show_progress: show a progress bar.
        tell: is told the size before the first batch, in place of the log.

    Raises:
        ConfigError: a setting that cannot work, a folder that holds something else, or hidden states that overflow.
        DoesNotFitError: too little space on the disk.
        DataError: data without tokens, or a stream.
        StateError: the model is quantized.

    Example:
        >>> cache_teacher(trainer.model, tokenizer, trainer.train_dataset, "cache")  # doctest: +SKIP
    """
    for name, value in (("batch_size", batch_size), ("shard_bytes", shard_bytes)):
        if value < 1:
            raise ConfigError(f"`{name}` must be positive: got {name}={value!r}. Leave it out for the default.")
    base = _teacher_base(model)
    with full_precision(model):
        head = output_head(base)
        width = k if kind == "topk" else head.weight.shape[1]
        layout = CacheLayout(kind, dtype or _dtype_for(kind, base.dtype), width, len(head.weight))
        documents = _unique(dataset if isinstance(dataset, (list, tuple)) else [dataset])
        plan = _plan(documents, layout, shard_bytes)
        folder = Path(output_dir)
        about = _of_teacher(model) | _of_tokenizer(tokenizer) | _of_head(head) | {"num_shards": len(plan)}
        begin(folder, about | {"layout": dataclasses.asdict(layout), "data": fingerprint_documents(documents)})
        check_room(folder, estimate(documents, layout, head), tell)
        if kind == "hidden" and not (folder / HEAD_NAME).exists():
            bias = {} if head.bias is None else {"bias": head.bias.cpu()}
            write_tensors(folder / HEAD_NAME, {"weight": head.weight.cpu(), **bias})
        with tqdm(total=len(documents), desc="Teacher cache", unit="doc", disable=not show_progress) as bar:
            for index, digests in enumerate(plan):
                if shard_path(folder, index).exists():
                    bar.update(len(digests))
                    continue
                answers = _ask(base, head, layout, [documents[digest] for digest in digests], batch_size, bar)
                write_tensors(shard_path(folder, index), answers | _index(digests, documents))
    finish(folder)
    return TeacherCache(folder)


def _teacher_base(model: nn.Module) -> PreTrainedModel:
    layers = [module for module in model.modules() if isinstance(module, BitDistillerLayer)]
    if any(layer.merged for layer in layers):
        raise StateError("the adapter must not be merged: call unmerge_adapter() first.")
    if not layers and next(iter_quantized(model), None) is not None:
        raise StateError("the teacher must be in full precision: got a packed or latent model. Load the original.")
    return base_model_of(model)


def _dtype_for(kind: str, computed: torch.dtype) -> str:
    """The smallest dtype that keeps what was computed: fp16 has eight times the resolution of bf16."""
    return "bfloat16" if kind == "hidden" and computed == torch.bfloat16 else "float16"


def _unique(datasets: Sequence[Any]) -> dict[bytes, Document]:
    """All documents by digest, in order; those of one token predict nothing."""
    documents: dict[bytes, Document] = {}
    for dataset in datasets:
        documents |= {digest_of(document): document for document in iter_documents(dataset) if len(document) > 1}
    if not documents:
        raise DataError("`dataset` must hold documents of at least two tokens: got none.")
    return documents


def _plan(documents: Mapping[bytes, Document], layout: CacheLayout, shard_bytes: int) -> list[list[bytes]]:
    """Which documents go into which shard, in the order in which they are computed: neighbours of like length."""
    shards: list[list[bytes]] = []
    room = 0
    for digest, document in documents.items():
        if room <= 0:
            shards.append([])
            room = shard_bytes
        shards[-1].append(digest)
        room -= len(document) * layout.bytes_per_token
    return [sorted(shard, key=lambda digest: (len(documents[digest]), digest)) for shard in shards]


def _index(digests: Sequence[bytes], documents: Mapping[bytes, Document]) -> dict[str, Tensor]:
    names = np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(len(digests), -1)
    ends = np.cumsum([0, *(len(documents[digest]) for digest in digests)])
    return {"digests": torch.from_numpy(names.copy()), "offsets": torch.from_numpy(ends)}


def _ask(
    base: PreTrainedModel,
    head: Head,
    layout: CacheLayout,
    documents: Sequence[Document],
    batch_size: int,
    bar: tqdm[Any],
) -> dict[str, Tensor]:
    """What the teacher says of some documents, one after the other: `[all tokens, ...]` by name."""
    parts: list[dict[str, Tensor]] = []
    for first in range(0, len(documents), batch_size):
        batch = [torch.from_numpy(document.astype(np.int64)) for document in documents[first : first + batch_size]]
        ids = nn.utils.rnn.pad_sequence(batch, batch_first=True).to(base.device)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in batch], batch_first=True).to(base.device)
        hidden, _ = hidden_states(base, None, input_ids=ids, attention_mask=mask)
        for row, tokens in enumerate(batch):
            states = hidden[row, : len(tokens)].to(head.weight.device)
            if not bool(torch.isfinite(states).all()):
                raise TrainingError("the teacher's hidden states must be finite: got NaN or Inf. Use another dtype.")
            parts.append(_kept(states, head, layout, tokens.to(states.device)))
        bar.update(len(batch))
    return {name: torch.cat([part[name] for part in parts]) for name in layout.tensors(0)}


def _kept(states: Tensor, head: Head, layout: CacheLayout, tokens: Tensor) -> dict[str, Tensor]:
    if layout.kind == "hidden":
        kept = states.to(layout.torch_dtype)
        if not bool(torch.isfinite(kept).all()):
            raise ConfigError(f"`dtype` must hold the hidden states: {layout.dtype} overflows. Use dtype='bfloat16'.")
        return {"hidden": kept.cpu()}
    nexts = torch.cat([tokens[1:], tokens.new_full((1,), -1)])  # what follows the last token is not known
    step = max(1, _LOGITS_AT_ONCE // layout.vocab)
    tiles = [_top(states[i : i + step], head, layout, nexts[i : i + step]) for i in range(0, len(tokens), step)]
    return {name: torch.cat([tile[name] for tile in tiles]) for name in tiles[0]}


def _top(states: Tensor, head: Head, layout: CacheLayout, labels: Tensor) -> dict[str, Tensor]:
    """The likeliest tokens, the label in the last place where it is not among them, and the rest as one."""
    log_probs = project(states, head, torch.float32).log_softmax(-1)
    tokens = log_probs.topk(layout.width).indices
    is_missing = (labels >= 0) & ~(tokens == labels.unsqueeze(-1)).any(-1)
    tokens[is_missing, -1] = labels[is_missing]
    tail = log_probs.scatter(-1, tokens, -torch.inf).logsumexp(-1)
    known = log_probs.gather(-1, tokens).to(layout.torch_dtype)
    return {"tokens": tokens.int().cpu(), "log_probs": known.cpu(), "log_tail": tail.cpu()}


def _of_teacher(model: nn.Module) -> dict[str, Any]:
    base = base_model_of(model)
    name = str(getattr(base.config, "_name_or_path", "") or type(base).__name__)
    is_self = any(isinstance(module, BitDistillerLayer) for module in model.modules())
    return {"teacher": {"name": name, "fingerprint": fingerprint_weights(base), "is_self": is_self}}


def _of_tokenizer(tokenizer: Any) -> dict[str, Any]:
    if tokenizer is None:
        return {"tokenizer": None, "template": None}
    return {"tokenizer": fingerprint_tokenizer(tokenizer), "template": fingerprint_template(tokenizer)}


def _of_head(head: Head) -> dict[str, Any]:
    return {"head": {"logit_scale": head.logit_scale, "logit_softcap": head.logit_softcap}}
