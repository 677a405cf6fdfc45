"""`BitDistillerQuantConfig`: what stands under `quantization_config` in a checkpoint's config.json.

The schema is closed: an unknown key, a wrong type or a value outside its rule is refused, and nothing in it can choose
what code runs.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from bitdistiller_peft._version import library_version
from bitdistiller_peft.errors import ConfigError, UnknownNameError
from bitdistiller_peft.hub.projections import check_subln_modules, has_subln
from bitdistiller_peft.layers import SUBLN_EPS, InputSpec, check_subln
from bitdistiller_peft.packing import PACKINGS
from bitdistiller_peft.quantizers import QuantSpec, check_activation_bits

QUANT_METHOD = "bitdistiller"
FORMAT_VERSION = 1
STATES = ("packed", "latent")
SPEC_KEYS = ("grid", "bits", "group_size", "scale_dtype", "zero_point_range", "refine", "tied")
INSTALL_HINT = "pip install bitdistiller_peft, then `import bitdistiller_peft` before from_pretrained()"
PROVENANCE_TYPES = (str, int, float, bool, type(None))


class BitDistillerQuantConfig(QuantizationConfigMixin):
    """How a model's weights are quantized, for `from_pretrained` and for config.json.

    Args:
        bits: code width.
        group_size: weights per scale along the input axis; -1 for one per output row, ``"tensor"`` for one per matrix.
        grid: what codes stand for, e.g. ``"int"``.
        scale_dtype: storage dtype of the scales.
        zero_point_range: bounds of the zero points of grid ``"int"``, or `None`.
        refine: grid ``"r2q"``: how its scales are refined: `None`, ``"least_squares"`` or ``"alternating"``.
        tied: grid ``"r2q"``: whether the residual scale is half the scale, and not stored.
        state: ``"packed"`` (codes, for inference and LoRA) or ``"latent"`` (float master weights, trained under fake
            quantization by any `Trainer`).
        learn_scale: latent only: train the scales.
        learn_zero_point: latent only: train the zero points.
        gradient: latent only: ``"exact"`` or ``"ste"``.
        modules_to_not_convert: names to leave alone. `None` takes the defaults (output head, routers); what a
            checkpoint stores is always the complete list.
        overrides: settings that differ, by full module name.
        embeddings: packed only: full names of embeddings whose table is packed as well. A head tied to one shares its
            codes.
        activation_bits: 8 for int8 activations with one scale per token, `None` for none.
        subln: which layers have a `SubLN` in front: ``"none"``, ``"output"`` (output projections of attention and
            MLP) or ``"all"``.
        subln_eps: added to the mean square by every `SubLN`.
        subln_modules: for ``"output"``: names or endings of names; `None` for the usual ones. What a checkpoint
            stores is always the complete list.
        packing: layout of the codes: ``"bitstream"``, or ``"base3"`` (five codes a byte) for ternary ones.
        provenance: where the weights come from; plain values only.
        format_version: version of the format.
        written_by: version of the library that wrote the checkpoint.
        install: how to get the library, for a reader without it.
        verify: not stored. What loading checks against ``bitdistiller.json``: ``"fast"`` (CRC-32), ``"full"``
            (SHA-256) or ``"none"``.
        quant_method: always ``"bitdistiller"``.

    Raises:
        ConfigError: a value outside its rule.
    """

    def __init__(
        self,
        bits: int = 2,
        group_size: int | str = 128,
        grid: str = "int",
        *,
        scale_dtype: str = "float16",
        zero_point_range: list[int] | tuple[int, int] | None = None,
        refine: str | None = None,
        tied: bool = False,
        state: str = "packed",
        learn_scale: bool = True,
        learn_zero_point: bool = False,
        gradient: str = "exact",
        modules_to_not_convert: list[str] | None = None,
        overrides: dict[str, dict[str, Any]] | None = None,
        embeddings: list[str] | None = None,
        activation_bits: int | None = None,
        subln: str = "none",
        subln_eps: float = SUBLN_EPS,
        subln_modules: list[str] | None = None,
        packing: str = "bitstream",
        provenance: dict[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        written_by: str | None = None,
        install: str = INSTALL_HINT,
        verify: str = "fast",
        quant_method: str = QUANT_METHOD,
    ) -> None:
        self.quant_method = quant_method
        self.bits, self.group_size, self.grid = bits, group_size, grid
        self.scale_dtype = scale_dtype
        self.zero_point_range = list(zero_point_range) if isinstance(zero_point_range, tuple) else zero_point_range
        self.refine, self.tied = refine, tied
        self.state, self.packing = state, packing
        self.learn_scale, self.learn_zero_point, self.gradient = learn_scale, learn_zero_point, gradient
        self.modules_to_not_convert = modules_to_not_convert
        self.overrides = {} if overrides is None else overrides
        self.embeddings = [] if embeddings is None else embeddings
        self.activation_bits = activation_bits
        self.subln, self.subln_eps, self.subln_modules = subln, subln_eps, subln_modules
        self.provenance = {} if provenance is None else provenance
        self.format_version = format_version
        self.written_by = written_by or f"bitdistiller_peft {library_version()}"
        self.install = install
        self.verify = verify
        self._check()

    def _check(self) -> None:
        _check_choice("quant_method", self.quant_method, (QUANT_METHOD,))
        _check_choice("state", self.state, STATES)
        _check_choice("verify", self.verify, ("fast", "full", "none"))
        if type(self.format_version) is not int or not 1 <= self.format_version <= FORMAT_VERSION:
            raise ConfigError(
                f"`format_version` must be at most {FORMAT_VERSION}: got format_version={self.format_version!r}. "
                "Upgrade with pip install -U bitdistiller_peft."
            )
        for name in ("learn_scale", "learn_zero_point"):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"`{name}` must be true or false: got {name}={getattr(self, name)!r}.")
        for name in ("written_by", "install"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"`{name}` must be text: got {name}={getattr(self, name)!r}.")
        self._check_names()
        check_activation_bits(self.activation_bits)
        check_subln(self.subln, self.subln_eps)
        check_subln_modules(self.subln, self.subln_modules)
        check_packing(self.spec(), self.packing)
        for name in self.overrides:
            self.spec(name)

    def _check_names(self) -> None:
        for key in ("modules_to_not_convert", "embeddings"):
            names = getattr(self, key)
            if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
                raise ConfigError(f"`{key}` must be a list of names: got {names!r}.")
        if self.embeddings and self.state == "latent":
            raise ConfigError(
                f"`embeddings` must be empty for state='latent': got {self.embeddings!r}. Train them with "
                "BitDistillerConfig(embedding_bits=8)."
            )
        for key in ("overrides", "provenance"):
            if not isinstance(getattr(self, key), dict):
                raise ConfigError(f"`{key}` must be a dict: got {key}={getattr(self, key)!r}.")
        for name, override in self.overrides.items():
            if not isinstance(name, str) or not isinstance(override, dict):
                raise ConfigError(f"`overrides` must map a module name to settings: got {name!r}: {override!r}.")
            for key in override:
                if key not in SPEC_KEYS:
                    raise UnknownNameError(f"overrides[{name!r}]", key, SPEC_KEYS)
        for key, value in self.provenance.items():
            if not isinstance(key, str) or not isinstance(value, PROVENANCE_TYPES):
                raise ConfigError(f"`provenance` must hold plain values: got {key!r}: {value!r}.")

    def spec(self, module_name: str | None = None) -> QuantSpec:
        """How the weights of a module are quantized (`None`: those without an override)."""
        values = {key: getattr(self, key) for key in SPEC_KEYS} | self.overrides.get(module_name or "", {})
        spec = QuantSpec.create(values.pop("grid"), values.pop("bits"), gradient=self.gradient, **values)
        return spec.packed_as(self.packing)

    def inputs(self, module_name: str) -> InputSpec:
        """What happens to the inputs of a quantized module."""
        is_normed = has_subln(module_name, self.subln, self.subln_modules)
        return InputSpec(self.activation_bits, self.subln_eps if is_normed else None)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read the section of a config.json.

        Raises:
            ConfigError: an unknown key, or a value outside its rule.
        """
        known = set(cls.__init__.__kwdefaults__ or {}) | {"bits", "group_size", "grid"}
        for key in config_dict:
            if key not in known or key == "verify":
                raise UnknownNameError("quantization_config", key, known - {"verify"})
        try:
            config = cls(**config_dict)
        except TypeError as error:
            raise ConfigError(f"`quantization_config` must hold values of the right types: {error}.") from None
        for key in [key for key in kwargs if key in known]:
            setattr(config, key, kwargs.pop(key))
        config._check()
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The plain values that config.json stores; load-time settings are left out."""
        values = copy.deepcopy(self.__dict__)
        del values["verify"]
        if self.activation_bits is None:
            del values["activation_bits"]
        if not self.embeddings:
            del values["embeddings"]
        if self.subln == "none":
            for key in ("subln", "subln_eps", "subln_modules"):
                del values[key]
        if self.state == "packed":
            for key in ("learn_scale", "learn_zero_point", "gradient"):
                del values[key]
        return values

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a config passed to `from_pretrained` may set for a checkpoint that has its own: only `verify`."""
        return {"verify": self.verify}


def check_packing(spec: QuantSpec, packing: str) -> None:
    """Refuse a layout that the grid's codes do not fit.

    Raises:
        UnknownNameError: no such layout.
        ConfigError: ``"base3"`` for a grid without three levels.
    """
    _check_choice("packing", packing, PACKINGS)
    if packing == "base3" and spec.grid.num_levels != 3:
        raise ConfigError(
            f"`packing` must be 'bitstream' for a grid with {spec.grid.num_levels} levels: got packing='base3', "
            f"grid={spec.grid.name!r}. Five codes fit a byte only where there are three; use grid='ternary'."
        )


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UnknownNameError(name, value, allowed)
