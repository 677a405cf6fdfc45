"""Models on loan: run in eval mode, as student or as full-precision teacher, and given back exactly as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from bitdistiller_peft.tuner.layer import BitDistillerLayer


@contextmanager
def borrowed(*models: nn.Module, keep_random_state: bool = True) -> Iterator[None]:
    """Put models into eval mode without gradients; on leaving, all is as it was.

    That is: the train mode of every module, which parameters require gradients (switching adapters off and on changes
    that), and the random state.

    Args:
        models: the models to be run.
        keep_random_state: also give the random state back; what draws nothing can do without.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for model in models for parameter in model.parameters()]
    devices = {parameter.device for parameter, _ in flags if parameter.is_cuda}
    try:
        for model in models:
            model.eval()
        # not inference_mode: what a layer caches now must not break a later backward pass
        with torch.no_grad(), torch.random.fork_rng(list(devices)) if keep_random_state else nullcontext():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Borrow the full-precision model: our adapters, trained norms, embeddings and head are off.

    PEFT's `disable_adapter()` does not serve: on leaving it unfreezes every `modules_to_save` copy, also one that a
    user froze, and it walks the whole model to describe it, on every step.

    Args:
        model: a student of ours, with or without PEFT's model around it; any other model is only borrowed.
    """
    overlays = [module for module in model.modules() if isinstance(module, BitDistillerLayer)]
    # a model without overlays may have adapters of other kinds, which are part of it
    copies = [m for m in model.modules() if overlays and isinstance(m, AuxiliaryTrainingWrapper)]
    switched = [module for module in (*overlays, *copies) if not module.disable_adapters]
    with borrowed(model, keep_random_state=False):
        try:
            for module in switched:
                module.enable_adapters(False)
            yield
        finally:
            for module in switched:
                module.enable_adapters(True)
