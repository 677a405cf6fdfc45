"""What a packed checkpoint does not say about itself and only the architecture knows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bitdistiller_peft.errors import CheckpointError
from bitdistiller_peft.hub.convert import convertible
from bitdistiller_peft.hub.header import AGAIN
from bitdistiller_peft.hub.modules import expert_parameters, is_experts, weight_shape


@dataclass(frozen=True)
class Structure:
    """Input widths of the layers, and which are stored transposed.

    Attributes:
        widths: input width of every linear layer and embedding, by name.
        expert_widths: input widths that occur in fused experts.
        transposed: names of `Conv1D` layers, whose weights are stored ``[in, out]``.
    """

    widths: dict[str, int]
    expert_widths: set[int]
    transposed: set[str]

    @classmethod
    def of(cls, folder: Path) -> Structure:
        """Build the model of a folder's config.json without memory and look at it.

        Raises:
            CheckpointError: transformers does not know the model, or cannot build it.
        """
        try:
            model = _hollow(folder)
        except Exception as error:  # whatever an entry of the config leads transformers to
            reason = f"{type(error).__name__}: {str(error)[:300]}"
            raise CheckpointError(
                f"{folder / 'config.json'} must describe a model that transformers knows: {reason}. {AGAIN}"
            ) from error
        modules = list(convertible(model))
        plain = [(name, module) for name, module in modules if not is_experts(module)]
        experts = [module for _, module in modules if is_experts(module)]
        tables = {n: m.embedding_dim for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
        return cls(
            {name: weight_shape(module)[1] for name, module in plain} | tables,
            {getattr(module, key).shape[-1] for module in experts for key in expert_parameters(module)},
            {name for name, module in plain if isinstance(module, Conv1D)},
        )


def _hollow(folder: Path) -> nn.Module:
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    owner: Any = getattr(transformers, str((config.architectures or [""])[0]), None)
    is_model = isinstance(owner, type) and issubclass(owner, PreTrainedModel)  # nothing else is called by a file's word
    with torch.device("meta"):
        model: nn.Module = owner(config) if is_model else AutoModelForCausalLM.from_config(config)
    return model
