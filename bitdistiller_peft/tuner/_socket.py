"""The only file that touches PEFT's registries.

`register_peft_method` accepts only names that are members of the `PeftType` enum, and transformers' `load_adapter`
reads `.value` of the type, so a real member is added at run time. PEFT finds the innermost base layer of nested
adapters, and would merge a LoRA wrapped around one of our layers into the frozen teacher weight without a word; so
injecting another method over our layers is refused.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method

from bitdistiller_peft.errors import TargetError
from bitdistiller_peft.tuner.layer import PREFIX, BitDistillerLayer

NAME = "bitdistiller"


def add_peft_type(name: str) -> PeftType:
    """Add a member to the `PeftType` enum, or return the one that is there."""
    members: dict[str, Any] = PeftType._member_map_
    if name in members:
        return members[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(members)
    type.__setattr__(PeftType, name, member)  # the enum's own __setattr__ refuses new members
    PeftType._member_names_.append(name)
    members[name] = member
    PeftType._value2member_map_[name] = member
    return member


def register(config_cls: type, model_cls: type) -> None:
    """Make PEFT know the method; calling it again changes nothing."""
    member = add_peft_type(NAME.upper())
    if member not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=NAME, config_cls=config_cls, model_cls=model_cls, prefix=PREFIX)
    _refuse_nesting()


def _refuse_nesting() -> None:
    # at the very start: PEFT would otherwise replace the student's entry in `peft_config` before anything is refused
    original = BaseTuner.__init__
    if getattr(original, "_knows_bitdistiller", False):
        return

    @wraps(original)
    def __init__(self: BaseTuner, model: Any, *args: Any, **kwargs: Any) -> None:
        if getattr(type(self), "prefix", None) != PREFIX:
            for name, module in model.named_modules():
                if isinstance(module, BitDistillerLayer):
                    raise TargetError(
                        f"an adapter of another kind must not wrap a BitDistiller layer: layer {name!r} is one, and "
                        f"{type(self).__name__} would merge into its frozen teacher weight. Call pack_and_unload() or "
                        "merge_and_unload() first, then add the adapter to the result."
                    )
        original(self, model, *args, **kwargs)

    __init__._knows_bitdistiller = True  # type: ignore[attr-defined]
    BaseTuner.__init__ = __init__
