"""Checkpoints as other tools write them, made number by number from the published layouts, with none of our packing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "model.safetensors"
SHAPES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (128, 64),
    "mlp.up_proj": (128, 64),
    "mlp.down_proj": (64, 128),
}
LAYERS = {f"model.layers.{block}.{name}": shape for block in range(2) for name, shape in SHAPES.items()}
DOWN = "model.layers.1.mlp.down_proj"

Tensors = dict[str, Tensor]


class Integers(NamedTuple):
    """A matrix as integers: codes ``[out, in]``, scale and zero point ``[out, groups]``."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def dense(self) -> Tensor:
        """Weight by weight, ``scale * (code - zero_point)`` in fp32."""
        group = torch.arange(self.codes.shape[1]) // (self.codes.shape[1] // self.scale.shape[1])
        return self.scale.float()[:, group] * (self.codes - self.zero_point[:, group]).float()


def draw(shape: tuple[int, int], bits: int, generator: torch.Generator, *, zero: int | None = None) -> Integers:
    """Random codes in groups of 32, fp16 scales up to 0.01, zero points from 1 (or all alike)."""
    groups = (shape[0], shape[1] // 32)
    codes = torch.randint(0, 1 << bits, shape, generator=generator)
    scale = (torch.rand(groups, generator=generator) * 0.009 + 0.001).half()
    zeros = torch.randint(1, 1 << bits, groups, generator=generator)
    return Integers(codes, scale, zeros if zero is None else torch.full(groups, zero))


def as_words(codes: list[int], bits: int) -> list[int]:
    """One long number, code i at bit ``i * bits``, cut into signed 32-bit words."""
    number = sum(code << (bits * i) for i, code in enumerate(codes))
    words = [(number >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(codes) * bits // 32))]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def packed_columns(values: Tensor, bits: int) -> Tensor:
    """Pack each column of ``[n, columns]``: int32 ``[words, columns]``."""
    return torch.tensor([as_words(column, bits) for column in values.T.tolist()], dtype=torch.int32).T


def gptq(weight: Integers, bits: int, version: int = 1) -> Tensors:
    """AutoGPTQ's four tensors; version 1 stores zero points minus one."""
    stored = weight.zero_point - int(version == 1)
    width = weight.codes.shape[1] // weight.scale.shape[1]
    return {
        "qweight": packed_columns(weight.codes.T, bits),
        "qzeros": packed_columns(stored, bits).T,
        "scales": weight.scale.T,
        "g_idx": torch.tensor([i // width for i in range(weight.codes.shape[1])], dtype=torch.int32),
    }


def awq(weight: Integers) -> Tensors:
    """AutoAWQ's three tensors: nibble k of a word holds output channel 0 2 4 6 1 3 5 7 [k] of eight."""

    def pack(values: Tensor) -> Tensor:
        rows = [
            [as_words([row[start + k] for k in (0, 2, 4, 6, 1, 3, 5, 7)], 4)[0] for start in range(0, len(row), 8)]
            for row in values.tolist()
        ]
        return torch.tensor(rows, dtype=torch.int32)

    return {"qweight": pack(weight.codes.T), "qzeros": pack(weight.zero_point.T), "scales": weight.scale.T}


def write_folder(base: Path, target: Path, section: dict[str, Any], layer_tensors: Callable[[str], Tensors]) -> Path:
    """A copy of a full-precision tiny Llama whose linear layers hold other tensors."""
    shutil.copytree(base, target)
    tensors = load_file(target / WEIGHTS)
    for layer in LAYERS:
        del tensors[f"{layer}.weight"]
        tensors |= {f"{layer}.{name}": tensor for name, tensor in layer_tensors(layer).items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / WEIGHTS)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    return target


def gptq_folder(base: Path, target: Path, weights: dict[str, Integers], bits: int, **section: Any) -> Path:
    """A GPTQ checkpoint of given integers."""
    version = 2 if section.get("checkpoint_format") == "gptq_v2" else 1
    section = {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": False, **section}
    return write_folder(base, target, section, lambda layer: gptq(weights[layer], bits, version))


def edit(folder: Path, changes: dict[str, Tensor | None], **section: Any) -> Path:
    """Replace tensors (or drop them), and entries of the quantization config."""
    tensors: dict[str, Any] = load_file(folder / WEIGHTS)
    kept = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
    save_file({name: tensor.contiguous() for name, tensor in kept.items()}, folder / WEIGHTS)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= section
    (folder / "config.json").write_text(json.dumps(config))
    return folder
