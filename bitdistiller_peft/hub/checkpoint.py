"""What loading checks: the header before memory is spent, the values after they are there."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from bitdistiller_peft.errors import BitDistillerError, CheckpointError
from bitdistiller_peft.hub.files import check_index, check_place
from bitdistiller_peft.hub.header import AGAIN, Entry, read_header
from bitdistiller_peft.hub.manifest import MANIFEST_NAME, verify_files
from bitdistiller_peft.layers import (
    INPUT_NORM,
    SCALE_RESIDUAL,
    SUFFIXES,
    ZERO_POINT,
    companion,
    input_norm,
    iter_quantized,
    packed_layout,
)
from bitdistiller_peft.packing import check_row, check_tail, unpack_row
from bitdistiller_peft.quantizers import QuantSpec, check_residual_scale, check_scale

OnDisk = dict[str, tuple[str, Entry]]

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_FLOATS = {"F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2"}
_DTYPES = {"I32": torch.int32, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def check_files(files: list[str] | None, source: str, verify: Literal["fast", "full", "none"]) -> None:
    """Verify checksums, or say once that there are none.

    Args:
        files: the checkpoint's files.
        source: where they come from: a folder, or a name on the Hub.
        verify: what to compare.

    Raises:
        CheckpointError: a file lies outside the folder, is no safetensors file, or is not what its index says.
        ChecksumError, CheckpointError: see `verify_files`.
    """
    paths = [Path(file) for file in files or []]
    if not paths:
        return
    for path in paths:
        if path.suffix != ".safetensors":
            raise CheckpointError(
                f"the weights must be safetensors: got {path.name}. Quantized weights are read from nothing else; "
                "leave use_safetensors as it is, and save the model again with bitdistiller_peft."
            )
        check_place(path, Path(source) if Path(source).is_dir() else path.parent)
        read_header(path)
    home = paths[0].parent
    if paths[0].name != SAFE_WEIGHTS_NAME and (home / SAFE_WEIGHTS_INDEX_NAME).is_file():
        check_index(home)
    if verify == "none":
        warnings.warn("Loading without verification (verify='none'): damage would go unnoticed.", stacklevel=2)
        return
    _fetch_manifest(paths[0])
    if not verify_files(paths, mode=verify):
        warnings.warn(
            f"{MANIFEST_NAME} is missing beside {paths[0].name}: the weights load unverified. Save the model with "
            "bitdistiller_peft to write it.",
            stacklevel=2,
        )


def _fetch_manifest(weights: Path) -> None:
    """Bring the manifest of a model on the Hub beside its weights: `from_pretrained` fetches only what it knows."""
    repo, _, inside = str(weights.parent).rpartition(f"{os.sep}snapshots{os.sep}")
    name = Path(repo).name
    if not name.startswith("models--") or (weights.parent / MANIFEST_NAME).exists():
        return
    commit, *subfolder = Path(inside).parts
    try:
        hf_hub_download(
            name.removeprefix("models--").replace("--", "/"),
            MANIFEST_NAME,
            subfolder="/".join(subfolder) or None,
            revision=commit,
            cache_dir=Path(repo).parent,
        )
    except (OSError, ValueError):  # no such file, no network, no access: said by the caller
        return


def check_headers(model: nn.Module, files: list[str] | None, in_features: dict[str, int]) -> dict[str, str]:
    """Compare shapes and dtypes on disk with what the converted model needs.

    Args:
        model: converted, still on the meta device.
        files: the checkpoint's files.
        in_features: input width of every packed parameter, by full name.

    Returns:
        The file that holds each tensor, by the tensor's name on disk.

    Raises:
        CheckpointError: a tensor has another shape or dtype, or a companion of a packed weight is missing.
    """
    on_disk: OnDisk = {}
    for path in map(Path, files or []):
        if path.suffix == ".safetensors":
            on_disk |= {name: (path.name, entry) for name, entry in read_header(path)[0].items()}
    for module_name, module, name, spec in iter_quantized(model):
        full_name = f"{module_name}.{name}"
        if full_name in in_features:
            shape = (*getattr(module, name).shape[:-1], in_features[full_name])
            _check_layout(full_name, packed_layout(spec, shape), spec, on_disk)
        _check_no_stray_norm(module_name, module, on_disk)
    for name, parameter in model.named_parameters():
        if name in on_disk:
            _check_plain(name, parameter, on_disk)
    if _is_whole(model):
        _check_left_over(model, on_disk)
    return {name: file for name, (file, _) in on_disk.items()}


def _is_whole(model: nn.Module) -> bool:
    """Whether the model is of the class that was saved; another one may lack a head, or have a new one."""
    return type(model).__name__ in (getattr(model.config, "architectures", None) or ())


def _check_left_over(model: nn.Module, on_disk: OnDisk) -> None:
    """Refuse layers that the model does not have; other names that it does not know may be renamed while loading."""
    known = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    kinds = {_NUMBER.sub("", name) for name in known}
    for name, (file, _) in on_disk.items():
        if name not in known and _NUMBER.sub("", name) in kinds:
            raise CheckpointError(
                f"{file} must hold no tensor {name!r}: the model that config.json describes has none. config.json and "
                "weights do not belong together; download both again."
            )


def _check_layout(
    full_name: str, layout: dict[str, tuple[tuple[int, ...], torch.dtype]], spec: QuantSpec, on_disk: OnDisk
) -> None:
    holder = next((on_disk[full_name + suffix][0] for suffix in layout if full_name + suffix in on_disk), None)
    if holder is None:
        return  # a name that differs on disk is checked by shape while loading, and by value afterwards
    for suffix in set(SUFFIXES) - layout.keys():
        if full_name + suffix in on_disk:
            raise CheckpointError(
                f"{holder} must not hold tensor {full_name + suffix!r}: grid {spec.grid.name!r} has none. "
                "config.json and weights do not belong together; download both again."
            )
    for suffix, (expected_shape, expected_dtype) in layout.items():
        if full_name + suffix not in on_disk:
            raise CheckpointError(
                f"{holder} must hold tensor {full_name + suffix!r}: it is missing. The file is incomplete; "
                "download it again."
            )
        _check_entry(full_name + suffix, on_disk, expected_shape, expected_dtype)


def _check_no_stray_norm(module_name: str, module: nn.Module, on_disk: OnDisk) -> None:
    """Gains that config.json knows nothing of would be left out, and the model would be another one."""
    name = f"{module_name}.{INPUT_NORM}.weight"
    if name in on_disk and input_norm(module) is None:
        raise CheckpointError(
            f"{on_disk[name][0]} must not hold tensor {name!r}: config.json gives the layer no SubLN. config.json and "
            "weights do not belong together; download both again."
        )


def _check_entry(name: str, on_disk: OnDisk, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    file, entry = on_disk[name]
    found_dtype = _DTYPES.get(str(entry["dtype"]), entry["dtype"])
    if tuple(entry["shape"]) != shape or found_dtype != dtype:
        raise CheckpointError(
            f"tensor {name!r} in {file} must have shape {list(shape)} and dtype {dtype}: got {entry['shape']} and "
            f"{found_dtype}. config.json and weights do not belong together, or one is damaged; download both again."
        )


def _check_plain(name: str, parameter: Tensor, on_disk: OnDisk) -> None:
    """A tensor that is not quantized may change its dtype on the way, but neither its shape nor its kind."""
    file, entry = on_disk[name]
    is_float = str(entry["dtype"]) in _FLOATS
    if tuple(entry["shape"]) != tuple(parameter.shape) or is_float != parameter.is_floating_point():
        raise CheckpointError(
            f"tensor {name!r} in {file} must have shape {list(parameter.shape)} and hold "
            f"{'floating-point numbers' if parameter.is_floating_point() else 'integers'}: got {entry['shape']} and "
            f"{entry['dtype']}. config.json and weights do not belong together; download both again."
        )


def check_values(model: nn.Module, in_features: dict[str, int], files: dict[str, str] | None = None) -> None:
    """Refuse tensors whose values no saving can have produced.

    Args:
        model: loaded; parameters on the meta device (offloaded) are skipped.
        in_features: input width of every packed parameter, by full name.
        files: the file that holds each tensor, as from `check_headers`; `None` if the model came from no quantized
            checkpoint, whose weights without quantization are then not ours to judge.

    Raises:
        CheckpointError: a tensor is missing or not finite, a scale is not usable, a code stands for nothing, or unused
            bits are set; file and tensor are named.
    """
    quantized: set[str] = set()
    for module_name, module, name, spec in iter_quantized(model):
        full_name = f"{module_name}.{name}"
        quantized |= {full_name + suffix for suffix in ("", *SUFFIXES)}
        tensors = {name + s: companion(module, name, s) for s in ("", *SUFFIXES)}
        present = {key: tensor for key, tensor in tensors.items() if tensor is not None and not tensor.is_meta}
        for key, tensor in {**present, **dict(module.named_parameters(recurse=False))}.items():  # and the bias
            _check_loaded(f"{module_name}.{key}", tensor)
        if full_name in in_features:
            try:
                check_packed(present, name, spec, in_features[full_name])
            except BitDistillerError as error:
                where = f" in {files[full_name]}" if files and full_name in files else ""
                raise CheckpointError(
                    f"tensor {full_name!r}{where} must hold what packing writes: {error} {AGAIN}"
                ) from None
    if files is not None:
        is_whole = _is_whole(model)
        for name, parameter in model.named_parameters():
            if is_whole and not parameter.is_meta:
                _check_loaded(name, parameter)
            if name in files and name not in in_features:
                _check_finite(name, parameter, files[name])


def _check_loaded(name: str, tensor: Tensor) -> None:
    if not getattr(tensor, "_is_hf_initialized", False):
        raise CheckpointError(f"the checkpoint must hold tensor {name!r}: it is missing. Download it again.")


def _check_finite(name: str, tensor: Tensor, file: str) -> None:
    if tensor.is_floating_point() and not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(
            f"tensor {name!r} in {file} must be finite: got NaN or Inf in it. The file is damaged, or the training "
            "was; download or train the model again."
        )


def check_packed(tensors: dict[str, Tensor], name: str, spec: QuantSpec, in_features: int) -> None:
    """Refuse values of a packed weight and its companions that no packing can have produced.

    Args:
        tensors: the words and what belongs to them, by name: `name` and `name` with a suffix.
        name: the weight's name.
        spec: how it was quantized.
        in_features: its input width.

    Raises:
        ScaleRangeError, WeightError, CheckpointError: a scale is not usable, a code stands for nothing, or unused bits
            are set.
    """
    for key, tensor in tensors.items():
        if key == name + SCALE_RESIDUAL:
            check_residual_scale(tensor)
        elif tensor.is_floating_point():
            check_scale(tensor, allow_zero=spec.grid.has_negative_scale)
    if name in tensors:
        _check_codes(tensors[name], spec, in_features)
    if name + ZERO_POINT in tensors:
        groups = spec.param_shape((1, in_features))[-1]
        check_tail(tensors[name + ZERO_POINT], spec.grid.bits, groups)


def _check_codes(words: Tensor, spec: QuantSpec, in_features: int) -> None:
    check_row(words, spec.grid.bits, in_features, spec.packing)
    if spec.grid.num_levels < 1 << spec.grid.bits:
        top = int(unpack_row(words, spec.grid.bits, in_features, spec.packing).max())
        if top >= spec.grid.num_levels:
            raise CheckpointError(
                f"codes must lie in 0..{spec.grid.num_levels - 1} on grid {spec.grid.name!r}: got {top}. The file is "
                "damaged or was written by another tool; download it again."
            )
