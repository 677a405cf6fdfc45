"""`fit_subln`: gains start at the mean size of the inputs, against sizes taken by hand from the base model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitdistiller_peft import BitDistillerConfig, fit_subln, get_bitdistiller_model
from bitdistiller_peft.errors import ConfigError, DataError, StateError
from tests.tiny import load, save_base, token_ids

ARCHITECTURES = ["llama", "gpt2", "qwen2"]
BITNET = {"grid": "ternary", "group_size": "tensor", "learn_scale": False, "gradient": "ste", "activation_bits": 8}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


def student(bases: Path, name: str = "llama", **config: object):
    model = load(save_base(name, bases))
    return get_bitdistiller_model(model, BitDistillerConfig(**{**BITNET, "subln": "output", **config}))


def norms(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: p.detach().clone() for name, p in model.named_parameters() if "bitdistiller_subln" in name}
    return {name.split(".bitdistiller_")[0].removeprefix("base_model.model."): gains for name, gains in found.items()}


@pytest.mark.parametrize("placement", ["output", "all"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gains_are_the_mean_size_of_what_the_base_layer_reads(name: str, placement: str, bases: Path) -> None:
    model = student(bases, name, subln=placement)
    base, sizes = load(save_base(name, bases)), {}
    for layer in norms(model):
        base.get_submodule(layer).register_forward_pre_hook(
            lambda _, args, layer=layer: sizes.__setitem__(layer, args[0].double().square().mean(-1).sqrt().mean())
        )
    with torch.no_grad():
        base(token_ids())
    gains = fit_subln(model, None, token_ids())
    assert gains.keys() == sizes.keys() == norms(model).keys()
    for layer, gain in norms(model).items():
        assert bool((gain == gain[0]).all())
        assert gain[0].item() == pytest.approx(gains[layer]) == pytest.approx(float(sizes[layer]), rel=1e-5)


def test_layers_answer_at_the_scale_that_they_had(bases: Path) -> None:
    """The squared error of what a block adds falls, since only the differences between tokens are lost."""
    model = student(bases, grid="int", bits=8, group_size=32, activation_bits=None)
    ids = token_ids()

    def error() -> float:
        with torch.no_grad():
            found = model(ids, output_hidden_states=True).hidden_states[1]
            with model.disable_adapter():
                wanted = model(ids, output_hidden_states=True).hidden_states[1]
        return float((found - wanted).square().mean() / wanted.square().mean())

    before = error()
    fit_subln(model, None, ids)
    assert error() < 0.2 * before


def test_nothing_else_changes_and_the_gains_survive_a_reload(bases: Path, tmp_path: Path) -> None:
    model = student(bases)
    model.train()
    state = {name: value.clone() for name, value in model.state_dict().items() if "subln" not in name}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    fit_subln(model, None, token_ids())
    assert torch.equal(torch.rand(1), expected)
    assert model.training
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    logits = model.eval()(token_ids()).logits
    packed = model.pack_and_unload(progressbar=False)
    packed.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path)(token_ids()).logits, logits)


def test_what_has_no_norm_is_refused(bases: Path) -> None:
    with pytest.raises(ConfigError, match="`model` must have SubLN norms"):
        fit_subln(student(bases, subln="none"), None, token_ids())
    with pytest.raises(StateError, match="must come from get_bitdistiller_model"):
        fit_subln(load(save_base("llama", bases)), None, token_ids())
    with pytest.raises(DataError, match="`texts` must be given"):
        fit_subln(student(bases), None, None)


def test_inputs_that_are_not_finite_are_refused_by_layer_and_gains_stay(bases: Path) -> None:
    model = student(bases)
    with torch.no_grad():
        model.get_submodule("base_model.model.model.layers.1.mlp.up_proj").base_layer.weight.fill_(float("inf"))
    with pytest.raises(DataError, match=r"layer 'model\.layers\.1\.mlp\.down_proj' must be finite"):
        fit_subln(model, None, token_ids())
    assert all(bool((gain == 1).all()) for gain in norms(model).values())
