"""The trainer adds attention-relation distillation: what it hears, what it adds, equal under any split of the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.training import DistillConfig
from bitdistiller_peft.training.attention import attention_modules, capture_attention, resolve_layer
from tests import tiny
from tests.reference.attention_relations import relation_loss
from tests.training.helpers import base, batch, config, dataset, difference, history, student, trainer, weights

PARTS = {
    "loss_type": "forward_kl",
    "gamma": "estimate",  # no cakld part: not used
    "logits_weight": 3.0,
    "ce_weight": 1.0,
    "temperature": 5.0,
    "rescale_temperature": False,
    "attention_weight": 50.0,
    "attention_split_heads": 8,
}


@torch.no_grad()
def by_hooks(model: Any, inputs: dict[str, torch.Tensor], layer: int) -> list[torch.Tensor]:
    """Queries, keys and values of a Llama, computed from the projections' outputs."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    attention = model.model.layers[layer].self_attn
    found: dict[str, torch.Tensor] = {}
    hooks = [
        getattr(attention, f"{name}_proj").register_forward_hook(
            lambda _m, _i, out, name=name: found.update({name: out})
        )
        for name in "qkv"
    ]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    q, k, v = (found[n].unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for n in "qkv")
    positions = torch.arange(q.shape[2]).unsqueeze(0)
    cos, sin = model.model.rotary_emb(v, positions)
    return [*apply_rotary_pos_emb(q, k, cos, sin), v]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_states_are_heard_after_rotary_embedding_and_before_repetition(implementation: str, tmp_path: Path) -> None:
    model = base(tmp_path)
    model.set_attn_implementation(implementation)
    inputs = {"input_ids": tiny.token_ids()}
    expected = by_hooks(model, inputs, 1)
    plain = model(**inputs).logits
    with capture_attention(model, 1) as heard:
        logits = model(**inputs).logits
    assert torch.equal(logits, plain)
    assert model.model.layers[1].self_attn.config is model.config
    assert len(heard) == 1
    assert [s.shape[1] for s in heard[0]] == [4, 2, 2]
    assert all(torch.equal(a, b) for a, b in zip(heard[0], expected, strict=True))


@pytest.mark.parametrize("name", ["qwen2", "gemma3", "gpt2", "opt", "qwen3-moe"])
def test_every_decoder_can_be_heard(name: str, tmp_path: Path) -> None:
    model = base(tmp_path, name)
    assert sorted(attention_modules(model)) == [0, 1]
    with capture_attention(model, 0) as heard:
        model(input_ids=tiny.token_ids())
    assert len(heard) == 1
    assert all(s.shape[0] == 2 and s.shape[2] == 9 for s in heard[0])


def test_the_loss_is_the_sum_of_its_parts_and_each_is_logged(tmp_path: Path) -> None:
    model, teacher = student(tmp_path, activation_bits=8, subln="output"), base(tmp_path, seed=1)
    rows = dataset(4)
    inputs = batch(rows)
    plain = {key: value for key, value in inputs.items() if key != "labels"}
    run = trainer(model, tmp_path / "run", data=rows, teacher=teacher, max_steps=1, learning_rate=0.0, **PARTS)
    layer = resolve_layer(teacher, None)
    with torch.no_grad():
        states = []
        for network in (model, teacher):
            with capture_attention(network, layer) as heard:
                network(**plain)
            states.append(list(heard[0]))
    expected = relation_loss(
        *states, inputs["attention_mask"], heads=8, kind="cosine", masking="padding", reduction="paper"
    )
    run.train()
    (entry,) = [entry for entry in run.state.log_history if "attention_relation" in entry]
    assert entry["attention_relation"] == pytest.approx(float(expected), rel=1e-4)
    total = entry["ce"] + 3.0 * entry["forward_kl"] + 50.0 * entry["attention_relation"]
    assert entry["loss"] == pytest.approx(total, rel=1e-5)


def test_accumulation_changes_nothing(tmp_path: Path) -> None:
    def run(size: int, steps: int) -> tuple[dict[str, torch.Tensor], list[float]]:
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        made = trainer(
            student(tmp_path), tmp_path / f"{size}", teacher=base(tmp_path, seed=1), **changes, **PARTS, max_steps=1
        )  # a second step would see flipped codes
        made.train()
        return weights(made.model), history(made, "attention_relation")

    whole, parts = run(8, 1), run(2, 4)
    assert difference(whole[0], parts[0]) < 1e-5
    assert whole[1] == pytest.approx(parts[1], rel=1e-5)


def test_relations_train_through_checkpointing_and_with_the_model_as_its_own_teacher(tmp_path: Path) -> None:
    def run(**changes: Any) -> dict[str, torch.Tensor]:
        settings = {**PARTS, "loss_type": "ce", "ce_weight": 0.0, "logits_weight": 1.0, **changes}
        made = trainer(student(tmp_path), tmp_path / "run", **settings)
        made.train()
        return weights(made.model)

    plain = run()
    checkpointed = run(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False})
    assert difference(plain, checkpointed) == 0
    assert difference(plain, run(attention_weight=0.0)) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_weight": -1.0}, "`attention_weight` must not be negative"),
        ({"logits_weight": 0.0}, "`logits_weight` must be positive"),
        ({"loss_type": "ce", "logits_weight": 2.0}, "must be 1.0 for loss_type='ce'"),
        ({"attention_weight": 1.0, "packing": True}, "relations would be taken across"),
        ({"attention_relation": "dot"}, "attention_relation"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, **changes)


def test_layers_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`attention_layer` must be a layer with attention: got attention_layer=7"):
        resolve_layer(base(tmp_path), 7)
    assert resolve_layer(base(tmp_path), -1) == 1
    with pytest.raises(ConfigError, match="it has no attention modules"):
        resolve_layer(torch.nn.Linear(2, 2), None)


def test_the_published_settings_can_be_written_down(tmp_path: Path) -> None:
    published = DistillConfig(
        str(tmp_path),
        loss_type="forward_kl",
        ce_weight=1.0,
        logits_weight=10.0,
        attention_weight=1e5,
        temperature=5.0,
        rescale_temperature=False,
        report_to="none",
    )
    assert published.objective(None).terms == {"forward_kl": 10.0, "ce": 1.0}
    assert published.relation_objective().split_heads == 32
