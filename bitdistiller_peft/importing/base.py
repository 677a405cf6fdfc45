"""A full-precision model under an imported student: what it shares with the foreign model, and what it must not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftMixedModel, PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from bitdistiller_peft.errors import ForeignModelError
from bitdistiller_peft.hub.modules import is_linear, tied_names, weight_shape
from bitdistiller_peft.importing.build import Skeleton, check_names
from bitdistiller_peft.importing.formats import ForeignModel, ImportedWeight

# what decides the function of a model beside its weights
_KEYS = ("model_type", "hidden_act", "rms_norm_eps", "rope_parameters", "sliding_window", "tie_word_embeddings")
_SEPARATE = "Import without `base`, and give it to the trainer instead: DistillTrainer(model, args, teacher=base)."


def check_same_model(base: nn.Module, skeleton: Skeleton) -> None:
    """Refuse a base that is another model than the one that was quantized.

    Raises:
        ForeignModelError: a layer has another shape, or a setting another value.
    """
    theirs: Any = getattr(base, "config", None)
    for key in _KEYS if theirs is not None else ():
        ours, other = getattr(skeleton.config, key, None), getattr(theirs, key, None)
        if ours != other:
            raise ForeignModelError(
                f"`base` must be the model that was quantized: got {key}={str(other)[:80]!r}, the checkpoint has "
                f"{str(ours)[:80]!r}."
            )
    shapes = {name: weight_shape(module) for name, module in base.named_modules() if is_linear(module)}
    for name in sorted(skeleton.shapes):
        if shapes.get(name) != skeleton.shapes[name]:
            raise ForeignModelError(
                f"`base` must be the model that was quantized: layer {name!r} is {shapes.get(name)}, and "
                f"{skeleton.shapes[name]} in the checkpoint."
            )


def own_tensors(
    base: nn.Module, foreign: ForeignModel, skeleton: Skeleton, weights: Mapping[str, ImportedWeight]
) -> dict[str, Tensor]:
    """The tensors that student and teacher cannot share, by name: those whose values are not the base's.

    What is the base's own value rounded to the dtype of the file stays the base's.

    Raises:
        ForeignModelError: one that cannot be held twice: a bias of a quantized layer, or a tied embedding.
    """
    names, parameters = set(check_names(foreign, skeleton)), dict(base.named_parameters(remove_duplicate=False))
    own = {name: tensor for name, tensor in foreign.plain() if name in names and _differs(tensor, parameters[name])}
    for layer in set(foreign.layers) - set(weights):
        dense = foreign.dense(layer, skeleton.shapes[layer])
        own[f"{layer}.weight"] = dense.T if layer in skeleton.transposed else dense
    tied = tied_names(base)
    for name in own:
        module = name.rpartition(".")[0]
        if module in weights or module in tied:
            raise ForeignModelError(
                f"student and teacher must be able to share tensor {name!r}, or hold one each: the checkpoint's is not "
                f"the base's, and it {'belongs to a quantized layer' if module in weights else 'is tied'}. {_SEPARATE}"
            )
    return own


def _differs(foreign: Tensor, base: Tensor) -> bool:
    values = base.detach().cpu()
    if foreign.shape != values.shape:
        return True
    return not (torch.equal(foreign, values.to(foreign.dtype)) or torch.equal(foreign.double(), values.double()))


@torch.no_grad()
def put_own_tensors(student: PeftModel | PeftMixedModel, own: Mapping[str, Tensor], adapter_name: str) -> None:
    """Write the foreign values into the student's copies of modules (`modules_to_save`)."""
    model: nn.Module = student.base_model.model
    for name, tensor in own.items():
        module, _, parameter = name.rpartition(".")
        wrapper = model.get_submodule(module)
        if not isinstance(wrapper, ModulesToSaveWrapper):
            raise TypeError(f"module {module!r} should have a copy")
        getattr(wrapper.modules_to_save[adapter_name], parameter).copy_(tensor)
