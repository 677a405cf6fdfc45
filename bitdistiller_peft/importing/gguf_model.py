"""What a GGUF file says about its model, in transformers' terms: config, names, and the order of rows."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitdistiller_peft.errors import CheckpointError, ForeignModelError
from bitdistiller_peft.importing.gguf_file import GgufFile

# llama.cpp's architecture -> transformers' model type
_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}
_BLOCK = re.compile(r"(?:blk\.(\d{1,5})\.)?(\w+)\.(weight|bias)")
MOST = 1 << 32


def model_config(file: GgufFile) -> dict[str, Any]:
    """The config of the model, as config.json would hold it.

    Raises:
        ForeignModelError: an architecture, or a kind of rotary embedding, that is not known here.
        CheckpointError: a number is missing or impossible.
    """
    arch = file.values.get("general.architecture")
    if arch not in _TYPES:
        raise ForeignModelError(
            f"the architecture of the file must be one of {sorted(_TYPES)}: got {str(arch)[:40]!r}. Start from the "
            "model in another format."
        )
    scaling = file.values.get(f"{arch}.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in file.tensors:
        raise ForeignModelError(
            f"the rotary embedding must be plain: got scaling {str(scaling)[:40]!r}, or frequencies of its own. Start "
            "from the model in another format."
        )
    found = {ours: _whole(file, f"{arch}.{theirs}") for ours, theirs in _SIZES.items()}
    heads = found["num_attention_heads"]
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError("the file must hold the matrix 'token_embd.weight': it does not. Download it again.")
    ids = {f"{kind}_token_id": file.values.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos")}
    config = {
        "model_type": _TYPES[str(arch)],
        **found,
        "num_key_value_heads": _whole(file, f"{arch}.attention.head_count_kv", heads),
        "head_dim": _whole(file, f"{arch}.attention.key_length", found["hidden_size"] // heads),
        "vocab_size": embedding.shape[0],
        "rms_norm_eps": _real(file, f"{arch}.attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_type": "default", "rope_theta": _real(file, f"{arch}.rope.freq_base", 10000.0)},
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "dtype": "float32",  # which holds all that is dequantized exactly
        **{key: value for key, value in ids.items() if type(value) is int and 0 <= value < embedding.shape[0]},
    }
    if arch == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    return config


def transformers_names(file: GgufFile) -> dict[str, str]:
    """llama.cpp's name of every tensor, by transformers' name.

    Raises:
        ForeignModelError: a tensor that the architecture does not have.
    """
    names = {}
    for theirs in file.tensors:
        match = _BLOCK.fullmatch(theirs)
        if match is None or match[2] not in _NAMES:
            raise ForeignModelError(
                f"every tensor must be one of a dense decoder: got {theirs[:80]!r}. Start from the model in another "
                "format."
            )
        block, kind, end = match.groups()
        names[f"{'' if block is None else f'model.layers.{int(block)}.'}{_NAMES[kind]}.{end}"] = theirs
    return names


def row_order(file: GgufFile) -> Callable[[str, Tensor], Tensor]:
    """Undo llama.cpp's order of the rows of q and k, by layer: it rotates neighbours, transformers rotates halves."""
    if file.values["general.architecture"] != "llama":
        return lambda layer, tensor: tensor
    heads = _whole(file, "llama.attention.head_count")
    counts = {"q_proj": heads, "k_proj": _whole(file, "llama.attention.head_count_kv", heads)}

    def order(layer: str, tensor: Tensor) -> Tensor:
        count = counts.get(layer.rpartition(".")[2])
        if count is None:
            return tensor
        if len(tensor) % (2 * count):
            raise CheckpointError(f"layer {layer!r} must have rows for {count} heads: got {len(tensor)} rows.")
        rows = torch.arange(len(tensor)).reshape(count, -1)
        return tensor[torch.cat((rows[:, 0::2], rows[:, 1::2]), dim=1).flatten()]

    return order


def _whole(file: GgufFile, key: str, default: int | None = None) -> int:
    value = file.values.get(key, default)
    if type(value) is not int or not 1 <= value <= MOST:
        raise CheckpointError(f"{key!r} must be a whole number from 1: got {str(value)[:40]!r}. Download it again.")
    return value


def _real(file: GgufFile, key: str, default: float | None = None) -> float:
    value = file.values.get(key, default)
    if type(value) is not float or not 0 < value < MOST:
        raise CheckpointError(f"{key!r} must be a positive number: got {str(value)[:40]!r}. Download the file again.")
    return float(str(np.float32(value)))  # 1e-05, not the nearest fp32 number to it
