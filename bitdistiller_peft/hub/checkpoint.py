"""What loading checks: the header before memory is spent, the values after they are there."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor, nn

from bitdistiller_peft.errors import BitDistillerError, CheckpointError
from bitdistiller_peft.hub.manifest import MANIFEST_NAME, read_header, verify_files
from bitdistiller_peft.layers import SUFFIXES, ZERO_POINT, companion, iter_quantized, packed_layout
from bitdistiller_peft.packing import check_tail
from bitdistiller_peft.quantizers import QuantSpec, check_scale

_DTYPES = {"I32": torch.int32, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def check_files(files: list[str] | None, source: str, verify: Literal["fast", "full", "none"]) -> None:
    """Verify checksums, or say once that there are none.

    Args:
        files: the checkpoint's files.
        source: where they come from: a folder, or a name on the Hub.
        verify: what to compare.

    Raises:
        CheckpointError: a file lies outside the folder, which only a forged index can bring about.
        ChecksumError, CheckpointError: see `verify_files`.
    """
    paths = [Path(file) for file in files or [] if str(file).endswith(".safetensors")]
    if not paths:
        return
    for path in paths:
        # `abspath` leaves links alone, of which the cache of the Hub is made
        inside = os.path.relpath(os.path.abspath(path), os.path.abspath(source))  # noqa: PTH100
        if Path(source).is_dir() and inside.startswith(os.pardir):
            raise CheckpointError(f"the weights must lie in {source}: got {path}. The index is forged; do not use it.")
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


def check_headers(model: nn.Module, files: list[str] | None, in_features: dict[str, int]) -> None:
    """Compare shapes and dtypes on disk with what the converted model needs.

    Args:
        model: converted, still on the meta device.
        files: the checkpoint's files.
        in_features: input width of every packed parameter, by full name.

    Raises:
        CheckpointError: a packed tensor has another shape or dtype, or a companion of a packed weight is missing.
    """
    on_disk: dict[str, tuple[str, dict[str, object]]] = {}
    for file in files or []:
        if str(file).endswith(".safetensors"):
            path = Path(file)
            on_disk |= {name: (path.name, entry) for name, entry in read_header(path)[0].items()}
    for module_name, module, name, spec in iter_quantized(model):
        full_name = f"{module_name}.{name}"
        if full_name not in in_features:
            continue
        shape = (*getattr(module, name).shape[:-1], in_features[full_name])
        layout = packed_layout(spec, shape)
        holder = next((on_disk[full_name + suffix][0] for suffix in layout if full_name + suffix in on_disk), None)
        if holder is None:
            continue  # a name that differs on disk is checked by shape while loading, and by value afterwards
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


def _check_entry(
    name: str, on_disk: dict[str, tuple[str, dict[str, object]]], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    file, entry = on_disk[name]
    found_dtype = _DTYPES.get(str(entry["dtype"]), entry["dtype"])
    if tuple(entry["shape"]) != shape or found_dtype != dtype:  # type: ignore[arg-type]
        raise CheckpointError(
            f"tensor {name!r} in {file} must have shape {list(shape)} and dtype {dtype}: got {entry['shape']} and "
            f"{found_dtype}. config.json and weights do not belong together, or one is damaged; download both again."
        )


def check_values(model: nn.Module, in_features: dict[str, int]) -> None:
    """Refuse packed tensors whose values no packing can have produced.

    Args:
        model: loaded; parameters on the meta device (offloaded) are skipped.
        in_features: input width of every packed parameter, by full name.

    Raises:
        CheckpointError: a tensor is missing, a scale is not usable, or unused bits are set; the tensor is named.
    """
    for module_name, module, name, spec in iter_quantized(model):
        full_name = f"{module_name}.{name}"
        tensors = {name + s: companion(module, name, s) for s in ("", *SUFFIXES)}
        present = {key: tensor for key, tensor in tensors.items() if tensor is not None and not tensor.is_meta}
        for key, tensor in {**present, **dict(module.named_parameters(recurse=False))}.items():  # and the bias
            if not getattr(tensor, "_is_hf_initialized", False):
                raise CheckpointError(
                    f"the checkpoint must hold tensor '{module_name}.{key}': it is missing. Download it again."
                )
        if full_name in in_features:
            try:
                _check_packed(present, name, spec, in_features[full_name])
            except BitDistillerError as error:
                raise CheckpointError(f"tensor {full_name!r} must hold what packing writes: {error}") from None


def _check_packed(tensors: dict[str, Tensor], name: str, spec: QuantSpec, in_features: int) -> None:
    for tensor in tensors.values():
        if tensor.is_floating_point():
            check_scale(tensor, allow_zero=spec.grid.has_negative_scale)
    if name in tensors:
        check_tail(tensors[name], spec.grid.bits, in_features)
    if name + ZERO_POINT in tensors:
        groups = spec.param_shape((1, in_features))[-1]
        check_tail(tensors[name + ZERO_POINT], spec.grid.bits, groups)
