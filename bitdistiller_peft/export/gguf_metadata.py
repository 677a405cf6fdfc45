"""What stands in a GGUF file beside the weights: the architecture, its numbers, and the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from bitdistiller_peft._version import library_version
from bitdistiller_peft.errors import CheckpointError
from bitdistiller_peft.export.source import PackedSource
from bitdistiller_peft.jsonfile import Kinds, check_entries, read_object

# transformers class -> llama.cpp's architecture
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_NUMBERS: Mapping[str, Kinds] = {
    **dict.fromkeys(("num_attention_heads", "hidden_size", "num_hidden_layers", "intermediate_size"), int),
    **dict.fromkeys(("max_position_embeddings", "vocab_size"), int),
    **dict.fromkeys(("num_key_value_heads?", "head_dim?"), (int, NoneType)),
    "rms_norm_eps": float,
    "rope_theta?": (float, NoneType),
}
_TOKENIZER: Mapping[str, Kinds] = {
    "model.type": str,
    "model.vocab": dict,
    "added_tokens?": list,
    "pre_tokenizer?": (dict, NoneType),
}
_ADDED: Mapping[str, Kinds] = {"id": int, "content": str, "special": bool}
_REPAIR = "Save the tokenizer again, or take its files out of the folder; the GGUF then takes token ids."
GPT2_REGEX = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# how text is cut before byte-pair merging -> llama.cpp's name for it
_SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+": "qwen2",
}


def refuse_architecture(source: PackedSource) -> str | None:
    """The reason why llama.cpp's graph of a model is not known here, or `None`."""
    config = source.config
    if source.architecture not in ARCHITECTURES:
        return f"architecture {source.architecture!r} is not among {sorted(ARCHITECTURES)}"
    source.check_config(_NUMBERS)
    if config.get("hidden_act", "silu") != "silu":
        return f"hidden_act={config['hidden_act']!r} is not 'silu'"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", "default") != "default":
        return f"rope_type={rope['rope_type']!r} is not 'default'"
    if config.get("use_sliding_window", source.architecture == "MistralForCausalLM") and config.get("sliding_window"):
        return f"sliding_window={config['sliding_window']!r} is not None"
    return None


def head_counts(config: dict[str, Any]) -> tuple[int, int]:
    """Numbers of query heads and of key-value heads."""
    heads = int(config["num_attention_heads"])
    return heads, int(config.get("num_key_value_heads") or heads)


def add_architecture(writer: Any, source: PackedSource) -> None:
    """Write the numbers that llama.cpp builds the graph from."""
    config = source.config
    heads, kv_heads = head_counts(config)
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    rope = config.get("rope_parameters") or {}
    base = str(source.quant_config.provenance.get("base_model") or "").rstrip("/").rpartition("/")[2]
    writer.add_name(base or source.architecture)
    writer.add_quantized_by(f"bitdistiller_peft {library_version()}")
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_vocab_size(int(config["vocab_size"]))


def refuse_tokenizer(folder: Path, asked: str | None) -> str | None:
    """The reason why a tokenizer cannot be carried over, or `None`; no tokenizer at all is fine."""
    if not (folder / "tokenizer.json").is_file():
        return None
    content = _read(folder / "tokenizer.json")
    if content["model"]["type"] != "BPE" or content["model"].get("byte_fallback"):
        return (
            "its tokenizer is not a byte-level BPE. Copy the packed model to a folder without tokenizer files; the "
            "GGUF then takes token ids"
        )
    if asked is None and split_name(content) is None:
        return (
            "llama.cpp's name for how its tokenizer cuts text is not known here. Pass it as pre_tokenizer='...'; it "
            "is what llama.cpp's converter calls tokenizer.ggml.pre"
        )
    return None


def split_name(content: dict[str, Any]) -> str | None:
    """llama.cpp's name for how a tokenizer.json cuts text, or `None`."""
    outer = content.get("pre_tokenizer") or {}
    steps = outer.get("pretokenizers", [outer])
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        return None
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex"):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        pattern = steps[0].get("pattern")
        return _SPLITS.get(str(pattern.get("Regex"))) if isinstance(pattern, dict) else None
    return None


def add_tokenizer(writer: Any, folder: Path, vocab_size: int, asked: str | None) -> None:
    """Write tokens, merges, special tokens and chat template; without a tokenizer, say that there is none."""
    import gguf

    path = folder / "tokenizer.json"
    if not path.is_file():
        writer.add_tokenizer_model("none")
        return
    content = _read(path)
    tokens = {index: text for text, index in content["model"]["vocab"].items()}
    added = {entry["id"]: entry for entry in content.get("added_tokens", [])}
    if outside := [index for index in added if not 0 <= index < vocab_size]:
        raise CheckpointError(f"{path} must number its tokens within {vocab_size}: got {outside[0]}. {_REPAIR}")
    tokens |= {index: entry["content"] for index, entry in added.items()}
    kinds = [gguf.TokenType.NORMAL if index in tokens else gguf.TokenType.UNUSED for index in range(vocab_size)]
    for index, entry in added.items():
        kinds[index] = gguf.TokenType.CONTROL if entry["special"] else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(asked or split_name(content))
    writer.add_token_list([tokens.get(index, f"[PAD{index}]") for index in range(vocab_size)])
    writer.add_token_types(kinds)
    template = folder / "chat_template.jinja"
    try:
        special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=vocab_size)
        if special.chat_template is None and template.is_file():
            special.chat_template = template.read_text(encoding="utf-8")
        special.add_to_gguf(writer, quiet=True)
    except Exception as error:  # whatever a damaged file leads the package to
        reason = f"{type(error).__name__}: {str(error)[:300]}"
        raise CheckpointError(f"the tokenizer files in {folder} must be readable: {reason}. {_REPAIR}") from error


def _read(path: Path) -> dict[str, Any]:
    content = read_object(path, _REPAIR)
    check_entries(content, _TOKENIZER, path, _REPAIR)
    for entry in content.get("added_tokens", ()):
        check_entries(entry, _ADDED, path, _REPAIR)
    if any(type(index) is not int for index in content["model"]["vocab"].values()):
        raise CheckpointError(f"{path} must hold a whole number for every token: it does not. {_REPAIR}")
    return content
