"""Calibrate and pack a model that does not fit in memory: one decoder block at a time is read, fitted and packed.

In memory at any time: embeddings, norms and head; the hidden states of the calibration text; one block in full
precision, with its master weights; and what is packed already, an eighth or so of its full-precision size.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, remove_hook_from_submodules
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bitdistiller_peft.calibration.blocks import BlockRunner, find_blocks
from bitdistiller_peft.calibration.gptq_sweep import GptqSweep, check_slots
from bitdistiller_peft.calibration.options import ClipOptions, GptqOptions, make_options
from bitdistiller_peft.calibration.result import CalibrationResult
from bitdistiller_peft.calibration.slots import Display, slots_of
from bitdistiller_peft.calibration.sweep import Segment, Sweep, result_of, run_block
from bitdistiller_peft.calibration.texts import batches_of, check_length, token_windows
from bitdistiller_peft.errors import BitDistillerError, ConfigError, add_location
from bitdistiller_peft.hub.convert import convertible
from bitdistiller_peft.hub.heap import return_freed_memory
from bitdistiller_peft.hub.projections import check_projections
from bitdistiller_peft.tuner import BitDistillerConfig, BitDistillerLayer
from bitdistiller_peft.tuner.overlays import overlay
from bitdistiller_peft.tuner.pack import Packed, describe_packed, pack_layer, put_in_place
from bitdistiller_peft.tuner.targets import check_engine, is_target, resolve_targets

METHODS = ("clip", "gptq")
_ADAPTER = "default"


@dataclass(frozen=True)
class _Block:
    """A decoder block on disk: its name and those of the layers to quantize."""

    name: str
    targets: list[str]


def pack_from_disk(
    model: str | os.PathLike[str],
    tokenizer: Any,
    texts: Iterable[str] | Tensor,
    *,
    config: BitDistillerConfig | None = None,
    method: str = "clip",
    num_samples: int = 128,
    seq_len: int = 512,
    batch_size: int = 8,
    scratch_dir: str | os.PathLike[str] | None = None,
    show_progress: bool = True,
    load_kwargs: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[PreTrainedModel, CalibrationResult]:
    """Calibrate and pack a model block by block, as `calibrate` and `pack_and_unload` would, without ever loading it.

    The codes are those that `get_bitdistiller_model`, `calibrate` and `pack_and_unload` give, bit for bit. Nothing is
    left to train: for that, the student must be in memory.

    Args:
        model: folder or Hub name of the full-precision model.
        tokenizer: the model's tokenizer; `None` for token ids.
        texts: as for `calibrate`.
        config: how to quantize; as for `get_bitdistiller_model`.
        method: `"clip"` or `"gptq"`, which look at one block at a time.
        num_samples: windows at most.
        seq_len: tokens in a window. All hidden states, ``num_samples * seq_len * width``, are kept in memory.
        batch_size: windows run at once.
        scratch_dir: where weights are put that the files hold in another form, as those of fused experts are; a
            temporary folder by default. It must be on a disk.
        show_progress: show a bar.
        load_kwargs: for `from_pretrained`, e.g. ``{"dtype": "float32"}``.
        options: the fields of `ClipOptions` or `GptqOptions`.

    Returns:
        The packed model, in memory, and what was found.

    Raises:
        ConfigError: another method, or a model that cannot be run block by block.
        TargetError: nothing to quantize, or a target outside of the decoder's blocks.
        DataError: too little text, or activations that are not finite.
        GroupSizeError, WeightError, ScaleRangeError: a layer does not suit; it is named.

    Example:
        >>> packed, result = pack_from_disk("folder", tokenizer, texts)  # doctest: +SKIP
        >>> packed.save_pretrained("packed")  # doctest: +SKIP
    """
    if method not in METHODS:
        raise ConfigError(
            f"`method` must be one of {METHODS} for a model that stays on disk: got method={method!r}. The others "
            "need the student in memory: load it, and call calibrate()."
        )
    chosen: Any = make_options(method, options)
    config = copy.deepcopy(BitDistillerConfig() if config is None else config)
    if config.embedding_bits is not None or config.head_bits is not None:
        raise ConfigError(
            "`embedding_bits` and `head_bits` must be None for a model that stays on disk: got "
            f"{config.embedding_bits} and {config.head_bits}. Only the layers of its blocks are packed."
        )
    windows = token_windows(texts, tokenizer, num_samples, seq_len)
    with tempfile.TemporaryDirectory(dir=scratch_dir) as scratch, torch.no_grad():
        base, list_name = _on_disk(str(model), scratch, load_kwargs or {})
        check_length(base, windows.shape[1])
        blocks = _plan(base, config, list_name)
        chosen.check_skip([name for block in blocks for name in block.targets])
        batches = batches_of(windows, batch_size, base.get_input_embeddings().weight.device)
        sweep, specs, packed = _stream(base, blocks, batches, config, chosen, show_progress)
        _forget_disk(base)
    result = result_of(sweep, specs, [], method, windows)
    seen = {"calibration": method, "calibration_data": result.data["tokens_sha256"]}
    describe_packed(base, packed, {"base_model": str(model), **seen})
    return base.requires_grad_(False), result


def _on_disk(name: str, scratch: str, load_kwargs: dict[str, Any]) -> tuple[PreTrainedModel, str]:
    """Load everything but the decoder's blocks; also gives the name of their list."""
    wanted = {key: value for key, value in load_kwargs.items() if key == "revision"}
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name, **wanted))
    found = find_blocks(skeleton, [module for _, module in convertible(skeleton)])
    if found is None:
        raise ConfigError(f"`model` must have decoder blocks in a list: got {type(skeleton).__name__} without one.")
    places = dict(_places(skeleton, "", found[0]))
    options = {"dtype": "auto", **load_kwargs, "device_map": places, "offload_folder": scratch}
    return AutoModelForCausalLM.from_pretrained(name, **options).eval(), found[0]


def _places(module: nn.Module, prefix: str, blocks: str) -> Iterator[tuple[str, str]]:
    for child_name, child in module.named_children():
        name = f"{prefix}{child_name}"
        if name == blocks:
            yield name, "disk"
        elif blocks.startswith(f"{name}."):
            yield from _places(child, f"{name}.", blocks)
        else:
            yield name, "cpu"


def _plan(base: PreTrainedModel, config: BitDistillerConfig, list_name: str) -> list[_Block]:
    resolve_targets(config, base)
    check_engine(config, base)
    targets = [name for name, _ in convertible(base) if is_target(config, name)]
    check_projections(targets, config.subln, config.subln_modules)
    inside = [name for name in targets if name.startswith(f"{list_name}.")]
    if not inside or len(inside) < len(targets):
        outside = sorted(set(targets) - set(inside))
        raise ConfigError(
            f"`target_modules` must name layers of the decoder's blocks ({list_name}) for a model that stays on disk: "
            f"got {outside or 'none'}. Leave others out with exclude_modules."
        )
    names = [f"{list_name}.{number}" for number in range(len(base.get_submodule(list_name)))]
    return [_Block(name, [target for target in inside if target.startswith(f"{name}.")]) for name in names]


def _stream(
    base: PreTrainedModel,
    blocks: Sequence[_Block],
    batches: list[Tensor],
    config: BitDistillerConfig,
    options: ClipOptions,
    show_progress: bool,
) -> tuple[Sweep, dict[str, dict[str, Any]], list[Packed]]:
    runner = BlockRunner.create(base, [base.get_submodule(t) for block in blocks for t in block.targets], batches[0])
    if runner is None:
        raise ConfigError(
            f"`model` must be one that can be run block by block: got {type(base).__name__}. Load it, and call "
            "calibrate()."
        )
    specs: dict[str, dict[str, Any]] = {}
    packed: list[Packed] = []
    kind = GptqSweep if isinstance(options, GptqOptions) else Sweep
    with Display() as display, tqdm(total=len(blocks), desc="Packing", unit="block", disable=not show_progress) as bar:
        sweep = kind(options, len(batches), display, lambda name: None)  # type: ignore[arg-type]
        hidden = runner.record(batches)
        for number, block in enumerate(blocks):
            layers = _read(base, block, config)
            slots = [slot for name, layer in layers for slot in slots_of(name, layer)]
            check_slots(slots, options)
            specs |= {slot.name: slot.spec.to_dict() for slot in slots}
            run = partial(run_block, runner, number, hidden)
            sweep.give_up(sweep.search(Segment(block.name, slots, run)))
            for index, states in enumerate(hidden):
                hidden[index] = runner.run(number, index, states)
            display.clear()
            sweep.apply(slots)
            entries = [entry for name, layer in layers for entry in pack_layer(name, layer)]
            for entry in entries:
                put_in_place(base, entry)
            packed += entries
            del layers, slots, run
            return_freed_memory()
            bar.update()
    return sweep, specs, packed


def _read(base: PreTrainedModel, block: _Block, config: BitDistillerConfig) -> list[tuple[str, BitDistillerLayer]]:
    """Bring one block into memory, for good, and overlay its targets."""
    place = base.get_input_embeddings().weight.device
    whole = base.get_submodule(block.name)
    for module in whole.modules():
        hook = getattr(module, "_hf_hook", None)
        if not isinstance(hook, AlignDevicesHook) or hook.weights_map is None:
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:  # copied: else the whole file would stay mapped for it
                values = hook.weights_map[name].to(place, copy=True)
                module._parameters[name] = nn.Parameter(values, requires_grad=False)
    _unhook(whole)
    layers = []
    for name in block.targets:
        layer = overlay(base.get_submodule(name))
        spec = config.spec(name)
        try:
            layer.update_layer(
                _ADAPTER, spec, trained=config.trained(spec), inputs=config.inputs(name), inference_mode=True
            )
        except BitDistillerError as error:
            raise add_location(error, f"layer {name!r}") from None
        base.set_submodule(name, layer)
        layers.append((name, layer))
    return layers


def _unhook(module: nn.Module) -> None:
    """Take accelerate's hooks off; the forward that it leaves on every instance would hide that of a packed class."""
    remove_hook_from_submodules(module)
    for inner in module.modules():
        inner.__dict__.pop("forward", None)


def _forget_disk(base: PreTrainedModel) -> None:
    """Make an ordinary model of it: nothing is on disk any more."""
    _unhook(base)
    base.__dict__.pop("hf_device_map", None)
