"""GGUF, for llama.cpp and what is built on it.

Each matrix goes into the first block layout that holds it exactly, fast ones first; see `gguf_blocks`. Llama's q and k
rows are permuted, because llama.cpp rotates neighbouring pairs where transformers rotates halves; rows move whole, so
groups stay together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitdistiller_peft.errors import ExportError
from bitdistiller_peft.export.formats import ExportFormat, ForeignTensor, ForeignWeight, Options
from bitdistiller_peft.export.gguf_blocks import CARRIERS, Q2_0_TYPE, refuse, to_blocks
from bitdistiller_peft.export.gguf_metadata import (
    ARCHITECTURES,
    add_architecture,
    add_tokenizer,
    head_counts,
    refuse_architecture,
    refuse_tokenizer,
)
from bitdistiller_peft.export.llama_cpp import dequantizer
from bitdistiller_peft.export.source import PackedSource, PackedWeight

FILE_NAME = "model.gguf"
AUTO = ("TQ2_0", "Q2_0", "Q4_0", "Q4_1", "Q8_0")
DENSE = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def _refuse_model(source: PackedSource, options: Options) -> str | None:
    return refuse_architecture(source) or refuse_tokenizer(source.folder, options["pre_tokenizer"])


def _refuse(weight: PackedWeight, options: Options) -> str | None:
    return None if options["carrier"] in DENSE else _choose(weight, options)[1]


def _choose(weight: PackedWeight, options: Options) -> tuple[str, str | None]:
    """The carrier of a weight, and the reason why there is none."""
    names = AUTO if options["carrier"] is None else (options["carrier"],)
    reasons = []
    for name in names:
        reason = refuse(weight, CARRIERS[name])
        if reason is None and to_blocks(weight, CARRIERS[name]) is None:
            reason = f"a zero point lies outside of what {name} can express"
        if reason is None:
            return name, None
        reasons.append(reason)
    return "", reasons[min(2, len(reasons) - 1)]  # of several, that of the most capable common type, Q4_0


def _write(source: PackedSource, folder: Path, options: Options) -> None:
    import gguf

    arch = ARCHITECTURES[source.architecture]
    writer = gguf.GGUFWriter(folder / FILE_NAME, arch, use_temp_file=True)
    add_architecture(writer, source)
    tokens = folder if (folder / "tokenizer.json").is_file() else source.folder
    add_tokenizer(writer, tokens, int(source.config["vocab_size"]), options["pre_tokenizer"])
    names, order = _names(source), _row_order(source)
    for name, tensor in source.plain():
        _add_dense(writer, names[name], order(name, tensor))
    for weight in source.weights():
        name = options["carrier"] if options["carrier"] in DENSE else _choose(weight, options)[0]
        if name in DENSE:
            _add_dense(writer, names[weight.name], order(weight.name, weight.dense(DENSE[name])))
            continue
        blocks = to_blocks(weight, CARRIERS[name])
        if blocks is None:
            raise ExportError(f"layer {weight.layer!r} must fit {name}: it does not. Leave `carrier` out.")
        data = order(weight.name, CARRIERS[name].encode(blocks)).contiguous().view(torch.int8)
        shape = (weight.out_features, weight.in_features)
        # as int8, since the package converts the shapes of uint8 data by a table that may lack a new type
        writer.add_tensor(names[weight.name], data.numpy(), raw_shape=shape, raw_dtype=CARRIERS[name].type_id)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_dense(writer: Any, name: str, tensor: Tensor) -> None:
    """Matrices keep their dtype, vectors become fp32, which holds them all: llama.cpp wants norms and biases so."""
    import gguf

    if tensor.ndim == 1:
        tensor = tensor.float()
    if tensor.dtype == torch.bfloat16:
        data = tensor.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, tensor.contiguous().numpy())


def _names(source: PackedSource) -> dict[str, str]:
    """llama.cpp's names of all tensors.

    Raises:
        ExportError: one has none.
    """
    import gguf

    arches = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    arch = arches[ARCHITECTURES[source.architecture]]
    table = gguf.get_tensor_name_map(arch, int(source.config["num_hidden_layers"]))
    names = {}
    for name in (*source.plain_names, *source.quantized_names):
        found = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ExportError(f"tensor {name!r} must have a place in GGUF: it has none in architecture {arch.name}.")
        names[name] = found
    return names


def _row_order(source: PackedSource, *, inverse: bool = False) -> Callable[[str, Tensor], Tensor]:
    """The permutation of rows that llama.cpp wants, by name: q and k of the llama architecture, biases too."""
    heads, kv_heads = head_counts(source.config)
    counts = {"q_proj": heads, "k_proj": kv_heads} if ARCHITECTURES[source.architecture] == "llama" else {}

    def order(name: str, tensor: Tensor) -> Tensor:
        count = counts.get(name.split(".")[-2])
        if count is None:
            return tensor
        halves = (len(tensor) // count // 2, 2) if inverse else (2, len(tensor) // count // 2)
        return torch.unflatten(tensor, 0, (count, *halves)).transpose(1, 2).flatten(0, 2)

    return order


def _read(source: PackedSource, folder: Path) -> Iterator[ForeignWeight | ForeignTensor]:
    import gguf

    names, back = _names(source), _row_order(source, inverse=True)
    found = _tensors(folder / FILE_NAME)
    if set(found) != set(names.values()):
        raise ExportError(f"the file must hold the model's tensors: got {sorted(set(found) ^ set(names.values()))}.")
    by_type = {carrier.type_id: carrier for carrier in CARRIERS.values()}
    for name in source.quantized_names:
        type_id, data = found[names[name]]
        if type_id not in by_type:
            yield ForeignWeight(name, back(name, _dense(type_id, data)))
            continue
        carrier = by_type[type_id]
        read = dequantizer(carrier.name)
        values = read(data, carrier.block, carrier.num_bytes) if read else _by_package(gguf, carrier.name, data)
        blocks = carrier.decode(torch.from_numpy(data.copy()))
        steps = blocks.steps
        zero = torch.zeros_like(blocks.d, dtype=torch.int16)
        if blocks.m is not None:
            zero = torch.round(-blocks.m.float() / blocks.d.float()).to(torch.int16)
        if values is None:
            values = (blocks.d.float().unsqueeze(-1) * steps).flatten(1).numpy()
        dense = torch.from_numpy(values)
        yield ForeignWeight(name, *(back(name, part) for part in (dense, steps.flatten(1), blocks.d, zero)))
    for name in source.plain_names:
        yield ForeignTensor(name, back(name, _dense(*found[names[name]])))


def _by_package(gguf: Any, carrier: str, data: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
    """Values as the `gguf` package dequantizes them, or `None` where it does not know the type."""
    kind = gguf.GGMLQuantizationType.__members__.get(carrier)
    return None if kind is None else gguf.quants.dequantize(data, kind)


def _dense(type_id: int, data: np.ndarray[Any, Any]) -> Tensor:
    import gguf

    if type_id == gguf.GGMLQuantizationType.BF16:
        return torch.from_numpy(data.copy()).view(torch.bfloat16)
    return torch.from_numpy(data.copy())


def _tensors(path: Path) -> dict[str, tuple[int, np.ndarray[Any, Any]]]:
    """Type and data of every tensor, as the `gguf` package reads them; Q2_0 also by releases that do not know it."""
    import gguf

    extra: dict[str, tuple[int, np.ndarray[Any, Any]]] = {}

    class Reader(gguf.GGUFReader):
        def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
            is_new = {id(field): field.parts[4][0] == Q2_0_TYPE for field in fields}
            if Q2_0_TYPE in gguf.GGML_QUANT_SIZES:
                is_new = {}
            super()._build_tensors(start_offs, [field for field in fields if not is_new.get(id(field))])
            carrier = CARRIERS["Q2_0"]
            for field in (field for field in fields if is_new.get(id(field))):
                name, (columns, rows) = bytes(field.parts[1]).decode(), field.parts[3].tolist()
                row_bytes = columns // carrier.block * carrier.num_bytes
                data = self._get(start_offs + int(field.parts[5][0]), np.uint8, rows * row_bytes)
                extra[name] = (Q2_0_TYPE, data.reshape(rows, row_bytes))

    reader = Reader(path)
    return {tensor.name: (int(tensor.tensor_type), tensor.data) for tensor in reader.tensors} | extra


FORMAT = ExportFormat(
    name="gguf",
    engines="llama.cpp, ollama, LM Studio",
    refuse_weight=_refuse,
    refuse_model=_refuse_model,
    write=_write,
    read=_read,
    options={"carrier": (None, *CARRIERS, *DENSE), "pre_tokenizer": ()},
    variants=({}, {"carrier": "F16"}),
    packages=("gguf",),
    reader="gguf",
    weight_files="*.gguf",
)
