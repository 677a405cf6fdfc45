"""Divergences source by source, and what changed between two measurements."""

from __future__ import annotations

import pytest
import torch

from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.evaluation import evaluate_divergence, evaluate_sources

QUICK = {"seq_len": 12, "max_chunks": 2, "show_progress": False}


def test_each_source_is_measured_by_itself(student, tokenizer, text) -> None:
    texts = {"first": text, "second": text[200:]}
    found = evaluate_sources(student, "self", tokenizer, texts, **QUICK)
    for name, part in texts.items():
        alone = evaluate_divergence(student, "self", tokenizer, part, **QUICK)
        assert found.results[name].mean_kl_nats == alone.mean_kl_nats
    assert found.results["first"].mean_kl_nats != found.results["second"].mean_kl_nats
    assert str(found).startswith("first: KL(teacher")


def test_the_change_is_told(student, tokenizer, text) -> None:
    before = evaluate_sources(student, "self", tokenizer, {"own": text}, **QUICK)
    weight = next(
        p for n, p in student.named_parameters() if n.endswith("down_proj.bitdistiller_weight.default.weight")
    )
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.mul_(-1)
        after = evaluate_sources(student, "self", tokenizer, {"own": text}, **QUICK)
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    line = after.since(before).splitlines()[1].split()
    assert line[:3] == ["own", f"{before.results['own'].mean_kl_nats:.4f}", f"{after.results['own'].mean_kl_nats:.4f}"]
    assert line[3] != "+0.0%"
    with pytest.raises(ConfigError, match="source 'other'"):
        after.since(evaluate_sources(student, "self", tokenizer, {"other": text}, **QUICK))
    with pytest.raises(ConfigError, match="source 'own'"):
        after.since(evaluate_sources(student, "self", tokenizer, {"own": text}, **{**QUICK, "seq_len": 11}))
    with pytest.raises(ConfigError, match="must name a source"):
        evaluate_sources(student, "self", tokenizer, {})
