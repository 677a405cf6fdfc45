"""An objective says exactly what is minimized, and one that cannot work is refused with every fault named."""

from __future__ import annotations

import copy
import dataclasses
import doctest
import math
import pickle
from typing import Any

import pytest
import torch

from bitdistiller_peft.errors import ConfigError, UnknownNameError
from bitdistiller_peft.losses import Objective, divergence_names, objective


def test_the_example_in_the_docstring_is_true() -> None:
    assert doctest.testmod(objective).attempted > 0
    assert doctest.testmod(objective).failed == 0


def test_cakld_hands_gamma_to_reverse_kl() -> None:
    assert Objective("cakld", gamma=0.25).coefficients(torch.empty(0)) == {"reverse_kl": 0.25, "forward_kl": 0.75}


def test_per_token_gamma_is_the_confidence_in_each_label() -> None:
    resolved = Objective("cakld", gamma="per_token").coefficients(torch.tensor([0.25, 1.0]))
    assert {part: weight.tolist() for part, weight in resolved.items()} == {  # type: ignore[union-attr]
        "reverse_kl": [0.25, 1.0],
        "forward_kl": [0.75, 0.0],
    }


def test_a_mixture_adds_up_the_shares_of_one_divergence() -> None:
    weights = {"cakld": 2.0, "forward_kl": 1.0, "jsd": 0.5, "ce": 0.1}
    mixture = Objective("mixture", gamma=0.25, weights=weights)
    assert mixture.terms == weights
    assert mixture.coefficients(torch.empty(0)) == {"forward_kl": 2.5, "reverse_kl": 0.5, "jsd": 0.5}


@pytest.mark.parametrize("name", [*divergence_names(), "ce"])
def test_every_other_loss_type_is_itself(name: str) -> None:
    assert Objective(name).terms == {name: 1.0}
    assert Objective(name).needs_teacher == (name != "ce")


def test_cross_entropy_is_added_and_needs_no_teacher() -> None:
    assert Objective("forward_kl", ce_weight=0.5).terms == {"forward_kl": 1.0, "ce": 0.5}
    assert not Objective("mixture", weights={"ce": 1.0}).needs_teacher
    assert Objective("mixture", weights={"ce": 1.0, "jsd": 0.0}).needs_teacher


def test_the_temperature_is_squared_into_the_loss_unless_switched_off() -> None:
    assert Objective("forward_kl", temperature=3.0).divergence_factor == 9.0
    assert Objective("forward_kl", temperature=3.0, rescale_temperature=False).divergence_factor == 1.0


def test_an_objective_is_a_value() -> None:
    weights = {"cakld": 1.0}
    mixture = Objective("mixture", gamma=0.5, weights=weights)
    weights["ce"] = 1.0
    assert mixture.terms == {"cakld": 1.0}
    assert pickle.loads(pickle.dumps(mixture)) == copy.deepcopy(mixture) == mixture
    assert len({mixture, copy.deepcopy(mixture)}) == 1
    assert dataclasses.replace(mixture, gamma=0.25).gamma == 0.25
    with pytest.raises(dataclasses.FrozenInstanceError):
        mixture.gamma = 0.1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "cakld"}, "`gamma` must be given for 'cakld'"),
        ({"loss_type": "cakld", "gamma": 1.2}, r"`gamma` must lie in \[0, 1\]: got gamma=1.2. Use 0 for forward"),
        ({"loss_type": "cakld", "gamma": math.nan}, "got gamma=nan"),
        ({"loss_type": "cakld", "gamma": "auto"}, "got gamma='auto'.*Or gamma='per_token'"),
        ({"loss_type": "cakld", "gamma": True}, "got gamma=True"),
        ({"loss_type": "forward_kl", "gamma": 0.5}, "`gamma` must be left out"),
        ({"loss_type": "forward_kl", "temperature": 0.0}, "`temperature` must be positive: got temperature=0.0"),
        ({"loss_type": "forward_kl", "temperature": math.inf}, "`temperature` must be positive"),
        ({"loss_type": "forward_kl", "ce_weight": -0.1}, "`ce_weight` must not be negative: got ce_weight=-0.1"),
        ({"loss_type": "forward_kl", "ce_weight": math.nan}, "`ce_weight` must not be negative"),
        ({"loss_type": "ce", "ce_weight": 0.5}, "`ce_weight` must be 0 where the loss names 'ce' itself"),
        ({"loss_type": "mixture", "weights": {"ce": 1.0}, "ce_weight": 0.5}, "`ce_weight` must be 0"),
        ({"loss_type": "jsd", "jsd_beta": 1.5}, r"`jsd_beta` must lie in \[0, 1\]: got jsd_beta=1.5"),
        ({"loss_type": "mixture"}, "`weights` must be given for loss_type='mixture'"),
        ({"loss_type": "jsd", "weights": {"jsd": 1.0}}, "`weights` must be given for loss_type='mixture', and only"),
        ({"loss_type": "mixture", "weights": {}}, "one must be positive"),
        ({"loss_type": "mixture", "weights": {"ce": 0.0}}, "one must be positive"),
        ({"loss_type": "mixture", "weights": {"ce": 1.0, "jsd": -1.0}}, "`weights` must not be negative"),
        ({"loss_type": "mixture", "weights": {"ce": 1.0, "jsd": math.nan}}, "`weights` must not be negative"),
        ({"loss_type": "mixture", "weights": {"cakld": 1.0}}, "`gamma` must be given for 'cakld'"),
    ],
)
def test_what_cannot_work_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Objective(**settings)


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Objective("cakld", gamma=2.0, temperature=-1.0, ce_weight=-1.0, jsd_beta=2.0)
    for name in ("gamma", "temperature", "ce_weight", "jsd_beta"):
        assert f"`{name}`" in str(caught.value)


def test_an_unknown_name_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(UnknownNameError, match=r"`loss_type` must be one of .*Did you mean 'cakld'\?"):
        Objective("cakl", gamma=0.5)
    with pytest.raises(UnknownNameError, match=r"`weights` must be one of .*Did you mean 'forward_kl'\?"):
        Objective("mixture", weights={"forward": 1.0})
    with pytest.raises(UnknownNameError):
        Objective("mixture", weights={"mixture": 1.0})


def test_the_two_parts_of_an_objective_add_up_to_it() -> None:
    whole = Objective("mixture", weights={"forward_kl": 2.0, "cakld": 0.5, "ce": 0.25}, gamma=0.75, temperature=2.0)
    divergences, cross_entropy = whole.parted()
    assert divergences.terms == {"forward_kl": 2.0, "cakld": 0.5}
    assert cross_entropy.terms == {"ce": 0.25}
    assert (divergences.gamma, cross_entropy.gamma, divergences.temperature) == (0.75, None, 2.0)
    assert not cross_entropy.needs_teacher
