"""`BitDistillerConfig`: what a user says about the student."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from peft import PeftConfig
from peft.utils import PeftType

from bitdistiller_peft.errors import UnknownNameError
from bitdistiller_peft.hub.config import check_packing
from bitdistiller_peft.hub.projections import check_subln_modules, has_subln
from bitdistiller_peft.layers import NO_CHANGE, SUBLN_EPS, InputSpec, Trained, check_subln
from bitdistiller_peft.quantizers import QuantSpec, check_activation_bits
from bitdistiller_peft.recipes import declare_fields, get_recipe
from bitdistiller_peft.recipes.targets import check_target, needed_zero_point_range
from bitdistiller_peft.tuner.card import replace_card_of_peft
from bitdistiller_peft.tuner.rules import check_choices, check_pattern, check_table_bits, table_settings

OVERRIDE_KEYS = ("bits", "grid", "group_size", "scale_dtype", "zero_point_range", "refine", "tied")


@dataclass
class BitDistillerConfig(PeftConfig):
    """Configuration of a quantization-aware student.

    Args:
        bits: code width: 2, 3 or 4; also 8 for the integer grids, 3 and 4 for `"fp"`, 2 alone for `"ternary"` and
            `"r2q"`.
        group_size: weights per scale along the input axis; `-1` for one scale per output row, `"tensor"` for one per
            matrix. It must divide the input width of every targeted layer.
        grid: `"int"` (asymmetric integers), `"int_fine"` (zero points in quarter steps: less error at the same size),
            `"int_sym"`, `"nf"` (NormalFloat with a scale for each sign, AFPQ), `"nf_sym"`, `"fp"` (E2M1, E2M0),
            `"fp_sym"`, `"ternary"` (BitNet; as published with `group_size="tensor"`, `gradient="ste"` and
            `learn_scale=False`) or `"r2q"` (two residual signs); more can be registered with `register_grid`.
        scale_dtype: dtype the scales are stored in: `"float16"`, `"bfloat16"` or `"float32"`.
        zero_point_range: bounds `(low, high)` of the zero points of grid `"int"`; `(1, 2)` at 2 bits makes llama.cpp's
            2-bit formats hold the model exactly.
        refine: how the scales of grid `"r2q"` are refined: `None`, `"least_squares"` or `"alternating"`.
        tied: whether the residual scale of grid `"r2q"` is half the other one, so that formats with a step and an
            offset hold the model exactly.
        gradient: `"exact"` lets gradients also flow through each group's minimum and maximum, or mean, where the scale
            is recomputed from them; `"ste"` does not.
        learn_scale: train the scales (LSQ) instead of recomputing them from the weights on every forward.
        learn_zero_point: train the zero points too; needs `learn_scale` and grid `"int"` or `"int_fine"`.
        trainable: what of a quantized layer is trained: `"all"`; `"quantization"`, scales (and zero points) alone,
            which needs `learn_scale`; or `"lora"`, these and a low-rank update inside the rounding, which becomes codes
            when it is packed. Norms and copies that other options name are trained in any case, and `calibrate`
            changes frozen weights too.
        lora_rank: rank of that update.
        lora_alpha: the update is multiplied by `lora_alpha / lora_rank`, as in PEFT's LoRA.
        master_dtype: dtype of the trained copies: `"float32"`, or `"base"` for the base model's own. bf16 copies lose
            updates smaller than 1/256 of a weight, which is most of them at usual learning rates. (PEFT itself turns
            16-bit adapters into fp32 unless `autocast_adapter_dtype=False` is passed.)
        activation_bits: 8 quantizes the inputs of every targeted layer to int8, one scale per token; `None` does not.
        subln: where a trained root mean square norm is put before a targeted layer (BitNet Distillation): `"none"`,
            `"output"` (output projections of attention and MLP, as in the paper) or `"all"` (as in its released
            code). With it, or with `activation_bits`, the student cannot be merged, only packed.
        subln_eps: added to the mean square by these norms.
        subln_modules: for `subln="output"`: endings of the names of the output projections, e.g.
            `["o_proj", "down_proj"]`; `None` for the usual ones.
        arithmetic: `"released"` rounds and takes ranges as BitDistiller's released code does, to compare results like
            for like (grids `"int"` and `"nf"`, `learn_scale=False`); `DistillConfig` has the same field.
        packing: how `pack_and_unload` lays out codes: `"bitstream"`, or `"base3"` (five codes a byte) for ternary ones.
        train_other: what else is trained, as copies that `disable_adapter()` undoes: `"none"`, `"norms"`, or `"all"`
            (norms, embeddings and output head).
        embedding_bits: code width of the embedding's table, e.g. 8 or 4; `None` leaves it in full precision. It is
            trained and packed like a layer: on grid `"int_sym"` if `grid` is that, else on `"int"`, in groups of
            `group_size`. A head that is tied to it shares the codes.
        head_bits: the same for the output head; for a tied one, the two mean the same.
        overrides: other settings for some layers, by a pattern that must match the end of the module name, e.g.
            `{"down_proj": {"bits": 4}}`; the first match counts.
        target: the engine to serve with: `"vllm"`, `"llama.cpp"`, `"mlx"`, `"onnx"` or `"transformers"`; settings that
            it could not run without quantizing again are refused now, not after training. `"llama.cpp"` also sets
            `zero_point_range=(1, 2)` at 2 bits. `None` for any.
        target_modules: module names (or a regex) to quantize, or `"all-linear"`: every linear layer and fused expert
            module, without the output head and routers.
        exclude_modules: module names (or a regex) to leave alone.
        provenance: what the trainer notes about the run, for the packed model's config: plain values.
        modules_to_save: further modules to train and save whole, as in PEFT.
        layers_to_transform: indices of the layers to quantize; the others stay as they are.
        layers_pattern: name of the layer list, if it is not one of the common ones.

    Raises:
        ConfigError: a value that cannot work; the message says what would.
    """

    bits: int = field(default=2, metadata={"help": "Code width: 2, 3, 4, or 8 for the integer grids."})
    group_size: int | str = field(
        default=128, metadata={"help": "Weights per scale; -1 for one per output row, 'tensor' for one per matrix."}
    )
    grid: str = field(
        default="int", metadata={"help": "What codes stand for, e.g. 'int', 'nf', 'fp', 'ternary', 'r2q'."}
    )
    scale_dtype: str = field(
        default="float16", metadata={"help": "Storage dtype of scales: 'float16', 'bfloat16', 'float32'."}
    )
    zero_point_range: list[int] | None = field(
        default=None, metadata={"help": "Bounds (low, high) of the zero points of grid 'int'."}
    )
    refine: str | None = field(
        default=None, metadata={"help": "Grid 'r2q': refine its scales by 'least_squares' or 'alternating'."}
    )
    tied: bool = field(default=False, metadata={"help": "Grid 'r2q': the residual scale is half the scale."})
    gradient: str = field(
        default="exact", metadata={"help": "'exact' follows the path through min and max or mean, 'ste' does not."}
    )
    learn_scale: bool = field(default=True, metadata={"help": "Train the scales instead of recomputing them."})
    learn_zero_point: bool = field(
        default=False, metadata={"help": "Train the zero points too (grids 'int', 'int_fine')."}
    )
    trainable: str = field(
        default="all", metadata={"help": "'all', 'quantization' (scales alone) or 'lora' (inside the rounding)."}
    )
    lora_rank: int = field(default=16, metadata={"help": "For trainable 'lora': rank of the update."})
    lora_alpha: float = field(
        default=16.0, metadata={"help": "For trainable 'lora': the update is multiplied by lora_alpha / lora_rank."}
    )
    master_dtype: str = field(
        default="float32", metadata={"help": "Dtype of the trained weights: 'float32', or 'base' for the base model's."}
    )
    activation_bits: int | None = field(
        default=None, metadata={"help": "8 for int8 activations with one scale per token."}
    )
    subln: str = field(
        default="none", metadata={"help": "Norms before quantized layers: 'none', 'output' (projections), 'all'."}
    )
    subln_eps: float = field(default=SUBLN_EPS, metadata={"help": "Added to the mean square by these norms."})
    subln_modules: list[str] | None = field(
        default=None, metadata={"help": "For subln 'output': endings of the names of the output projections."}
    )
    arithmetic: str = field(
        default="default", metadata={"help": "'released' computes as BitDistiller's released code does."}
    )
    packing: str = field(
        default="bitstream", metadata={"help": "Layout of the codes: 'bitstream', or 'base3' for ternary ones."}
    )
    train_other: str = field(
        default="none", metadata={"help": "Also train copies of: 'none', 'norms', 'all' (norms, embeddings, head)."}
    )
    embedding_bits: int | None = field(
        default=None, metadata={"help": "Code width of the embedding's table, e.g. 8 or 4; None leaves it alone."}
    )
    head_bits: int | None = field(
        default=None, metadata={"help": "Code width of the output head; a tied one has the embedding's."}
    )
    overrides: dict[str, dict[str, Any]] = field(
        default_factory=dict, metadata={"help": "Settings for some layers, by the end of the module name."}
    )
    provenance: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "What the trainer notes about the run; plain values."}
    )
    target: str | None = field(
        default=None, metadata={"help": "Engine to serve with: 'vllm', 'llama.cpp', 'mlx', 'onnx', 'transformers'."}
    )
    target_modules: list[str] | str | None = field(
        default="all-linear", metadata={"help": "Names or regex of the modules to quantize, or 'all-linear'."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or regex of modules to leave alone."}
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Not used: fused experts are targeted as modules."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train and save whole beside the quantized ones."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to quantize."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the layer list, e.g. 'layers'."}
    )

    @classmethod
    def from_recipe(cls, name: str, *, preset: str = "balanced", **overrides: Any) -> Self:
        """Build the configuration of a named system.

        Args:
            name: a recipe's name, e.g. `"bitdistiller"`; `get_recipe` shows all of it.
            preset: `"fast"`, `"balanced"` or `"max"`.
            overrides: other values; those that only `DistillConfig` has are left to it, so that both can be given the
                same.

        Raises:
            UnknownNameError: no such recipe or preset.
            ConfigError: an override that neither class has, or a value that cannot work.
        """
        return cls(**get_recipe(name, preset, **overrides).model)

    def __post_init__(self) -> None:
        """Check every value now, so that nothing is refused half-way through a model."""
        super().__post_init__()
        self.peft_type = PeftType("BITDISTILLER")
        self.table_bits: dict[str, int] = {}  # of the embedding and the head of the model at hand, by name
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, (list, tuple)) else value)
        if isinstance(self.zero_point_range, tuple):
            self.zero_point_range = list(self.zero_point_range)
        check_choices(self)
        check_activation_bits(self.activation_bits)
        check_subln(self.subln, self.subln_eps)
        check_subln_modules(self.subln, self.subln_modules)
        check_packing(self.spec(), self.packing)
        check_table_bits(self)
        for pattern, override in self.overrides.items():
            check_pattern(pattern)
            self._spec_with(pattern, override, {key: getattr(self, key) for key in OVERRIDE_KEYS})
        if self.target is not None:
            self.zero_point_range = self.zero_point_range or needed_zero_point_range(self, self.target)
            check_target(self, self.target)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save as PEFT does, last of all that it saves, and give the folder a model card.

        Args:
            save_directory: folder of the adapter.
            kwargs: further arguments of `PeftConfig.save_pretrained`.
        """
        super().save_pretrained(save_directory, **kwargs)
        replace_card_of_peft(Path(save_directory), self)

    def trained(self, spec: QuantSpec) -> Trained:
        """Which tensors of a weight are trained.

        Args:
            spec: how the weight is quantized.
        """
        return Trained(
            scale=self.learn_scale,
            zero_point=self.learn_zero_point and spec.grid.has_zero_point,
            weight=self.trainable == "all",
            lora_rank=self.lora_rank if self.trainable == "lora" else 0,
            lora_alpha=self.lora_alpha,
        )

    def spec(self, module_name: str | None = None) -> QuantSpec:
        """How the weight of a module is quantized.

        Args:
            module_name: dotted name; `None` for the settings without overrides.

        Raises:
            ConfigError: a value outside its rule, or an unknown key in `overrides`.
        """
        common = {key: getattr(self, key) for key in OVERRIDE_KEYS}
        if module_name in self.table_bits:
            common |= table_settings(self.grid, self.table_bits[module_name])
        for pattern, override in self.overrides.items():
            if module_name is not None and re.search(rf"(^|\.)(?:{pattern})$", module_name):
                return self._spec_with(pattern, override, common)
        return self._spec_with("", {}, common)

    def inputs(self, module_name: str) -> InputSpec:
        """What happens to the inputs of a module before they are multiplied.

        Args:
            module_name: dotted name of a targeted layer.
        """
        if module_name in self.table_bits:
            return NO_CHANGE
        is_normed = has_subln(module_name, self.subln, self.subln_modules)
        return InputSpec(self.activation_bits, self.subln_eps if is_normed else None)

    def _spec_with(self, pattern: str, override: dict[str, Any], common: dict[str, Any]) -> QuantSpec:
        unknown = sorted(set(override) - set(OVERRIDE_KEYS))
        if unknown:
            raise UnknownNameError(f"overrides[{pattern!r}]", unknown[0], OVERRIDE_KEYS)
        values = common | override
        values |= {"gradient": self.gradient, "arithmetic": self.arithmetic}
        spec = QuantSpec.create(values.pop("grid"), values.pop("bits"), **values)
        return spec.packed_as(self.packing)


declare_fields("model", [item.name for item in fields(BitDistillerConfig)])
