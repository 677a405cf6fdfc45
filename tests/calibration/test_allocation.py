"""Widths under a budget: the size is that of the file, fused layers agree, and what suffers most gets most."""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from bitdistiller_peft import BitDistillerConfig, allocate_bits, calibrate, get_bitdistiller_model
from bitdistiller_peft.calibration.allocation import _fused_name
from bitdistiller_peft.calibration.problem import Problem
from bitdistiller_peft.errors import ConfigError, TargetError, UnknownNameError
from bitdistiller_peft.hub.file_size import packed_file_bytes
from bitdistiller_peft.quantizers import QuantSpec
from tests.tiny import load, save_base, token_ids

BUDGET = 26.4  # most of these models are embeddings and a head
GRIDS = [{"grid": "int"}, {"grid": "nf"}, {"grid": "int_sym", "scale_dtype": "float32"}]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


@cache
def tied_model(folder: Path) -> nn.Module:
    return load(save_base("llama-tied", folder))


def weights(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def file_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "qwen2"])
@pytest.mark.parametrize("settings", GRIDS, ids=lambda s: s["grid"])
def test_the_predicted_size_is_the_files_and_within_the_budget(
    name: str, settings: dict[str, str], bases: Path, tmp_path: Path
) -> None:
    config = BitDistillerConfig(group_size=32, **settings)
    ends = [
        allocate_bits(
            load(save_base(name, bases)), None, token_ids(), config, num_bytes=10**8, choices=c, show_progress=False
        ).num_bytes
        for c in ((2, 3), (3, 4))
    ]
    for share in (0.0, 0.6):
        model = load(save_base(name, bases))
        total, limit = weights(model), ends[0] + int(share * (ends[1] - ends[0]))
        found = allocate_bits(model, None, token_ids(), config, num_bytes=limit, show_progress=False)
        student = get_bitdistiller_model(model, found.apply(config))
        packed = student.pack_and_unload(progressbar=False)
        packed.save_pretrained(tmp_path / str(share))
        assert file_size(tmp_path / str(share)) == found.num_bytes <= limit
        assert found.num_bytes > ends[0] - (ends[1] - ends[0])
        assert found.bits_per_weight == pytest.approx(8 * found.num_bytes / total)


def test_norms_of_bitnet_count(bases: Path, tmp_path: Path) -> None:
    config = BitDistillerConfig(group_size=32, subln="output", activation_bits=8)
    model = load(save_base("llama", bases))
    found = allocate_bits(model, None, token_ids(), config, bits_per_weight=30.0, choices=(2, 4), show_progress=False)
    get_bitdistiller_model(model, found.apply(config)).pack_and_unload(progressbar=False).save_pretrained(tmp_path)
    assert file_size(tmp_path) == found.num_bytes


def test_one_layer_alone_is_quantized_when_it_is_measured(bases: Path) -> None:
    """Against the model with that one layer's weights replaced by hand (no search: the grid has no range)."""
    config = BitDistillerConfig(grid="int", group_size=32, overrides={})
    model = load(save_base("llama", bases))
    ids = token_ids()
    found = allocate_bits(model, None, ids, config, bits_per_weight=30.0, show_progress=False)
    names = sorted(found.divergence)
    assert "model.layers.0.self_attn.q_proj,model.layers.0.self_attn.k_proj,model.layers.0.self_attn.v_proj" in names
    assert "model.layers.1.mlp.gate_proj,model.layers.1.mlp.up_proj" in names
    with torch.no_grad():
        wanted = model(ids).logits.double().log_softmax(-1)
        for group, bits in itertools.product(names[:3], (2, 4)):
            twin = load(save_base("llama", bases))
            student = get_bitdistiller_model(
                load(save_base("llama", bases)), BitDistillerConfig(bits=bits, group_size=32)
            )
            calibrate(student, None, None, objective="weight", show_progress=False)
            for name in group.split(","):
                layer = student.get_submodule(f"base_model.model.{name}")
                twin.get_submodule(name).weight.copy_(layer.active_student("weight")())
            ours = twin(ids).logits.double().log_softmax(-1)
            expected = (wanted.exp() * (wanted - ours)).sum(-1).mean()
            assert found.divergence[group][bits] == pytest.approx(float(expected), rel=1e-3)


def test_the_choice_is_the_best_of_all_that_fit(bases: Path) -> None:
    model = load(save_base("llama", bases))
    config = BitDistillerConfig(group_size=32, target_modules=["o_proj", "down_proj"])
    full, tight = (
        allocate_bits(model, None, token_ids(), config, bits_per_weight=budget, show_progress=False)
        for budget in (30.0, BUDGET)
    )
    assert set(full.bits.values()) == {4}
    assert tight.predicted >= full.predicted
    specs = {bits: QuantSpec.create("int", bits, group_size=32) for bits in (2, 3, 4)}
    best = float("inf")
    for widths in itertools.product((2, 3, 4), repeat=len(tight.bits)):
        chosen = {name: specs[bits] for name, bits in zip(tight.bits, widths, strict=True)}
        if packed_file_bytes(model, chosen) <= BUDGET * weights(model) / 8:
            best = min(best, sum(tight.divergence[n][b] for n, b in zip(tight.bits, widths, strict=True)))
    assert tight.predicted == pytest.approx(best)


def test_the_model_is_given_back_as_it_was(bases: Path) -> None:
    model = load(save_base("llama", bases)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = [type(module) for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    config = BitDistillerConfig(group_size=32)
    allocate_bits(model, None, token_ids(), config, bits_per_weight=16.0, show_progress=False)
    assert modules == [type(module) for module in model.modules()]
    assert model.training
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, ConfigError, "`bits_per_weight` or `num_bytes` must be given"),
        ({"bits_per_weight": 4.0, "num_bytes": 9}, ConfigError, "and not both"),
        ({"bits_per_weight": 0.5}, ConfigError, "must leave room for 2 bits everywhere"),
        ({"bits_per_weight": 4.0, "choices": (2,)}, ConfigError, "`choices` must hold two widths"),
        ({"bits_per_weight": 4.0, "choices": (2, 5)}, ConfigError, "5"),
    ],
    ids=["no budget", "two budgets", "too small", "one width", "no such width"],
)
def test_what_cannot_work_is_refused(
    settings: dict[str, object], error: type[Exception], message: str, bases: Path
) -> None:
    model = load(save_base("llama", bases))
    with pytest.raises(error, match=message):
        allocate_bits(model, None, token_ids(), BitDistillerConfig(group_size=32), show_progress=False, **settings)


def test_fused_experts_are_refused_by_name(bases: Path) -> None:
    with pytest.raises(TargetError, match=r"fused experts .* 'model\.layers\.0\.mlp\.experts'"):
        allocate_bits(
            load(save_base("mixtral", bases)),
            None,
            token_ids(),
            BitDistillerConfig(group_size=32),
            num_bytes=10**6,
            choices=(2, 3),
            show_progress=False,
        )


def test_the_result_reads_as_a_line(bases: Path) -> None:
    model = load(save_base("llama", bases))
    config = BitDistillerConfig(group_size=32)
    found = allocate_bits(model, None, token_ids(), config, num_bytes=10**6, show_progress=False)
    assert str(found) == f"14 layers at 4 bits: {found.num_bytes:,} bytes, {found.bits_per_weight:.3f} bits per weight"
    with pytest.raises(UnknownNameError):
        BitDistillerConfig(grid="none")


TABLES = [({"embedding_bits": 8}, ()), ({"embedding_bits": 4, "head_bits": 8}, ()), ({}, (4, 8))]


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize(("tables", "choices"), TABLES)
def test_embedding_and_head_are_in_the_budget(
    name: str, tables: dict[str, int], choices: tuple[int, ...], bases: Path, tmp_path: Path
) -> None:
    if name == "llama-tied" and len(tables) == 2:
        tables = {"head_bits": 4}
    config = BitDistillerConfig(group_size=32, **tables)
    model = load(save_base(name, bases))
    budget = {"choices": (2, 4), "table_choices": choices, "show_progress": False}
    found = allocate_bits(model, None, token_ids(), config, bits_per_weight=6.2, **budget)
    chosen = found.apply(config)
    if choices:
        assert chosen.embedding_bits in choices
    elif name == "llama":
        assert (chosen.embedding_bits, chosen.head_bits) == (tables.get("embedding_bits"), tables.get("head_bits"))
    else:
        assert chosen.embedding_bits == next(iter(tables.values()))
    assert "embedding at" in str(found)
    get_bitdistiller_model(model, chosen).pack_and_unload(progressbar=False).save_pretrained(tmp_path)
    assert file_size(tmp_path) == found.num_bytes <= 6.2 * weights(load(save_base(name, bases))) / 8
    assert all("embed_tokens" not in n and "lm_head" not in n for n in found.bits)


def test_the_embedding_alone_is_quantized_when_it_is_measured(bases: Path) -> None:
    model, ids = load(save_base("llama-tied", bases)), token_ids()
    config = BitDistillerConfig(group_size=32)
    found = allocate_bits(model, None, ids, config, num_bytes=10**7, table_choices=(2, 8), show_progress=False)
    student = get_bitdistiller_model(
        load(save_base("llama-tied", bases)), BitDistillerConfig(group_size=32, embedding_bits=2)
    )
    calibrate(student, None, None, objective="weight", show_progress=False)
    twin = load(save_base("llama-tied", bases))
    with torch.no_grad():
        twin.model.embed_tokens.weight.copy_(
            student.get_submodule("base_model.model.model.embed_tokens").active_student("weight")()
        )
        wanted, ours = (m(ids).logits.double().log_softmax(-1) for m in (model, twin))
    expected = float((wanted.exp() * (wanted - ours)).sum(-1).mean())
    assert found.divergence["model.embed_tokens"][2] == pytest.approx(expected, rel=1e-3)
    assert found.embedding_bits == 8


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_file_is_larger_than_the_budget_and_fused_layers_agree(data: st.DataObject, bases: Path) -> None:
    """Whatever layers cost: no measurement, only the choice."""
    model = tied_model(bases)
    names = [name for name, module in model.model.layers.named_modules() if isinstance(module, nn.Linear)]
    names = [f"model.layers.{name}" for name in names]
    groups = {_fused_name(name, set(names)) for name in names}
    price = st.floats(0, 10)
    costs = {group: {bits: data.draw(price) for bits in (2, 3, 4)} for group in sorted(groups)}
    costs["model.embed_tokens"] = {bits: data.draw(price) for bits in (4, 8)}
    specs = {
        bits: {name: QuantSpec.create("int", bits, group_size=32) for name in (*names, "model.embed_tokens")}
        for bits in (2, 3, 4, 8)
    }
    problem = Problem(model, specs, costs)
    least = problem.file_bytes(problem.smallest())
    near = {group: data.draw(st.sampled_from(sorted(prices))) for group, prices in costs.items()}
    near_size = problem.file_bytes({name: bits for group, bits in near.items() for name in group.split(",")})
    limit = near_size + data.draw(st.integers(-24, 24))
    found = problem.solve(limit)
    if found is None:
        assert limit < least
        return
    assert problem.file_bytes(found) <= limit
    for group in groups:
        assert len({found[name] for name in group.split(",")}) == 1
