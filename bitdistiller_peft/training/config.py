"""`DistillConfig`: everything that `SFTConfig` says about data and training, and what to minimize."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch
from trl import SFTConfig

from bitdistiller_peft.errors import ConfigError, UnknownNameError
from bitdistiller_peft.kernels import multiplies_bf16
from bitdistiller_peft.losses import Objective, RelationObjective
from bitdistiller_peft.recipes import declare_fields, get_recipe
from bitdistiller_peft.training.averages import averages_faults
from bitdistiller_peft.training.everywhere import TARGETS, everywhere_faults
from bitdistiller_peft.training.on_policy import on_policy_faults
from bitdistiller_peft.training.released import RELEASED, released_faults

ESTIMATE = "estimate"
PER_TOKEN = "per_token"
CACHED = "cached"
QUANTIZED = "quantized"
OFFLOAD = "offload"
ARITHMETICS = ("default", RELEASED)


@dataclass
class DistillConfig(SFTConfig):
    """Configuration of `DistillTrainer`: an `SFTConfig` with another loss.

    Args:
        loss_type: `"cakld"`, `"forward_kl"`, `"reverse_kl"`, `"jsd"`, `"ce"`, a registered divergence, or `"mixture"`.
        gamma: CAKLD's coefficient, the share of reverse KL: a number in [0, 1]; `"estimate"` for the teacher's mean
            probability of the target tokens, measured before the first step; `"per_token"` for its probability of
            each target token in turn. Losses without a `cakld` part ignore `"estimate"`.
        gamma_num_batches: how many training batches the estimate looks at.
        loss_weights: for `loss_type="mixture"`: part to weight, e.g. ``{"cakld": 1.0, "ce": 0.1}``.
        ce_weight: how much cross-entropy with the labels to add to the loss.
        logits_weight: how much the divergence of `loss_type` counts (BitNet Distillation's lambda); for a mixture, use
            `loss_weights`.
        attention_weight: how much attention-relation distillation to add (BitNet Distillation's gamma; published: 1e5
            for classification). 0 for none.
        attention_layer: the student's layer whose queries, keys and values are compared; negative from the end;
            `None` for one at 22/28 of the depth.
        attention_teacher_layer: the teacher's; `None` for the same, which needs a teacher of the same depth.
        attention_split_heads: into how many parts the joined heads are split anew.
        attention_relation: `"cosine"` (the paper's algorithm and its released code) or `"scaled_dot"` (equation 12).
        attention_mask: keys that a token is related to: `"padding"` (all but padding), `"causal"`, or `"none"` (all, as
            published).
        attention_reduction: `"paper"` (mean over tokens and split heads) or `"code"` (over split heads twice).
        hidden_weight: how much the hidden-state part counts: the mean squared difference of student's and teacher's
            states after one layer, each divided by its root mean square, over the target tokens. 0 for none.
        hidden_layer: that layer; negative from the end, -1 after the last norm.
        temperature: logits of both sides are divided by it before they are compared.
        rescale_temperature: multiply divergences by the square of the temperature.
        jsd_beta: the teacher's share of the mixture in `"jsd"`.
        divergence_tokens: `"all"` takes divergences over every token that is no padding, prompts too, and divides them
            by the number of those (BitNet Distillation's released code); cross-entropy stays with the targets.
        loss_tile_tokens: tokens whose logits are held at once; `None` lets the vocabulary decide.
        arithmetic: `"released"` takes gamma, the mask of the loss and its reduction (a sum over tokens, a mean over
            texts) as BitDistiller's released code does, to compare results like for like; what is logged stays a mean
            over tokens. `BitDistillerConfig` has the same field.
        teacher: `"self"` for the student's own frozen full-precision weights; the path or Hub name of a model; or the
            student's base model in another place: `"quantized"` (bitsandbytes, 8 bits; 4 with
            ``teacher_init_kwargs={"load_in_4bit": True}``), `"offload"` (in main memory, streamed layer by layer) or
            `"cached"` (not in memory at all). `"quantized:PATH"` and `"offload:PATH"` do so with another model.
        teacher_cache: for `"cached"`, the folder that `cache_teacher` wrote.
        teacher_init_kwargs: passed to `from_pretrained` where the teacher is a path or name.
        scale_learning_rate: learning rate of learned scales; `None` for `learning_rate`. They get no weight decay.
            Where grids differ, as with tables of 8 bits, it is that of the coarsest; for finer ones it is smaller, so
            that their outermost levels move by as many code steps.
        zero_point_learning_rate: learning rate of learned zero points; `None` for `learning_rate`. No weight decay.
        on_policy_share: share of the steps whose completions the student itself samples, for the teacher to judge.
        on_policy_after: share of the steps that come before the first such one: a second phase.
        on_policy_max_new_tokens: longest completion.
        on_policy_temperature: of the sampling.
        on_policy_prompt_tokens: length of the prompt that is taken from a text without one.
        ema_decay: evaluate, and in the end keep, an exponential moving average of what is trained, of which each step
            keeps this much; in a run of a few hundred steps 0.95 to 0.99. `None` keeps the last step.
        quantize_once: where an optimizer step has several micro-batches, or gradient checkpointing is on, quantize each
            weight once per step and keep the values until it ends, in the dtype of the products. Nothing else changes;
            set it to False where that copy of the weights does not fit. Never done under FSDP or DeepSpeed.
        log_flip_rate: log the share of codes that changed since the last log.
        flip_rate_layers: how many quantized weights that share is measured on, evenly spread; `-1` for all.
        bf16: as in `SFTConfig`, but unsaid it is off on a processor without instructions for bf16.
        doctor: look at codes and scales with every log entry (about a million weights, whatever the model), log what
            they do, and warn where a known failure shows; see `bitdistiller_peft.training.doctor`.

    Raises:
        ConfigError: a setting that cannot work; the message says what would.
        UnknownNameError: a loss that nobody registered.

    Example:
        >>> DistillConfig("out", gamma=0.4, use_cpu=True, bf16=False).loss_type
        'cakld'
    """

    loss_type: str = field(
        default="cakld",
        metadata={"help": "'cakld', 'forward_kl', 'reverse_kl', 'jsd', 'ce', a registered divergence, or 'mixture'."},
    )
    # With three members, HfArgumentParser reads the command line as text; __post_init__ makes numbers of it.
    gamma: float | str | None = field(
        default=ESTIMATE, metadata={"help": "Share of reverse KL in CAKLD: 'estimate', 'per_token', or 0 to 1."}
    )
    gamma_num_batches: int = field(default=16, metadata={"help": "Training batches that the estimate looks at."})
    loss_weights: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Part to weight, for loss_type 'mixture', as JSON on the command line."}
    )
    ce_weight: float = field(default=0.0, metadata={"help": "Cross-entropy with the labels to add to the loss."})
    logits_weight: float = field(default=1.0, metadata={"help": "Weight of the divergence of loss_type."})
    attention_weight: float = field(default=0.0, metadata={"help": "Weight of attention-relation distillation."})
    attention_layer: int | None = field(
        default=None, metadata={"help": "The student's layer that is compared; by default a late one."}
    )
    attention_teacher_layer: int | None = field(
        default=None, metadata={"help": "The teacher's layer; by default the same."}
    )
    attention_split_heads: int = field(default=32, metadata={"help": "Parts that the joined heads are split into."})
    attention_relation: str = field(default="cosine", metadata={"help": "'cosine' or 'scaled_dot'."})
    attention_mask: str = field(default="padding", metadata={"help": "'padding', 'causal' or 'none'."})
    attention_reduction: str = field(default="paper", metadata={"help": "'paper' or 'code'."})
    hidden_weight: float = field(default=0.0, metadata={"help": "Weight of the hidden-state part of the loss."})
    hidden_layer: int = field(default=-1, metadata={"help": "The layer whose states it compares; -1 for the last."})
    temperature: float = field(default=1.0, metadata={"help": "Divides both sides' logits before comparison."})
    rescale_temperature: bool = field(
        default=True, metadata={"help": "Multiply divergences by the square of the temperature."}
    )
    jsd_beta: float = field(default=0.5, metadata={"help": "The teacher's share of the mixture in 'jsd'."})
    divergence_tokens: str = field(
        default=TARGETS, metadata={"help": "'targets', or 'all' to compare on prompts too; cross-entropy never is."}
    )
    loss_tile_tokens: int | None = field(
        default=None, metadata={"help": "Tokens whose logits are held at once; by default the vocabulary decides."}
    )
    arithmetic: str = field(
        default="default", metadata={"help": "'released' computes as BitDistiller's released code does."}
    )
    teacher: str = field(
        default="self",
        metadata={"help": "'self', 'cached', 'quantized', 'offload', or the path or Hub name of a model."},
    )
    teacher_cache: str | None = field(default=None, metadata={"help": "The folder of a cached teacher."})
    teacher_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "For from_pretrained of the teacher, as JSON on the command line."}
    )
    scale_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of learned scales; learning_rate by default."}
    )
    zero_point_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of learned zero points; learning_rate by default."}
    )
    on_policy_share: float = field(default=0.0, metadata={"help": "Share of the steps on the student's own samples."})
    on_policy_after: float = field(default=0.0, metadata={"help": "Share of the steps before the first such one."})
    on_policy_max_new_tokens: int = field(default=128, metadata={"help": "Longest completion that it samples."})
    on_policy_temperature: float = field(default=1.0, metadata={"help": "Temperature of its sampling."})
    on_policy_prompt_tokens: int = field(default=32, metadata={"help": "Length of the prompt where a text has none."})
    ema_decay: float | None = field(
        default=None, metadata={"help": "Evaluate and keep a moving average of the weights with this decay, e.g. 0.99."}
    )
    quantize_once: bool = field(
        default=True, metadata={"help": "Quantize once per optimizer step, not once per micro-batch; one more copy."}
    )
    log_flip_rate: bool = field(default=True, metadata={"help": "Log the share of codes that changed."})
    flip_rate_layers: int = field(
        default=8, metadata={"help": "Quantized weights that the flip rate is measured on; -1 for all."}
    )
    doctor: bool = field(
        default=True, metadata={"help": "Log oscillation, clamping, scale drift; warn where a known failure shows."}
    )

    @classmethod
    def from_recipe(cls, name: str, *, preset: str = "balanced", stage: str = "distill", **overrides: Any) -> Self:
        """Build the configuration of one training stage of a named system.

        Args:
            name: a recipe's name, e.g. `"bitdistiller"`; `get_recipe` shows all of it.
            preset: `"fast"`, `"balanced"` or `"max"`.
            stage: `"distill"`, or `"pretrain"` where the recipe has that.
            overrides: other values; those that only `BitDistillerConfig` has are left to it, so that both can be given
                the same.

        Raises:
            UnknownNameError: no such recipe or preset.
            ConfigError: no such stage, an override that neither class has, or a value that cannot work.
        """
        own = {item.name for item in fields(cls)}
        values = get_recipe(name, preset, **overrides).training_for(stage)
        return cls(**{**values, **{key: value for key, value in overrides.items() if key in own}})

    def __post_init__(self) -> None:
        """Check everything that can be checked without a model."""
        if not torch.accelerator.is_available():
            self.use_cpu = True  # it will be the CPU anyway; unsaid, TRL's bf16 default is refused there
        said: SFTConfig = self
        if said.use_cpu and said.bf16 is None and not multiplies_bf16("cpu"):
            said.bf16 = False  # TRL's default would take several times as long
        super().__post_init__()
        if self.arithmetic not in ARITHMETICS:
            raise UnknownNameError("arithmetic", self.arithmetic, ARITHMETICS)
        self.gamma = _as_gamma(self.gamma)
        self.loss_weights = _as_dict("loss_weights", self.loss_weights)
        self.teacher_init_kwargs = _as_dict("teacher_init_kwargs", self.teacher_init_kwargs)
        if faults := self._weight_faults():  # the objective is made of these
            raise ConfigError("\n".join(faults))
        self.objective(0.5)
        self.relation_objective()
        faults = [*self._range_faults(), *self._unsupported_faults(), *self._cache_faults(), *everywhere_faults(self)]
        faults += [*averages_faults(self), *on_policy_faults(self)]
        faults += released_faults(self) if self.is_released else []
        if faults:
            raise ConfigError("\n".join(faults))

    @property
    def teacher_kwargs(self) -> dict[str, Any]:
        """`teacher_init_kwargs`, as a dictionary in any case."""
        return self.teacher_init_kwargs if isinstance(self.teacher_init_kwargs, dict) else {}

    @property
    def is_released(self) -> bool:
        """Whether to compute as BitDistiller's released code does."""
        return self.arithmetic == RELEASED

    @property
    def uses_gamma(self) -> bool:
        """Whether the loss has a `cakld` part."""
        return self.loss_type == "cakld" or (self.loss_type == "mixture" and "cakld" in (self.loss_weights or {}))

    def objective(self, estimate: float | None) -> Objective:
        """Build what the loss functions take.

        Args:
            estimate: the estimated gamma, used where `gamma` is `"estimate"`.
        """
        gamma = estimate if self.gamma == ESTIMATE else self.gamma
        weights = self.loss_weights if isinstance(self.loss_weights, dict) else None
        is_weighted = self.logits_weight != 1.0 and self.loss_type not in ("mixture", "ce")
        return Objective(
            "mixture" if is_weighted else self.loss_type,
            gamma=None if self.gamma == ESTIMATE and not self.uses_gamma else gamma,  # type: ignore[arg-type]
            temperature=self.temperature,
            rescale_temperature=self.rescale_temperature,
            ce_weight=self.ce_weight,
            jsd_beta=self.jsd_beta,
            largest_gamma=1 + 1 / max(1, self.gamma_num_batches - 1) if self.is_released else 1.0,
            weights={self.loss_type: self.logits_weight} if is_weighted else weights,
        )

    def relation_objective(self) -> RelationObjective:
        """How attention relations are compared."""
        return RelationObjective(
            self.attention_split_heads, self.attention_relation, self.attention_mask, self.attention_reduction
        )

    def _range_faults(self) -> list[str]:
        faults = [
            f"`{name}` must be a positive integer{also}: got {name}={value!r}."
            for name, value, also in (
                ("gamma_num_batches", self.gamma_num_batches, ""),
                ("max_length", self.max_length, " or None"),
                ("loss_tile_tokens", self.loss_tile_tokens, " or None"),
                ("flip_rate_layers", None if self.flip_rate_layers == -1 else self.flip_rate_layers, " or -1 for all"),
            )
            if value is not None and value < 1
        ]
        return faults + [
            f"`{name}` must be finite and not negative: got {name}={value!r}. Use {usual}, or 0.0 to freeze."
            for name, value, usual in (
                ("learning_rate", self.learning_rate, "1e-5"),
                ("scale_learning_rate", self.scale_learning_rate, "None for learning_rate"),
                ("zero_point_learning_rate", self.zero_point_learning_rate, "None for learning_rate"),
            )
            if value is not None and not 0 <= value < math.inf
        ]

    def _weight_faults(self) -> list[str]:
        faults = []
        if not 0 < self.logits_weight < math.inf:
            faults.append(f"`logits_weight` must be positive: got logits_weight={self.logits_weight!r}. Use 1.0.")
        if self.logits_weight != 1.0 and self.loss_type in ("mixture", "ce"):
            faults.append(
                f"`logits_weight` must be 1.0 for loss_type={self.loss_type!r}: got logits_weight="
                f"{self.logits_weight!r}. Set the weights in loss_weights."
            )
        if not 0 <= self.attention_weight < math.inf:
            faults.append(
                f"`attention_weight` must not be negative: got attention_weight={self.attention_weight!r}. Use 0.0 for "
                "none."
            )
        if not 0 <= self.hidden_weight < math.inf:
            faults.append(
                f"`hidden_weight` must not be negative: got hidden_weight={self.hidden_weight!r}. Use 0.0 for none."
            )
        if self.attention_weight and (self.packing or self.padding_free):
            faults.append(
                "`packing` and `padding_free` must be off with attention_weight: relations would be taken across "
                "documents. Set both to False."
            )
        return faults

    def _cache_faults(self) -> list[str]:
        if (self.teacher_cache is not None) == (self.teacher == CACHED):
            return []
        return [
            f"`teacher_cache` must be given for teacher='cached', and only there: got teacher={self.teacher!r}, "
            f"teacher_cache={self.teacher_cache!r}. Use teacher='cached' and the folder that "
            "cache_teacher(), or `bitdistiller cache`, wrote."
        ]

    def _unsupported_faults(self) -> list[str]:
        refused = {
            "use_liger_kernel": (self.use_liger_kernel, "It would replace the forward that computes the loss."),
            "activation_offloading": (
                bool(self.activation_offloading and self.use_cpu),
                "On a CPU, activations are in main memory anyway.",
            ),
            "label_smoothing_factor": (self.label_smoothing_factor != 0, "The teacher's distribution takes its place."),
            "router_aux_loss_coef": (bool(self.router_aux_loss_coef), "Routers stay frozen; nothing is to be steered."),
            "average_tokens_across_devices": (
                not self.average_tokens_across_devices,
                "The loss is a mean over the tokens of all devices; set it to True.",
            ),
        }
        return [
            f"`{name}` is not supported: got {name}={getattr(self, name)!r}. {why}"
            for name, (is_set, why) in refused.items()
            if is_set
        ]


def _as_gamma(gamma: object) -> float | str:
    if gamma is None:
        return ESTIMATE
    if gamma in (ESTIMATE, PER_TOKEN):
        return str(gamma)
    try:
        return float(gamma)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ConfigError(
            f"`gamma` must be 'estimate', 'per_token' or a number in [0, 1]: got gamma={gamma!r}. Use 'estimate'."
        ) from None


def _as_dict(name: str, value: dict[str, Any] | str | None) -> dict[str, Any] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ConfigError(f"`{name}` must be JSON: got {name}={value!r} ({error}).") from None
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"`{name}` must be a dictionary: got {name}={value!r}.")
    return value


declare_fields("training", [item.name for item in fields(DistillConfig)])
