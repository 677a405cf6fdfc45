"""vLLM's quantization method ``"bitdistiller"``: packed checkpoints of this library, every grid, without conversion.

vLLM fuses q, k and v, and gate and up, and splits layers over devices. Each fused layer gets one flat parameter per
stored tensor (`parts`), which vLLM's loaders fill; then packed layers of our own multiply, with our kernels, so that
the products are those of the packed model in transformers.

Written against the interfaces of vLLM 0.32: `QuantizationConfig`, `QuantizeMethodBase`, `LinearBase`,
`VocabParallelEmbedding`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from bitdistiller_peft.errors import CheckpointError, ConfigError, StateError, TargetError
from bitdistiller_peft.hub import QUANT_METHOD, BitDistillerQuantConfig, verify_files
from bitdistiller_peft.hub.convert import is_skipped, override_name
from bitdistiller_peft.hub.files import weight_files
from bitdistiller_peft.layers import INPUT_NORM
from bitdistiller_peft.serving.parts import NORM, FlatLayout, Part, check_parts

MODULES = "bitdistiller_parts"
SHARDS = {"q": 0, "k": 1, "v": 2}


class BitDistillerVllmConfig(QuantizationConfig):
    """What vLLM asks about a packed checkpoint.

    Args:
        config: the section of config.json, read and checked.
    """

    def __init__(self, config: BitDistillerQuantConfig) -> None:
        super().__init__()
        self.config = config

    def get_name(self) -> str:
        """The name under `quant_method` in config.json."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """What the kernels compute in."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any device: the reference backend needs nothing but torch."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: everything stands in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BitDistillerVllmConfig:
        """Read `quantization_config`; the schema is closed.

        Raises:
            ConfigError: an unknown key, or a value outside its rule.
            StateError: a latent checkpoint, which is not the quantized model, or one with a packed embedding.
        """
        read: BitDistillerQuantConfig = BitDistillerQuantConfig.from_dict(dict(config))
        if read.state != "packed":
            raise StateError(
                f"`model` must be packed: got a checkpoint with state={read.state!r}. Load it with transformers and "
                "pack it, or serve the full-precision model."
            )
        if read.embeddings:
            raise StateError(
                f"`model` must have a full-precision embedding: got a checkpoint with embeddings={read.embeddings!r}. "
                "Export it with export_model(model, 'compressed-tensors', folder), which writes the rows as floats."
            )
        return cls(read)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Give the stored names of modules the names that vLLM's model has."""
        self.config.overrides = hf_to_vllm_mapper.apply_dict(self.config.overrides)
        self.config.modules_to_not_convert = hf_to_vllm_mapper.apply_list(self.config.modules_to_not_convert or [])

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Compare the files of a local folder with their checksums, as loading with transformers does.

        Raises:
            ChecksumError: they differ.
        """
        if Path(model_name).is_dir():
            verify_files(weight_files(Path(model_name)), mode="fast")

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Choose what computes a layer.

        Raises:
            TargetError: fused experts, which have no path here, or a fused layer that is quantized in part.
        """
        names = self.part_names(prefix)
        skipped = [is_skipped(name, self.config.modules_to_not_convert or []) for name in names]
        if isinstance(layer, ParallelLMHead):
            return None if all(skipped) else BitDistillerLinearMethod(self.config, names)
        if isinstance(layer, LinearBase):
            if any(skipped) and not all(skipped):
                raise TargetError(
                    f"layers that vLLM runs as one must all be quantized or none: got {names} of which "
                    f"{[name for name, skip in zip(names, skipped, strict=True) if skip]} are not. Train with "
                    "target='vllm'."
                )
            return UnquantizedLinearMethod() if all(skipped) else BitDistillerLinearMethod(self.config, names)
        if hasattr(layer, "moe_config") and not all(skipped):
            raise TargetError(
                f"fused experts must be served in another format: got {prefix!r}, and vLLM's expert kernels do not "
                "know this one. Export with export_model(model, 'compressed-tensors', ...)."
            )
        return None

    def part_names(self, prefix: str) -> list[str]:
        """The names in the checkpoint of the layers that a layer of vLLM's model stands for."""
        parent, dot, last = prefix.rpartition(".")
        return [f"{parent}{dot}{name}" for name in self.packed_modules_mapping.get(last, [last])]


class BitDistillerLinearMethod(LinearMethodBase):
    """Creates, fills and applies the packed tensors of one layer, fused or not, and of the output head.

    Args:
        config: of the checkpoint.
        names: the layers of the checkpoint that the layer stands for.
    """

    def __init__(self, config: BitDistillerQuantConfig, names: list[str]) -> None:
        self.config, self.names = config, names

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register one flat parameter for each stored tensor; vLLM's own loaders are not used.

        Raises:
            ConfigError: vLLM splits the layer where it cannot be split.
        """
        full_rows = _full_rows(layer, output_partition_sizes)
        names = self.names if len(self.names) == len(full_rows) else self.names * len(full_rows)
        if len(names) != len(full_rows):
            raise ConfigError(f"{self.names} must be {len(full_rows)} layers or one: vLLM fuses them otherwise.")
        sizes = zip(names, output_partition_sizes, full_rows, strict=True)
        parts = [
            Part(
                name,
                self.config.spec(override_name(name, self.config)),
                self.config.inputs(name),
                rows,
                input_size_per_partition,
                whole,
                input_size,
            )
            for name, rows, whole in sizes
        ]
        check_parts(parts, getattr(layer, "tp_size", 1))
        flat = FlatLayout(parts)
        layer.bitdistiller_layout = flat  # type: ignore[assignment]
        for suffix in flat.suffixes:
            parameter = nn.Parameter(flat.empty(suffix), requires_grad=False)
            parameter.weight_loader = partial(_load, layer, suffix)  # type: ignore[attr-defined]
            if suffix == NORM:
                holder = nn.Module()
                holder.register_parameter("weight", parameter)
                layer.add_module(INPUT_NORM, holder)
            else:
                layer.register_parameter(f"weight{suffix}", parameter)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Put packed layers over the flat tensors."""
        flat: FlatLayout = layer.bitdistiller_layout  # type: ignore[assignment]
        tensors = {suffix: _parameter(layer, suffix).data for suffix in flat.suffixes}
        setattr(layer, MODULES, nn.ModuleList(flat.modules(tensors)))

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply ``[..., in]``: each part by its own packed layer, the results side by side."""
        parts: Any = getattr(layer, MODULES)
        if len(parts) == 1:
            return parts[0].multiply(x, bias)
        biases = (None,) * len(parts) if bias is None else torch.split(bias, [part.out_features for part in parts])
        return torch.cat([part.multiply(x, own) for part, own in zip(parts, biases, strict=True)], -1)

    def dequantize_weight(self, layer: nn.Module) -> Tensor:
        """The dense weight of a layer ``[out, in]``, for models that look into it."""
        parts: Any = getattr(layer, MODULES)
        return torch.cat([part.dequantize(layer.params_dtype) for part in parts])


def _full_rows(layer: Any, own: list[int]) -> list[int]:
    """Outputs of the whole matrices that a layer holds a share of, in the checkpoint."""
    if isinstance(layer, ParallelLMHead):
        return [layer.org_vocab_size]
    if hasattr(layer, "total_num_kv_heads"):  # vLLM counts k and v several times where devices share them
        query = layer.total_num_heads * layer.head_size
        keys = layer.total_num_kv_heads * layer.head_size
        return [query, keys, layer.total_num_kv_heads * getattr(layer, "v_head_size", layer.head_size)]
    sizes = getattr(layer, "output_sizes", None)
    if sizes is not None:
        return list(sizes)
    return [layer.output_size] if len(own) == 1 else [size * layer.tp_size for size in own]


def _parameter(layer: nn.Module, suffix: str) -> nn.Parameter:
    return layer.get_parameter(suffix.removeprefix(".") if suffix == NORM else f"weight{suffix}")


def _load(layer: Any, suffix: str, parameter: nn.Parameter, loaded: Tensor, shard: Any = None) -> None:
    """What vLLM calls for every stored tensor: the `weight_loader` of a flat parameter.

    Args:
        layer: vLLM's layer.
        suffix: which tensor of a part.
        parameter: the flat one.
        loaded: as stored.
        shard: which part: ``"q"``, ``"k"``, ``"v"``, a number, several numbers; `None` for all of them.

    Raises:
        CheckpointError: the tensor does not fit.
    """
    flat: FlatLayout = layer.bitdistiller_layout
    if shard is None or isinstance(shard, tuple):
        indices = range(len(flat.parts)) if shard is None else shard
        for index, piece in zip(indices, _pieces(flat, suffix, list(indices), loaded), strict=True):
            _load_part(layer, suffix, parameter, piece, index)
        return
    _load_part(layer, suffix, parameter, loaded, SHARDS.get(shard, shard))


def _pieces(flat: FlatLayout, suffix: str, indices: list[int], loaded: Tensor) -> list[Tensor]:
    """Take a tensor apart that is fused in the checkpoint already: by rows, or the same for all."""
    parts = [flat.parts[index] for index in indices]
    if len(parts) == 1:
        return [loaded]
    if suffix == NORM or (parts[0].spec.group_size == "tensor" and suffix != ""):
        return [loaded] * len(parts)
    sizes = [part.full_rows for part in parts]
    if sum(sizes) != len(loaded):
        raise CheckpointError(f"layer {parts[0].name!r} must have {sum(sizes)} outputs: got {len(loaded)}.")
    return list(torch.split(loaded, sizes))


def _load_part(layer: Any, suffix: str, parameter: nn.Parameter, loaded: Tensor, index: int) -> None:
    flat: FlatLayout = layer.bitdistiller_layout
    part, rank = flat.parts[index], int(getattr(layer, "tp_rank", 0))
    if isinstance(layer, ParallelLMHead):
        first_row = layer.shard_indices.org_vocab_start_index
    else:
        # devices that share a k or v head hold the same rows; layers that are not split hold all of them
        replicas = getattr(layer, "num_kv_head_replicas", 1) if index > 0 else 1
        first_row = rank // replicas * part.rows if part.rows < part.full_rows else 0
    first_column = rank * part.width if part.width < part.full_width else 0
    flat.load(suffix, index, parameter.data, loaded, first_row=first_row, first_column=first_column)
