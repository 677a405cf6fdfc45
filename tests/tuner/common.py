"""What the tests of the PEFT socket share: students of the tiny models, and exact pictures of a model's state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitdistiller_peft import BitDistillerConfig, get_bitdistiller_model
from bitdistiller_peft.tuner import BitDistillerLayer
from tests.tiny import load, save_base, token_ids

# group sizes that divide 172; every other width of the tiny models is a multiple of 32
GROUP_SIZES = {"llama-172": 4}


class MLP(nn.Module):
    """A model of no library: two linear layers with biases, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.lin0 = nn.Linear(32, 64)
            self.norm = nn.LayerNorm(64)
            self.lin1 = nn.Linear(64, 16)
        self.eval()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.lin1(torch.relu(self.norm(self.lin0(inputs))))


def config_for(name: str, **kwargs: object) -> BitDistillerConfig:
    """A config that suits an architecture."""
    return BitDistillerConfig(**{"bits": 2, "group_size": GROUP_SIZES.get(name, 32), **kwargs})


@dataclass(frozen=True)
class Bases:
    """Base models on disk, written once per test run."""

    folder: Path

    def path(self, name: str, **kwargs: object) -> Path:
        """Where the base model of an architecture lies."""
        return save_base(name, self.folder, **kwargs)

    def base(self, name: str, **kwargs: object) -> PreTrainedModel:
        """A fresh base model."""
        return load(self.path(name, **kwargs))

    def student(self, name: str, **kwargs: object) -> PeftModel:
        """A fresh student; `kwargs` go to its config."""
        return get_bitdistiller_model(self.base(name), config_for(name, **kwargs))


def inputs_of(model: nn.Module) -> Tensor:
    """Inputs that the model takes: token ids, or features for the `MLP`."""
    if any(isinstance(module, MLP) for module in model.modules()):
        return torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    return token_ids()


def run(model: nn.Module, **kwargs: object) -> Tensor:
    """The model's logits, with a graph."""
    outputs = model(inputs_of(model), **kwargs)
    return getattr(outputs, "logits", outputs)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """The model's logits."""
    return run(model)


@torch.no_grad()
def teacher_logits(model: PeftModel) -> Tensor:
    """The logits with the adapter disabled."""
    with model.disable_adapter():
        return run(model)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that an optimizer would get, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def train(model: nn.Module, steps: int = 3, lr: float = 1e-2) -> None:
    """A few steps of AdamW towards other logits."""
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


def loss_of(model: nn.Module) -> Tensor:
    """A loss whose gradient reaches every weight."""
    out = run(model).float()
    weights = torch.linspace(-1, 1, out.shape[-1])
    return (out.log_softmax(-1) * weights).sum(-1).mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of `loss_of`, by name; the model's own are cleared before and after."""
    model.zero_grad()
    loss_of(model).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def without_dropout(model: nn.Module) -> nn.Module:
    """The model, made to compute the same in training as in evaluation."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):  # OPT's layers
            module.dropout = 0.0
    return model


def overlays(model: nn.Module) -> dict[str, BitDistillerLayer]:
    """The overlaid layers, by their name in the base model."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, BitDistillerLayer)}
    return {name.removeprefix("base_model.model."): module for name, module in found.items()}


def copy_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, dtypes and values, bit for bit."""
    assert list(found) == list(expected)
    different = [key for key in found if found[key].dtype != expected[key].dtype or not same(found[key], expected[key])]
    assert not different, f"these differ: {different}"


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit; NaN equals NaN."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def picture(model: nn.Module) -> dict[str, object]:
    """Everything about a model that a refused call must leave alone, except values."""
    return {
        "types": {name: type(module) for name, module in model.named_modules()},
        "identities": {name: id(parameter) for name, parameter in model.named_parameters()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "attributes": sorted(key for key in vars(model) if not key.startswith("_")),
        "tied": getattr(getattr(model, "config", None), "tie_word_embeddings", None),
    }


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """The model is in every respect what it was, and runs, after what is done inside."""
    before, values = picture(model), copy_state(model)
    yield
    after = picture(model)
    for key in before:
        assert after[key] == before[key], key
    assert_same_tensors(copy_state(model), values)
