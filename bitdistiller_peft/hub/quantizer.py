"""The transformers socket: an `HfQuantizer` for packed and latent models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, PrefixChange
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.utils import CONFIG_NAME

from bitdistiller_peft.errors import BitDistillerError, add_location
from bitdistiller_peft.hub.checkpoint import check_files, check_headers, check_values
from bitdistiller_peft.hub.config import BitDistillerQuantConfig
from bitdistiller_peft.hub.convert import convert_skeleton, convertible, resolve_skips
from bitdistiller_peft.hub.files import check_folder, check_model_config
from bitdistiller_peft.hub.modules import expert_parameters, is_experts, weight_shape
from bitdistiller_peft.hub.save import attach_save
from bitdistiller_peft.hub.tables import find_embeddings
from bitdistiller_peft.layers import (
    INPUT_NORM,
    ROWS,
    SUFFIXES,
    PackedEmbedding,
    SubLN,
    attach_learned_params,
    input_norm,
    iter_quantized,
    packed_layout,
    packed_tensors,
    quant_specs,
)
from bitdistiller_peft.quantizers import find_params, quantize


class BitDistillerHfQuantizer(HfQuantizer):
    """Builds the quantized skeleton, fills it from a quantized or a full-precision checkpoint, and checks it."""

    requires_calibration = False
    quantization_config: BitDistillerQuantConfig
    serialized_names: dict[str, list[str]] = {  # noqa: RUF012  (transformers' own form)
        "weight": ["weight", *(f"weight{suffix}" for suffix in SUFFIXES)]
    }

    def __init__(self, quantization_config: BitDistillerQuantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.in_features: dict[str, int] = {}
        self.transposed: set[str] = set()
        self.tensor_files: dict[str, str] | None = None

    @property
    def is_trainable(self) -> bool:
        """LoRA trains on packed models; latent ones train themselves."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Only latent models have weights of their own to train."""
        return self.quantization_config.state == "latent"

    def is_serializable(self) -> bool:
        """Both states save as safetensors."""
        return True

    def update_attn_implementation(self, config: Any) -> Any:
        """Check a checkpoint's folder; nothing else of transformers' hooks has the config this early."""
        if self.pre_quantized:
            folder = Path(str(config.name_or_path or ""))
            # not so for a name on the Hub, nor where the model lies in a subfolder
            if config.name_or_path and (folder / CONFIG_NAME).exists():
                check_folder(folder)
            else:
                check_model_config(config.to_dict())
        return config

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Whether a full-precision tensor of the checkpoint is quantized, or given learned parameters, on its way."""
        module_name, _, name = param_name.rpartition(".")
        return not self.pre_quantized and name in quant_specs(model.get_submodule(module_name))

    def get_quantize_ops(self) -> ConversionOps:
        """The operation for `param_needs_quantization`."""
        return QuantizeOnLoad(self)

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        config = self.quantization_config
        files = kwargs.get("checkpoint_files")
        if self.pre_quantized:
            source = str(model.config.name_or_path)  # type: ignore[union-attr]
            check_files(files, source, config.verify)  # type: ignore[arg-type]
        else:
            config.modules_to_not_convert = resolve_skips(model, config.modules_to_not_convert)
        widths: dict[str, int] = {}
        for name, module in convertible(model):
            parameters = expert_parameters(module) if is_experts(module) else ("weight",)
            for parameter in parameters:
                is_3d = getattr(module, parameter).ndim == 3
                widths[f"{name}.{parameter}"] = (
                    getattr(module, parameter).shape[-1] if is_3d else weight_shape(module)[1]
                )
            if isinstance(module, Conv1D):
                self.transposed.add(f"{name}.weight")
        for name, module in find_embeddings(model, config).items():
            widths[f"{name}.weight"] = module.embedding_dim
        converted = set(convert_skeleton(model, config))
        if config.subln == "output":
            config.subln_modules = sorted(n for n in converted if config.inputs(n).norm_eps is not None)
        if config.state == "packed":
            self.in_features = {key: n for key, n in widths.items() if key.rpartition(".")[0] in converted}
        if self.pre_quantized:
            self.tensor_files = check_headers(model, files, self.in_features)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for module_name, module, name, spec in iter_quantized(model):
            width = self.in_features.get(f"{module_name}.{name}")
            layout = {} if width is None else packed_layout(spec, (*getattr(module, name).shape[:-1], width))
            for suffix, (_, dtype) in layout.items():
                tensor = getattr(module, name + suffix)
                tensor.requires_grad_(False)  # the loader makes every floating tensor trainable,
                tensor.data = tensor.data.to(dtype)  # and casts those of modules that a model wants in fp32
        for module in model.modules():
            if isinstance(module, PackedEmbedding):
                getattr(module, ROWS).requires_grad_(False)
            if isinstance(module, SubLN):
                module.weight.requires_grad_(self.quantization_config.state == "latent")
                module.weight.data = module.weight.data.float()
        check_values(model, self.in_features, self.tensor_files)
        if not self.pre_quantized:  # the loader keeps the converters that it used, and no scales were there to convert
            conversions: Any = getattr(model, "_weight_conversions", None) or []
            model._weight_conversions = self.update_weight_conversions(list(conversions), model)
        attach_save(model)
        return model


class QuantizeOnLoad(ConversionOps):
    """Quantize a full-precision tensor while it is loaded: to codes, or to a master weight with learned parameters."""

    def __init__(self, hf_quantizer: BitDistillerHfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self, input_dict: dict[str, Tensor | list[Tensor]], model: nn.Module | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Return the tensors that the module stores, by full name.

        Raises:
            WeightError, ScaleRangeError: the tensor cannot be quantized; it is named.
        """
        results: dict[str, Tensor] = {}
        for full_name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            if model is None:
                raise TypeError("the model is needed to look up how a tensor is quantized")
            try:
                results |= self._convert_one(model, full_name, weight)
            except BitDistillerError as error:
                raise add_location(error, f"tensor {full_name!r}") from None
        return results

    def _convert_one(self, model: nn.Module, full_name: str, weight: Tensor) -> dict[str, Tensor]:
        module_name, _, name = full_name.rpartition(".")
        module = model.get_submodule(module_name)
        spec, norm = quant_specs(module)[name], input_norm(module)
        gains: dict[str, Tensor] = {}
        if norm is not None:  # no full-precision checkpoint has them
            gains[f"{module_name}.{INPUT_NORM}.weight"] = nn.Parameter(torch.ones(norm.weight.shape))
        if isinstance(module, PackedEmbedding):
            gains[f"{module_name}.{ROWS}"] = nn.Parameter(torch.empty(0, dtype=module.row_dtype), requires_grad=False)
        if full_name in self.hf_quantizer.transposed:
            weight = weight.T.contiguous()
        if self.hf_quantizer.quantization_config.state == "packed":
            params = find_params(weight, spec)
            tensors = packed_tensors(quantize(weight, params, spec), params, spec)
            return gains | {full_name + suffix: nn.Parameter(t, requires_grad=False) for suffix, t in tensors.items()}
        holder = nn.Module()
        holder.register_parameter(name, nn.Parameter(weight))
        config = self.hf_quantizer.quantization_config
        attach_learned_params(
            holder, name, spec, learn_scale=config.learn_scale, learn_zero_point=config.learn_zero_point
        )
        return gains | {f"{module_name}.{key}": tensor for key, tensor in holder.state_dict(keep_vars=True).items()}


def as_quantized(model: nn.Module, config: BitDistillerQuantConfig, in_features: dict[str, int]) -> None:
    """Give a model whose layers were packed in memory everything that a loaded one has, so that it saves itself.

    Args:
        model: a transformers model with packed layers.
        config: what its config.json will say.
        in_features: input width of every packed parameter, by full name.
    """
    quantizer = BitDistillerHfQuantizer(config, pre_quantized=True)
    quantizer.in_features = dict(in_features)
    model.config.quantization_config = config  # type: ignore[union-attr]
    model.config._is_quantized = True  # type: ignore[union-attr]
    model.hf_quantizer = quantizer
    model.is_quantized = True  # type: ignore[assignment]
    model.quantization_method = config.quant_method  # type: ignore[assignment]
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:  # built from a config, not loaded: what transformers itself would use for saving
        mapping = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [entry for entry in mapping if not isinstance(entry, PrefixChange)]
    # without converters of their own, the scales of fused experts would stay fused while the codes are split
    model._weight_conversions = quantizer.update_weight_conversions(list(conversions), model)
    attach_save(model)
