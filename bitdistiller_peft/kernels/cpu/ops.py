"""The CPU kernels behind the operators.

Few tokens are multiplied with the stream. For more, the weight is made dense panel by panel, small enough to stay in
the cache, and torch multiplies: its matrix product is the better one there.
"""

from __future__ import annotations

from ctypes import byref
from typing import Any

import torch
from torch import Tensor

from bitdistiller_peft.errors import StateError
from bitdistiller_peft.kernels.cpu.library import ISAS, isa, load
from bitdistiller_peft.kernels.cpu.weights import STREAMS, describe, units_per_group
from bitdistiller_peft.kernels.layout import SCALE_TYPES, Layout, Weight
from bitdistiller_peft.kernels.operators import LIBRARY, define_pair

DENSE_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
TERNARY_TYPES = {torch.float32: 0, torch.bfloat16: 1}
PANEL_BYTES = 1 << 20
# up to how many tokens the stream is faster than panels, with bf16 products and without (benchmarks/inference_cpu.py)
FEW_TOKENS = {True: 128, False: 64}


def packed_linear(inputs: Tensor, bias: Tensor | None, words: Tensor, scale: Tensor, *rest: Any) -> Tensor:
    """Multiply ``[..., in]`` (fp32, bf16 or fp16) by a packed ``[out, in]`` weight."""
    second, layout = rest[0], Layout(*rest[1:])
    given = inputs.detach() if inputs.requires_grad else inputs
    if given.dtype == torch.float16:  # fp16 products are slow on CPUs; in fp32 the sums are better, too
        return _multiply(given.float().contiguous(), bias, words, scale, second, layout).half()
    return _multiply(given.contiguous(), bias, words, scale, second, layout)


def _multiply(
    inputs: Tensor, bias: Tensor | None, words: Tensor, scale: Tensor, second: Tensor | None, layout: Layout
) -> Tensor:
    *shape, in_features = inputs.shape
    out_features = words.shape[0]
    out = inputs.new_empty((*shape, out_features))  # inputs keep their shape: a view takes as long as a small product
    if out.numel() == 0:
        return out
    tokens = out.numel() // out_features
    if bias is not None:
        bias = bias.detach().to(inputs.dtype).contiguous()
    if tokens > few_tokens(inputs.dtype) or not units_per_group(layout, in_features):
        flat = inputs.reshape(tokens, in_features)
        return _multiply_panels(flat, bias, words, scale, second, layout).view(out.shape)
    stream = STREAMS.get(words, scale, second, layout, in_features)
    failed = _kernels().bd_linear(
        stream.pointer,
        stream.address,
        inputs.data_ptr(),
        tokens,
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        int(inputs.dtype == torch.bfloat16),
        isa(),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"no memory for a copy of {tokens} x {in_features} inputs")
    return out


def few_tokens(dtype: torch.dtype) -> int:
    """Up to how many tokens of a dtype streams are multiplied."""
    return FEW_TOKENS[dtype == torch.bfloat16 and isa() == len(ISAS) - 1]


def ternary_int8_linear(
    inputs: Tensor, bias: Tensor | None, words: Tensor, scale: Tensor, unit_weight: Weight
) -> Tensor:
    """Multiply activations, rounded to 8-bit integers, by a ternary weight whose groups fit into a stream; exact.

    Args:
        inputs: ``[..., in]``, fp32 or bf16, at least one token.
        bias: ``[out]`` or `None`.
        words: see `packed_linear`.
        scale: one per row or one in all, in its storage dtype.
        unit_weight: the weight with a scale of one.

    Returns:
        ``[..., out]`` in the dtype of the inputs.
    """
    in_features, one, layout = inputs.shape[-1], unit_weight[0], Layout(*unit_weight[2:])
    given = inputs.detach().contiguous()
    out = given.new_empty(*inputs.shape[:-1], words.shape[0])
    stream = STREAMS.get(words, one, None, layout, in_features)
    scale, bias = scale.detach().contiguous(), None if bias is None else bias.detach().float().contiguous()
    failed = _kernels().bd_ternary_int8(
        stream.pointer,
        stream.address,
        given.data_ptr(),
        given.numel() // in_features,
        scale.data_ptr(),
        SCALE_TYPES[scale.dtype],
        scale.numel() == 1,
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        TERNARY_TYPES[inputs.dtype],
        isa(),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"no memory for the sums of {tuple(out.shape)}")
    return out


def _multiply_panels(
    inputs: Tensor, bias: Tensor | None, words: Tensor, scale: Tensor, second: Tensor | None, layout: Layout
) -> Tensor:
    in_features, out_features = inputs.shape[1], words.shape[0]
    weight, keep = describe(words, scale, second, layout, in_features)
    out = torch.empty(len(inputs), out_features, dtype=inputs.dtype)
    height = max(16, PANEL_BYTES // (in_features * inputs.element_size()))
    panel = torch.empty(min(height, out_features), in_features, dtype=inputs.dtype)
    library, level, threads = _kernels(), isa(), torch.get_num_threads()
    for start in range(0, out_features, height):
        stop = min(start + height, out_features)
        library.bd_dequantize(byref(weight), start, stop, panel.data_ptr(), DENSE_TYPES[panel.dtype], level, threads)
        part = None if bias is None else bias[start:stop]
        out[:, start:stop] = torch.nn.functional.linear(inputs, panel[: stop - start], part)
    del keep
    return out


def dequantize(words: Tensor, scale: Tensor, *rest: Any) -> Tensor:
    """The dense weight ``[out, in]``, each value rounded once from fp32."""
    second, layout, in_features, dtype = rest[0], Layout(*rest[1:5]), rest[5], rest[6]
    weight, keep = describe(words, scale, second, layout, in_features)
    out = torch.empty(words.shape[0], in_features, dtype=dtype)
    if out.numel():
        threads = torch.get_num_threads()
        _kernels().bd_dequantize(byref(weight), 0, len(out), out.data_ptr(), DENSE_TYPES[dtype], isa(), threads)
    del keep
    return out


def _kernels() -> Any:
    library = load()
    if library is None:
        raise StateError("the CPU kernels are not available on this machine. Use use_backend('reference').")
    return library


define_pair()
LIBRARY.impl("packed_linear", packed_linear, "CPU")
LIBRARY.impl("dequantize", dequantize, "CPU")
