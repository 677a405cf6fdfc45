"""Random tiny models of the architectures that tests go through, saved once per test run and loaded as users do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB = 96
# 172 is not a multiple of 64, 32 or 8; every other width is a multiple of 32
COMMON = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {**COMMON, "intermediate_size": 128, "num_key_value_heads": 2, "max_position_embeddings": 128}
GEMMA = {**DECODER, "head_dim": 16, "sliding_window": 32}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**DECODER, tie_word_embeddings=False),
    "llama-tied": lambda: LlamaConfig(**DECODER, tie_word_embeddings=True),
    "llama-172": lambda: LlamaConfig(**{**DECODER, "intermediate_size": 172}, tie_word_embeddings=False),
    "qwen2": lambda: Qwen2Config(**DECODER, tie_word_embeddings=False),
    "qwen3": lambda: Qwen3Config(**DECODER, head_dim=32, tie_word_embeddings=True),  # heads wider than the model
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
    ),
    "opt": lambda: OPTConfig(**COMMON, ffn_dim=128, max_position_embeddings=128, word_embed_proj_dim=64),
    "gemma2": lambda: Gemma2Config(**GEMMA),
    "gemma3": lambda: Gemma3TextConfig(**GEMMA),
    "mixtral": lambda: MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "qwen3-moe": lambda: Qwen3MoeConfig(
        **DECODER, head_dim=16, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2
    ),
}
DENSE = tuple(name for name in CONFIGS if name not in ("mixtral", "qwen3-moe"))
MOE = ("mixtral", "qwen3-moe")


def save_base(name: str, folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Save a random full-precision model of an architecture and return its folder."""
    target = folder / f"{name}-{str(dtype).removeprefix('torch.')}-{seed}"
    if not target.exists():
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(CONFIGS[name]())
            for key, parameter in model.named_parameters():
                if key.endswith("bias"):  # zero biases would hide that one is lost
                    torch.nn.init.normal_(parameter, std=0.02)
        model.to(dtype).save_pretrained(target)
    return target


def load(folder: Path | str, **kwargs: object) -> PreTrainedModel:
    """Load a model as a user does, ready for exact comparisons."""
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()


def token_ids(batch: int = 2, length: int = 9, seed: int = 0) -> torch.Tensor:
    """Random token ids ``[batch, length]``."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def config_of(folder: Path | str) -> PreTrainedConfig:
    """The config of a saved model."""
    return AutoConfig.from_pretrained(folder)
