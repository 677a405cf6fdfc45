"""`import_model`: a model that another tool quantized, as a student whose codes are the ones that were published."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftMixedModel, PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from bitdistiller_peft.errors import ConfigError, UnknownNameError
from bitdistiller_peft.importing.base import check_same_model, own_tensors, put_own_tensors
from bitdistiller_peft.importing.build import Skeleton, check_names, dequantized_model, put_codes, skeleton_of
from bitdistiller_peft.importing.formats import ForeignModel, ImportedWeight
from bitdistiller_peft.importing.locate import open_foreign
from bitdistiller_peft.importing.specs import described, on_asked_grids
from bitdistiller_peft.quantizers import SCALE_DTYPES
from bitdistiller_peft.tuner import BitDistillerConfig, get_bitdistiller_model, note_provenance
from bitdistiller_peft.tuner.targets import is_target

ADAPTER = "default"
# what the checkpoint says, not the caller
_DETERMINED = (
    "bits",
    "group_size",
    "zero_point_range",
    "refine",
    "tied",
    "overrides",
    "target_modules",
    "target_parameters",
    "layers_to_transform",
    "layers_pattern",
)


def import_model(
    source: str | os.PathLike[str],
    base: str | os.PathLike[str] | nn.Module | None = None,
    *,
    dtype: str = "auto",
    revision: str | None = None,
    **config: Any,
) -> PeftModel | PeftMixedModel:
    """Make a trainable student of a model that another tool quantized: GPTQ, AWQ, compressed-tensors, GGUF, NF4.

    The student's codes, scales and zero points are the published ones, exactly; packed at once, it gives them back. Its
    master weights start at the dequantized values, in the middle between two roundings. What none of our grids holds is
    refused. Nothing is executed that comes with a checkpoint, and no pickle is opened.

    Args:
        source: a folder, a ``.gguf`` file, a Hub repository (``"user/name"``), or a GGUF file in one
            (``"user/name/file.gguf"``).
        base: the full-precision model that was quantized: loaded, or its folder or Hub name. It is then the teacher
            inside the student (`disable_adapter()`, ``teacher="self"``). Without it, the dequantized model stands
            there, and the trainer wants a teacher of its own.
        dtype: of the weights outside of the student, ``"auto"`` for the checkpoint's: ``"float32"`` for GGUF.
        revision: branch, tag or commit of a source on the Hub.
        config: further settings of `BitDistillerConfig` that the checkpoint leaves open, e.g. ``learn_zero_point=True``
            or ``exclude_modules=["down_proj"]``, which leaves those layers dequantized.

    Returns:
        A `PeftModel` as `get_bitdistiller_model` makes it.

    Raises:
        ForeignModelError: a grid that we do not have, another base, or an unknown format; with what would work.
        CheckpointError: files that are missing, damaged, or not what they say.
        ConfigError: a setting that the checkpoint determines, or that cannot work.

    Example:
        >>> model = import_model("someone/Model-GPTQ", base="someone/Model")  # doctest: +SKIP
    """
    _check_settings(config, dtype)
    foreign = open_foreign(source, revision)
    skeleton = skeleton_of(foreign.config)
    check_names(foreign, skeleton)
    probe = BitDistillerConfig(target_modules=list(foreign.layers), exclude_modules=config.get("exclude_modules"))
    chosen = [layer for layer in foreign.layers if is_target(probe, layer)]
    if not chosen:
        raise ConfigError("`exclude_modules` must leave a layer to import: got none. Shorten it.")
    weights = {layer: foreign.read(layer, skeleton.shapes[layer]) for layer in chosen}
    weights = on_asked_grids(weights, grid=config.pop("grid", None), scale_dtype=config.pop("scale_dtype", None))
    model, own = _model_under(base, foreign, skeleton, weights, dtype)
    if own:
        copied = {name.rpartition(".")[0] for name in own}
        config["modules_to_save"] = sorted({*(config.get("modules_to_save") or ()), *copied})
    settings = BitDistillerConfig(**described(weights), **config)
    student = get_bitdistiller_model(model, settings, adapter_name=ADAPTER)
    put_codes(student, weights, ADAPTER)
    put_own_tensors(student, own, ADAPTER)
    origin = Path(source).name if Path(source).exists() else str(source)
    note_provenance(student, {"imported_from": origin, "imported_format": foreign.format})
    return student


def _check_settings(config: Mapping[str, Any], dtype: str) -> None:
    known = BitDistillerConfig.__dataclass_fields__
    for name in config:
        if name not in known:
            raise UnknownNameError("config", name, known)
        if name in _DETERMINED:
            raise ConfigError(
                f"`{name}` must be left to the checkpoint: got {name}={config[name]!r}. Leave it out; for other codes, "
                "quantize the full-precision model with get_bitdistiller_model()."
            )
    if config.get("learn_scale", True) is not True:
        raise ConfigError(
            "`learn_scale` must be True for an imported model: got learn_scale=False, with which scales follow from "
            "the weights and would be others than the published ones. Leave it out; DistillConfig("
            "scale_learning_rate=0) keeps them still."
        )
    if dtype != "auto" and dtype not in SCALE_DTYPES:
        raise ConfigError(f"`dtype` must be 'auto' or one of {list(SCALE_DTYPES)}: got dtype={dtype!r}.")


def _model_under(
    base: str | os.PathLike[str] | nn.Module | None,
    foreign: ForeignModel,
    skeleton: Skeleton,
    weights: Mapping[str, ImportedWeight],
    dtype: str,
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model that stands under the student, and the tensors of which the student needs its own."""
    if base is None:
        return dequantized_model(foreign, skeleton, weights, dtype), {}
    model: nn.Module = (
        base if isinstance(base, nn.Module) else AutoModelForCausalLM.from_pretrained(os.fspath(base), dtype=dtype)
    )
    check_same_model(model, skeleton)
    return model, own_tensors(model, foreign, skeleton, weights)
