"""What the entry points in pyproject.toml name; light, since engines call it in every process that they start."""

from __future__ import annotations


def register_vllm() -> None:
    """Teach vLLM the quantization method ``"bitdistiller"`` (entry point ``vllm.general_plugins``). Safe to repeat."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from bitdistiller_peft.serving.vllm import BitDistillerVllmConfig

    register_quantization_config("bitdistiller")(BitDistillerVllmConfig)
