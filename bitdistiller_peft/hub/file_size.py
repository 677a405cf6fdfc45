"""How large the weights of a packed model will be on disk, before anything is packed: to the byte."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import nn

from bitdistiller_peft.errors import TargetError
from bitdistiller_peft.hub.modules import is_experts, weight_shape
from bitdistiller_peft.layers import INPUT_NORM, ROWS, packed_layout
from bitdistiller_peft.quantizers import QuantSpec

_NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64",
}  # fmt: skip
_ORDER = {dtype: place for place, dtype in enumerate(_NAMES)}  # safetensors writes the last of these first


def packed_file_bytes(model: nn.Module, specs: Mapping[str, QuantSpec], norms: Collection[str] = ()) -> int:
    """The size of `model.safetensors`, as `save_pretrained` writes it in one file, header included.

    Args:
        model: the full-precision model, on any device, also on meta.
        specs: of the layers to be quantized, by module name.
        norms: those of them that get a `SubLN`.

    Returns:
        Bytes.

    Raises:
        TargetError: a module holds fused experts.
    """
    check_no_experts({name: model.get_submodule(name) for name in specs})
    tensors = dict(_tensors(model, specs, norms))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (shape, dtype) in sorted(tensors.items(), key=lambda item: (-_ORDER[item[1][1]], item[0])):
        end = start + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-text // 8) * 8 + start


def check_no_experts(modules: Mapping[str, nn.Module]) -> None:
    """Refuse fused experts, which transformers saves one by one, under other names.

    Raises:
        TargetError: there are some; the module is named.
    """
    for name, module in modules.items():
        if is_experts(module):
            raise TargetError(
                f"the size of a file with fused experts is not known beforehand: got {name!r}. Leave experts out with "
                "exclude_modules."
            )


def _tensors(
    model: nn.Module, specs: Mapping[str, QuantSpec], norms: Collection[str]
) -> Iterator[tuple[str, tuple[tuple[int, ...], torch.dtype]]]:
    for module_name, spec in specs.items():
        shape = weight_shape(model.get_submodule(module_name))
        for suffix, entry in packed_layout(spec, shape).items():
            yield f"{module_name}.weight{suffix}", entry
        if isinstance(table := model.get_submodule(module_name), nn.Embedding):
            yield f"{module_name}.{ROWS}", ((0,), table.weight.dtype)
        if module_name in norms:
            yield f"{module_name}.{INPUT_NORM}.weight", (shape[-1:], torch.float32)
    tied: set[str] = set(getattr(model, "all_tied_weights_keys", None) or {})
    for name, tensor in model.state_dict().items():
        if name not in tied and name.removesuffix(".weight") not in specs:
            yield name, (tuple(tensor.shape), tensor.dtype)
