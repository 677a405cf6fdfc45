"""transformers' built-in `bitnet` packing, for ternary weights with one scale per matrix and int8 activations.

Four codes share a byte, taken from the four quarters of the output rows. The class `AutoBitLinear` multiplies by the
stored scale (`BitLinear` would divide by its reciprocal, which is not exact), so that is what config.json asks for.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from bitdistiller_peft.errors import ExportError
from bitdistiller_peft.export.affine import cast_exactly, fixed_zero_point, refuse_scales
from bitdistiller_peft.export.files import TensorFile, write_config, write_tensors
from bitdistiller_peft.export.formats import ExportFormat, ForeignTensor, ForeignWeight, Options
from bitdistiller_peft.export.source import PackedSource, PackedWeight


def _refuse_model(source: PackedSource, options: Options) -> str | None:
    for weight in source.weights():
        reason = refuse_scales(weight, source.dtype)
        if reason is not None:
            return f"layer {weight.layer!r}: {reason}, the dtype in which transformers holds it"
    return None


def _refuse(weight: PackedWeight, options: Options) -> str | None:
    grid = weight.spec.grid
    if grid.num_levels != 3 or fixed_zero_point(grid) != 1:
        return f"grid {grid.name!r} is not ternary"
    if weight.params.scale.numel() != 1:
        return f"it has {weight.params.scale.numel()} scales, not one. Train with group_size='tensor'"
    if weight.is_transposed or weight.out_features % 4:
        return "it is no linear layer with a multiple of 4 outputs"
    return None


def _write(source: PackedSource, folder: Path, options: Options) -> None:
    tensors = dict(source.plain())
    for weight in source.weights():
        quarters = torch.unflatten(weight.codes, 0, (4, -1)).unbind(0)
        tensors[weight.name] = quarters[0] | (quarters[1] << 2) | (quarters[2] << 4) | (quarters[3] << 6)
        scale = cast_exactly(weight.params.scale, source.dtype)
        if scale is None:
            raise ExportError(f"layer {weight.layer!r} must have a scale in the model's dtype.")
        tensors[f"{weight.layer}.weight_scale"] = scale.reshape(1)
    section = {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "offline",
        "modules_to_not_convert": list(source.quant_config.modules_to_not_convert or []),
    }
    write_tensors(folder, tensors)
    write_config(source, folder, {"quantization_config": section})


def _read(source: PackedSource, folder: Path) -> Iterator[ForeignWeight | ForeignTensor]:
    from transformers.integrations.bitnet import unpack_weights

    file = TensorFile(folder)
    for name in source.quantized_names:
        words = file.get(name, torch.uint8)
        with torch.compiler.set_stance("force_eager"):  # the library compiles it, which takes longer than running it
            steps = unpack_weights(words, torch.float32)
        scale = file.get(f"{name}_scale").expand(len(steps), 1)
        zero_point = torch.zeros(len(steps), 1, dtype=torch.int16)
        yield ForeignWeight(name, steps * scale.float(), steps.to(torch.int16), scale, zero_point)
    for name, tensor in file.left():
        yield ForeignTensor(name, tensor)


FORMAT = ExportFormat(
    name="bitnet",
    engines="transformers",
    refuse_weight=_refuse,
    refuse_model=_refuse_model,
    write=_write,
    read=_read,
    reader="transformers",
    activation_bits=(8,),
)
