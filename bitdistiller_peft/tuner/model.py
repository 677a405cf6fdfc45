"""`BitDistillerModel`: injects the overlays, and ends their life as packed or merged weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper, PeftType
from torch import nn

from bitdistiller_peft.errors import BitDistillerError, ConfigError, TargetError, UnknownNameError, add_location
from bitdistiller_peft.tuner.config import BitDistillerConfig
from bitdistiller_peft.tuner.layer import PREFIX, BitDistillerLayer
from bitdistiller_peft.tuner.overlays import overlay
from bitdistiller_peft.tuner.pack import pack_model
from bitdistiller_peft.tuner.tables import resolve_tables, tie_head
from bitdistiller_peft.tuner.targets import (
    check_engine,
    check_model,
    check_not_wrapped,
    check_targets,
    other_modules,
    resolve_targets,
)


class BitDistillerModel(BaseTuner):
    """A model whose targeted layers are overlaid by trainable fake-quantized ones.

    Args:
        model: a transformers model (or any `nn.Module` with linear layers).
        config: a `BitDistillerConfig`, or several by adapter name.
        adapter_name: name of the first adapter.
        kwargs: further arguments of PEFT's `BaseTuner`.

    Raises:
        StateError, TargetError, GroupSizeError, WeightError: the model does not suit; the layer is named.
    """

    prefix: str = PREFIX
    tuner_layer_cls = BitDistillerLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  (PEFT's own form)

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, **kwargs: Any) -> None:
        check_not_wrapped(model, adapter_name)
        known: dict[str, Any] = getattr(model, "peft_config", {})
        before = dict(known)
        try:
            super().__init__(model, peft_config, adapter_name, **kwargs)
        except Exception:  # PEFT enters the adapter in the model's list first
            known.clear()
            known.update(before)
            raise

    def _prepare_model(self, peft_config: BitDistillerConfig, model: nn.Module) -> None:
        check_model(model)
        resolve_tables(peft_config, model)
        resolve_targets(peft_config, model)
        check_engine(peft_config, model)
        check_targets(peft_config, model)
        if others := other_modules(peft_config, model):
            peft_config.modules_to_save = sorted({*(peft_config.modules_to_save or []), *others})

    def _check_new_adapter_config(self, config: BitDistillerConfig) -> None:
        super()._check_new_adapter_config(config)
        if config.peft_type != PeftType("BITDISTILLER"):
            raise TargetError(
                f"all adapters of this model must be of type BITDISTILLER: got {config.peft_type}. Call "
                "merge_and_unload() or pack_and_unload() first, then add the other adapter."
            )

    def _create_and_replace(
        self,
        peft_config: BitDistillerConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        spec = peft_config.spec(current_key)
        try:
            layer = overlay(target)
            layer.update_layer(
                adapter_name,
                spec,
                trained=peft_config.trained(spec),
                inputs=peft_config.inputs(current_key),
                master_dtype=torch.float32 if peft_config.master_dtype == "float32" else None,
                inference_mode=peft_config.inference_mode,
            )
        except BitDistillerError as error:
            raise add_location(error, f"layer {current_key!r}") from None
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)
        tie_head(self.model, current_key, layer)

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        # PEFT knows target_modules only, and would save an embedding in full precision if it stood there
        return key in peft_config.table_bits or BaseTuner._check_target_module_exists(peft_config, key)

    def _get_tied_target_modules(self, model: nn.Module) -> list[str]:
        return []  # no reason to warn: what is tied shares one student, or was refused

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own version copies the float weight over whatever the new module holds
        setattr(parent, child_name, new_module)
        if isinstance(new_module, BitDistillerLayer):
            adapter_names: list[str] = new_module._all_available_adapter_names()  # type: ignore[operator]
            for adapter_name in adapter_names:
                new_module._move_adapter_to_device_of_base_layer(adapter_name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT drops the argument without a word for methods that do not implement this hook
        if kwargs.get("adapter_names") is not None:
            raise ConfigError(
                f"`adapter_names` must not be passed to forward: got {kwargs['adapter_names']!r}. Adapters cannot be "
                "mixed in a batch; choose one with set_adapter()."
            )
        yield

    def pack_and_unload(self, progressbar: bool = True) -> nn.Module:
        """Turn the active adapter into packed codes and return the base model that holds them.

        What is packed is bit for bit what the forward pass used. The returned model saves, reloads and generates like
        any transformers model; this one is used up, as after `merge_and_unload`.

        Args:
            progressbar: show progress on models that take more than a moment.

        Raises:
            StateError: the adapter is merged or disabled, or nothing is active.
            WeightError: a trained weight is not finite, or a scale cannot be stored; the layer is named. The model is
                then unchanged.
        """
        return pack_model(self.model, self.student_layers(), progressbar=progressbar)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Write the fake-quantized values into the base layers as floats and return the plain model (PEFT's meaning).

        Args:
            progressbar: show progress.
            safe_merge: refuse to write values that are not finite.
            adapter_names: at most one name; the active adapter by default.

        Raises:
            UnknownNameError: no adapter has this name.
            StateError: several names, another adapter is merged already, or the student has `SubLN` norms or int8
                activations, which a float model has no place for.
        """
        for name in adapter_names or []:
            if name not in self.peft_config:
                raise UnknownNameError("adapter_names", name, self.peft_config)
        if adapter_names and len(adapter_names) == 1 and adapter_names != self.active_adapters:
            self.set_adapter(adapter_names[0])  # PEFT keeps the active adapter's trained norms, whatever it merges
        self._check_mergeable()
        merged: nn.Module = super().merge_and_unload(progressbar, safe_merge, adapter_names)
        return merged

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Write the fake-quantized values into the base layers, as PEFT's `merge_adapter` does, but all or none.

        Args:
            adapter_names: at most one name; the active adapter by default.
            safe_merge: refuse to write values that are not finite.

        Raises:
            StateError: see `merge_and_unload`.
        """
        self._check_mergeable(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _check_mergeable(self, adapter_names: list[str] | None = None) -> None:
        for name, layer in self.student_layers():
            for adapter_name in adapter_names or layer.active_adapters:  # type: ignore[union-attr]
                try:
                    layer.check_mergeable(adapter_name)
                except BitDistillerError as error:
                    raise add_location(error, f"layer {name!r}") from None

    def unload(self) -> nn.Module:
        """Return the full-precision model as it was before the student, its own norms, embeddings and head included."""
        self.unmerge_adapter()
        wrappers = [(name, m) for name, m in self.model.named_modules() if isinstance(m, ModulesToSaveWrapper)]
        for name, wrapper in wrappers:
            self.model.set_submodule(name, wrapper.original_module)  # PEFT itself would leave the trained copy
        plain: nn.Module = super().unload()
        return plain

    def student_layers(self) -> list[tuple[str, BitDistillerLayer]]:
        """The overlaid layers, by their name in the base model, in order."""
        return [(name, m) for name, m in self.model.named_modules() if isinstance(m, BitDistillerLayer)]
