"""A toy language model for `bitdistiller demo`: trained in a minute on the help topics that every Python carries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

CONTEXT = 128
VOCABULARY = 512
_BATCH = 8
_LEARNING_RATE = 3e-3
_END = "<|end|>"


def make_toy(folder: Path, texts: Sequence[str], *, steps: int, seed: int) -> int:
    """Train a small Llama from nothing and save it with a tokenizer of its own, last of all.

    Args:
        folder: where to; one that holds a tokenizer is left as it is.
        texts: to learn from.
        steps: of training.
        seed: of weights and batches.

    Returns:
        Number of weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if (folder / "tokenizer.json").is_file():
        return sum(weight.numel() for weight in AutoModelForCausalLM.from_pretrained(folder).parameters())
    tokenizer = _tokenizer(texts)
    torch.manual_seed(seed)
    model = _model()
    tokens = torch.tensor(tokenizer(_END.join(texts))["input_ids"])
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * min(1.0, (step + 1) / 10, 2 * (steps - step) / steps)
        starts = torch.randint(len(tokens) - CONTEXT, (_BATCH,), generator=generator).tolist()
        batch = torch.stack([tokens[start : start + CONTEXT] for start in starts])
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(weight.numel() for weight in model.parameters())


def _model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=2 * CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def _tokenizer(texts: Sequence[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[_END], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=_END, eos_token=_END, pad_token=_END)
