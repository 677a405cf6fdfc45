"""The model card of a training run's output folder: what was trained, from what, towards what, and how to go on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from peft import PeftModel
from torch import nn

from bitdistiller_peft.hub import quant_summary
from bitdistiller_peft.tuner.card import student_card

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
    summary = quant_summary(model)
    size = (
        f"Latent weights. Once packed: {summary.num_bytes:,} bytes, {summary.bits_per_weight:.2f} bits per weight, "
        f"embeddings and scales counted.\n\n{summary.to_markdown()}"
    )
    text = student_card(
        _values(model),
        title=title,
        location=location,
        size=size,
        tags=sorted({*tags, "generated_from_trainer"}),
        task=_task(model),
        is_adapter=isinstance(model, PeftModel),
        **({} if dataset is None else {"datasets": [dataset]}),
    )
    return f"{text}\n## Training\n\n{loss}\n{_results(log_history)}"


def _values(model: nn.Module) -> dict[str, Any]:
    """Settings and provenance, with the base model that was loaded, whatever an adapter's config calls it."""
    plain: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    quantization = getattr(plain.config, "quantization_config", None)
    values: dict[str, Any] = {}
    if isinstance(model, PeftModel):
        values = model.active_peft_config.to_dict()
    elif quantization is not None:
        values = quantization.to_dict()
    return values | {"base_model_name_or_path": str(getattr(plain.config, "_name_or_path", "") or "")}


def _task(model: nn.Module) -> str | None:
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    return "text-generation" if "CausalLM" in type(plain).__name__ or "LMHead" in type(plain).__name__ else None


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
