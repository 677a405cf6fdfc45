"""A minimal double of the parts of vLLM that the plug-in touches, written from its documented signatures.

Layers load as vLLM's do: each stored tensor by its parameter's `weight_loader`, with a shard id where layers are
fused. Rank and size of a split are plain attributes.
"""

from __future__ import annotations

import sys
from abc import ABC
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn

CONFIGS: dict[str, type] = {}


class QuantizationConfig(ABC):  # noqa: B024
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}


class QuantizeMethodBase(ABC):  # noqa: B024
    pass


class LinearMethodBase(QuantizeMethodBase):
    pass


class UnquantizedLinearMethod(LinearMethodBase):
    pass


class LinearBase(nn.Module):
    """One layer of one process: sizes of its share, and of the whole."""

    def __init__(self, width: int, own: list[int], full: list[int], *, full_width: int = 0, rank: int = 0) -> None:
        super().__init__()
        self.own, self.output_sizes, self.tp_rank = own, full, rank
        self.width, self.full_width = width, full_width or width
        self.tp_size = max(sum(full) // sum(own), self.full_width // width)
        self.output_size, self.params_dtype = sum(full), torch.float32

    def build(self, method: Any) -> Any:
        method.create_weights(
            layer=self,
            input_size_per_partition=self.width,
            output_partition_sizes=self.own,
            input_size=self.full_width,
            output_size=self.output_size,
            params_dtype=self.params_dtype,
            weight_loader=None,
        )
        self.quant_method = method
        return self


class QKVParallelLinear(LinearBase):
    """q, k and v, of which several processes may share k and v heads."""

    def __init__(self, width: int, head_size: int, heads: int, kv_heads: int, *, ranks: int = 1, rank: int = 0) -> None:
        own_kv = max(1, kv_heads // ranks)
        own = [heads // ranks * head_size, own_kv * head_size, own_kv * head_size]
        super().__init__(width, own, [size * ranks for size in own], rank=rank)
        self.tp_size, self.head_size, self.v_head_size = ranks, head_size, head_size
        self.total_num_heads, self.total_num_kv_heads = heads, kv_heads
        self.num_kv_head_replicas = max(1, ranks // kv_heads)


class ParallelLMHead(nn.Module):
    """The output head: rows padded to a multiple of 64, split by rows."""

    def __init__(self, vocab: int, width: int, *, ranks: int = 1, rank: int = 0) -> None:
        super().__init__()
        padded = -(-vocab // 64) * 64
        self.org_vocab_size, self.tp_rank, self.tp_size, self.params_dtype = vocab, rank, ranks, torch.float32
        start = min(rank * (padded // ranks), vocab)
        self.shard_indices = SimpleNamespace(org_vocab_start_index=start)
        self.width, self.rows, self.output_size = width, padded // ranks, padded

    def build(self, method: Any) -> Any:
        method.create_weights(self, self.width, [self.rows], self.width, self.output_size, params_dtype=torch.float32)
        self.quant_method = method
        return self


def register_quantization_config(name: str) -> Callable[[type], type]:
    def register(cls: type) -> type:
        CONFIGS[name] = cls
        return cls

    return register


@contextmanager
def installed() -> Iterator[ModuleType]:
    """Put the double in the place of vLLM, and give the plug-in's module that was written against it."""
    contents = {
        "vllm": {},
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.linear": {
            "LinearBase": LinearBase,
            "LinearMethodBase": LinearMethodBase,
            "UnquantizedLinearMethod": UnquantizedLinearMethod,
        },
        "vllm.model_executor.layers.quantization": {"register_quantization_config": register_quantization_config},
        "vllm.model_executor.layers.quantization.base_config": {
            "QuantizationConfig": QuantizationConfig,
            "QuantizeMethodBase": QuantizeMethodBase,
        },
        "vllm.model_executor.layers.vocab_parallel_embedding": {"ParallelLMHead": ParallelLMHead},
    }
    ours = "bitdistiller_peft.serving.vllm"
    before = {name: sys.modules.pop(name, None) for name in (*contents, ours)}
    for name, members in contents.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        sys.modules[name] = module
    try:
        from bitdistiller_peft.serving import register_vllm

        register_vllm()
        yield sys.modules[ours]
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
