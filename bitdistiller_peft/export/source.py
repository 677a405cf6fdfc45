"""What every export starts from: a packed checkpoint, read matrix by matrix.

A model in memory is saved to a temporary folder first. On disk fused experts are ordinary matrices, names are the ones
that other tools know, and checksums say that the bits are those that were saved; so there is one thing to export.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from bitdistiller_peft.errors import BitDistillerError, CheckpointError, ExportError, StateError, add_location
from bitdistiller_peft.export.structure import Structure
from bitdistiller_peft.hub import BitDistillerQuantConfig, verify_files
from bitdistiller_peft.hub.checkpoint import check_packed
from bitdistiller_peft.hub.files import check_folder, weight_files
from bitdistiller_peft.hub.header import AGAIN, read_json
from bitdistiller_peft.jsonfile import Kinds, check_entries
from bitdistiller_peft.layers import ROWS, SCALE, SUFFIXES, ZERO_POINT, packed_layout
from bitdistiller_peft.packing import unpack_codes, unpack_row
from bitdistiller_peft.quantizers import QuantParams, QuantSpec, dequantize

_KINDS: Mapping[str, Kinds] = {
    "architectures?": (list, NoneType),
    "dtype?": (str, NoneType),
    "torch_dtype?": (str, NoneType),
    "rope_parameters?": (dict, NoneType),
    "rope_scaling?": (dict, NoneType),
}
# what belongs to the tokenizer and to generation, and goes along unchanged
COMPANION_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
)


@dataclass(frozen=True)
class PackedWeight:
    """One quantized matrix ``[out, in]`` of a packed checkpoint.

    Attributes:
        name: the weight's name on disk, e.g. ``"model.layers.0.mlp.down_proj.weight"``.
        spec: how it was quantized.
        in_features: input width.
        words: packed codes, int32 ``[out, words]``.
        params: stored scales ``[out, groups]`` and unpacked zero points, uint8, same shape.
        is_transposed: the full-precision weight is stored ``[in, out]`` (`Conv1D`).
    """

    name: str
    spec: QuantSpec
    in_features: int
    words: Tensor
    params: QuantParams
    is_transposed: bool = False

    @property
    def layer(self) -> str:
        """The layer's name."""
        return self.name.removesuffix(".weight")

    @property
    def out_features(self) -> int:
        """Output width."""
        return self.words.shape[0]

    @property
    def group_width(self) -> int:
        """Weights of a row that share a scale; all of them where the matrix has one scale."""
        return self.in_features // self.params.scale.shape[1]

    @property
    def codes(self) -> Tensor:
        """Codes, uint8 ``[out, in]``."""
        return unpack_row(self.words, self.spec.grid.bits, self.in_features, self.spec.packing)

    @property
    def row_scale(self) -> Tensor:
        """Scales ``[out, groups]``, also where the matrix has only one."""
        return self.params.scale.expand(self.out_features, -1)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight ``[out, in]``: computed in fp32, then rounded once."""
        return dequantize(self.codes, self.params, self.spec).to(dtype)


class PackedSource:
    """A packed checkpoint in a folder.

    Args:
        folder: what `save_pretrained` of a packed model wrote.

    Raises:
        StateError: the checkpoint is latent, or not one of ours.
        CheckpointError: it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config_file = folder / "config.json"
        if not self.config_file.is_file():
            raise CheckpointError(f"`model` must be a folder with config.json: got {str(folder)!r}. Check the path.")
        self.config = read_json(self.config_file)
        self.check_config(_KINDS)
        section = self.config.pop("quantization_config", None)
        if not isinstance(section, dict) or section.get("quant_method") != "bitdistiller":
            raise StateError(
                f"`model` must be packed by this library: got {str(folder)!r} without such a quantization_config. "
                "Train, call pack_and_unload() and save_pretrained()."
            )
        self.quant_config: BitDistillerQuantConfig = BitDistillerQuantConfig.from_dict(section)
        if self.quant_config.state != "packed":
            raise StateError(
                f"`model` must be packed: got {str(folder)!r} with state={self.quant_config.state!r}. Float master "
                "weights are not the quantized model; pack it first."
            )
        headers = check_folder(folder)
        files = weight_files(folder)
        verify_files(files, mode="fast")
        self._files = {name: file for file in files for name in headers[file.name]}
        packed = {n for n in self._files if n + SCALE in self._files}
        self._tables = {f"{name}.weight" for name in self.quant_config.embeddings} & packed
        self.quantized_names = sorted(packed - self._tables)
        own = {n + suffix for n in packed for suffix in ("", *SUFFIXES)}
        own |= {f"{n.removesuffix('.weight')}.{ROWS}" for n in self._tables}
        self.plain_names = sorted({name for name in self._files if name not in own} | self._tables)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in."""
        name = self.config.get("dtype") or self.config.get("torch_dtype") or "float32"
        dtype = getattr(torch, name.removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype):
            raise CheckpointError(f"{self.config_file} must name a dtype of torch: got dtype={name[:80]!r}. {AGAIN}")
        return dtype

    def check_config(self, kinds: Mapping[str, Kinds]) -> None:
        """Refuse a config.json that lacks an entry, or has one of another kind.

        Args:
            kinds: as for `check_entries`.

        Raises:
            CheckpointError: the entry is named.
        """
        check_entries(self.config, kinds, self.config_file, AGAIN)

    @property
    def architecture(self) -> str:
        """The class that the model is built from, e.g. ``"LlamaForCausalLM"``."""
        return str((self.config.get("architectures") or [""])[0])

    @property
    def activation_bits(self) -> int | None:
        """Width of the activation codes, or `None` where activations are not quantized."""
        bits: int | None = self.quant_config.activation_bits
        return bits

    @property
    def has_sub_norms(self) -> bool:
        """Whether some layers have a norm of their own in front, which no other engine knows."""
        return self.quant_config.subln != "none"

    def weights(self) -> Iterator[PackedWeight]:
        """Read the quantized matrices, one at a time.

        Raises:
            CheckpointError: a tensor is missing, or does not fit the config.
        """
        for name in self.quantized_names:
            yield self.weight(name)

    def weight(self, name: str) -> PackedWeight:
        """Read one quantized matrix by its name on disk."""
        spec = self.quant_config.spec(self._override(name))
        try:
            return self._read(name, spec)
        except BitDistillerError as error:
            raise add_location(error, f"layer {name.removesuffix('.weight')!r}") from None

    def plain(self) -> Iterator[tuple[str, Tensor]]:
        """Read what is not quantized, one tensor at a time: embeddings, norms, biases, layers left alone.

        A packed embedding comes dense, in the dtype that the model computes in: exactly what the model looks up.
        """
        for name in self.plain_names:
            yield name, self.tensor(name)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor that is not quantized; a packed embedding as the rows that the model looks up."""
        return self.weight(name).dense(self.dtype) if name in self._tables else self._stored(name)

    def _stored(self, name: str) -> Tensor:
        with safe_open(self._files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def copy_companions(self, folder: Path) -> None:
        """Copy tokenizer and generation settings beside an exported model."""
        for name in COMPANION_FILES:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, folder / name)

    def _read(self, name: str, spec: QuantSpec) -> PackedWeight:
        words, scale = self._stored(name), self._stored(name + SCALE)
        if words.ndim != 2 or words.dtype != torch.int32:
            raise CheckpointError(f"packed codes must be an int32 matrix: got {words.dtype} {list(words.shape)}.")
        width = self._width(name, words, scale, spec)
        for suffix, (shape, dtype) in packed_layout(spec, (words.shape[0], width)).items():
            if name + suffix not in self._files:
                raise CheckpointError(f"tensor {name + suffix!r} must be there: it is missing. Save the model again.")
            found = self._stored(name + suffix)
            if tuple(found.shape) != shape or found.dtype != dtype:
                raise CheckpointError(
                    f"tensor {name + suffix!r} must have shape {list(shape)} and dtype {dtype}: got "
                    f"{list(found.shape)} and {found.dtype}. config.json and weights do not belong together."
                )
        stored = {suffix: self._stored(name + suffix) for suffix in SUFFIXES if name + suffix in self._files}
        check_packed({"": words, **stored}, "", spec, width)
        if ZERO_POINT in stored:
            stored[ZERO_POINT] = unpack_codes(stored[ZERO_POINT], spec.grid.bits, scale.shape[1])
        params = QuantParams(*(stored.get(suffix) for suffix in SUFFIXES))  # type: ignore[arg-type]
        is_transposed = name.removesuffix(".weight") in self._structure.transposed
        return PackedWeight(name, spec, width, words, params, is_transposed)

    def _width(self, name: str, words: Tensor, scale: Tensor, spec: QuantSpec) -> int:
        """The input width: from the groups, or from the model where a row is one group."""
        if isinstance(spec.group_size, int) and spec.group_size > 0:
            return spec.group_size * scale.shape[1]
        layer = name.removesuffix(".weight")
        if layer in self._structure.widths:
            return self._structure.widths[layer]
        most = words.shape[1] * 32 // spec.grid.bits
        fits = {width for width in self._structure.expert_widths if most - 32 < width <= most}
        if len(fits) != 1:
            raise ExportError(
                f"the input width must be known: got codes for {sorted(fits)}. Pack the experts with a group size."
            )
        return fits.pop()

    def _override(self, name: str) -> str | None:
        """The key of the overrides that means this tensor; experts are overridden as one module."""
        layer = name.removesuffix(".weight")
        for key in self.quant_config.overrides:
            if key == layer or (".experts." in layer and key.endswith("experts") and _same_place(key, layer)):
                return key
        return None

    @cached_property
    def _structure(self) -> Structure:
        return Structure.of(self.folder)


def _same_place(key: str, layer: str) -> bool:
    return re.findall(r"\d+", key) == re.findall(r"\d+", layer.partition(".experts.")[0])


@contextmanager
def open_source(model: nn.Module | str | os.PathLike[str]) -> Iterator[PackedSource]:
    """Open a packed model, in memory or in a folder, for export.

    Raises:
        StateError: the model is not packed, or carries an adapter.
        CheckpointError: the checkpoint is damaged.
    """
    if not isinstance(model, nn.Module):
        yield PackedSource(Path(model))
        return
    config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if hasattr(model, "peft_config"):
        raise StateError(
            f"`model` must be packed and without adapters: got {type(model).__name__} with some. Call "
            "pack_and_unload(); a LoRA beside packed weights has no place in other formats."
        )
    if not isinstance(config, BitDistillerQuantConfig) or config.state != "packed":
        raise StateError(
            f"`model` must be packed: got {type(model).__name__} that is not. Call pack_and_unload() on the student."
        )
    with tempfile.TemporaryDirectory() as name:
        model.save_pretrained(name)  # type: ignore[operator]
        yield PackedSource(Path(name))
