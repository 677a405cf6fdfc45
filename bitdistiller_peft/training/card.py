"""The model card of a training run's output folder: what was trained, from what, towards what, and how to go on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from peft import PeftModel
from torch import nn

_TEMPLATE = """---
{header}---

# {title}

A student of {base} in training with bitdistiller_peft: {grid}. {loss}

This folder holds a checkpoint in training (latent weights), not the quantized model itself. Continue, or pack it:

```python
import bitdistiller_peft  # needed: it teaches PEFT this method
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base_model!r})
packed = PeftModel.from_pretrained(model, {location!r}).pack_and_unload()
packed.save_pretrained("packed")
```
{results}"""

_REPORTED = ("loss", "forward_kl", "reverse_kl", "ce", "agreement", "flip_rate", "num_tokens")


def card_text(
    model: nn.Module,
    *,
    title: str,
    location: str,
    loss: str,
    log_history: Iterable[Mapping[str, Any]] = (),
    tags: Iterable[str] = (),
    dataset: str | None = None,
) -> str:
    """Write the card.

    Args:
        model: the student.
        title: heading.
        location: where the checkpoint lies, or its Hub name.
        loss: one sentence on what is minimized.
        log_history: of the trainer; the last training and evaluation entries are shown.
        tags: for the Hub.
        dataset: name of the training data on the Hub.
    """
    base = _base_name(model)
    is_hub_id = base.count("/") == 1 and not Path(base).exists() and not base.startswith((".", "/"))
    header: dict[str, Any] = {"library_name": "peft"}
    if is_hub_id:
        header |= {"base_model": base, "base_model_relation": "quantized"}
    if dataset is not None:
        header["datasets"] = [dataset]
    header["tags"] = sorted({*tags, "generated_from_trainer"})
    return _TEMPLATE.format(
        header=f"{ModelCardData(**header).to_yaml()}\n",
        title=title,
        base=f"`{base}`" if base else f"a {type(model).__name__} built in memory",
        grid=_grid(model),
        loss=loss,
        base_model=base or "path/to/the/base/model",
        location=location,
        results=_results(log_history),
    )


def _base_name(model: nn.Module) -> str:
    config = model.get_base_model().config if isinstance(model, PeftModel) else getattr(model, "config", None)
    return str(getattr(config, "_name_or_path", "") or "")


def _grid(model: nn.Module) -> str:
    if not isinstance(model, PeftModel):
        return "fake-quantized in place"
    config = model.active_peft_config
    return f"{config.bits} bits, grid `{config.grid}`, {config.group_size} weights per scale"


def _results(log_history: Iterable[Mapping[str, Any]]) -> str:
    history = list(log_history)
    rows = []
    for prefix, name in (("", "training"), ("eval_", "evaluation")):
        last = next((entry for entry in reversed(history) if f"{prefix}loss" in entry), None)
        if last is not None:
            rows += [
                f"| {name}, step {last.get('step', '')} | {key} | {last[prefix + key]:.5g} |"
                for key in _REPORTED
                if prefix + key in last
            ]
    if not rows:
        return ""
    return "\n".join(["", "| at | what, per target token | value |", "|---|---|---:|", *rows, ""])
