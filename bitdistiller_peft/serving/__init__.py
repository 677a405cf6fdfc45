"""Our own packed format in other people's engines, by their plug-in interfaces: so far vLLM.

Importing this package imports no engine; `register_vllm` is what vLLM calls when it starts.
"""

from bitdistiller_peft.serving.plugin import register_vllm

__all__ = ["register_vllm"]
