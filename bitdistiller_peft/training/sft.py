"""What is arranged around `SFTTrainer.__init__`, so that it sets itself up for our purposes and leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from bitdistiller_peft.training.config import DistillConfig
from bitdistiller_peft.training.forward import base_model_of


@contextmanager
def plain_output_head(model: nn.Module | str) -> Iterator[None]:
    """Show the base layer of an overlaid output head while `SFTTrainer` is built.

    It refuses adapters on the head because its own loss would go round them; ours computes with the effective weight.
    """
    head = None if isinstance(model, str) else getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, BaseTunerLayer):
        yield
        return
    base_model = base_model_of(model)  # type: ignore[arg-type]
    base_layer = head.base_layer
    base_model.get_output_embeddings = lambda: base_layer
    try:
        yield
    finally:
        del base_model.get_output_embeddings


@contextmanager
def as_sft(args: DistillConfig) -> Iterator[None]:
    """Let `SFTTrainer` set itself up for its own loss, which is never computed, and without an auxiliary one."""
    kept = (args.loss_type, args.router_aux_loss_coef)
    args.loss_type, args.router_aux_loss_coef = "nll", 0.0
    try:
        yield
    finally:
        args.loss_type, args.router_aux_loss_coef = kept


@contextmanager
def config_kept(model: nn.Module | str) -> Iterator[None]:
    """Undo what `SFTTrainer` writes into the model's config for the time of training; it would be saved and packed."""
    configs = [] if isinstance(model, str) else [model.config, model.config.get_text_config()]  # type: ignore[operator, union-attr]
    names = ("use_cache", "output_router_logits", "router_aux_loss_coef")
    kept = [(config, name, getattr(config, name)) for config in configs for name in names if hasattr(config, name)]
    try:
        yield
    finally:
        for config, name, value in kept:
            setattr(config, name, value)
