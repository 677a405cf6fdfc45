"""Embeddings and head that were one tensor are trained as two once they are untied as the refusal says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from bitdistiller_peft import BitDistillerConfig, get_bitdistiller_model, use_backend
from bitdistiller_peft.errors import TargetError
from tests import tiny
from tests.training import helpers

CONFIG = {"group_size": 32}


def test_the_remedy_for_a_tied_head_trains_packs_and_reloads(bases: Path, tmp_path: Path) -> None:
    model = helpers.base(bases, "llama-tied")
    config = BitDistillerConfig.from_recipe("bitdistiller", **CONFIG)
    with pytest.raises(TargetError, match="train_other='norms'") as refusal:
        get_bitdistiller_model(model, config)
    remedy = re.search(r"second matrix: (.*)\.$", str(refusal.value))
    assert remedy is not None
    exec(remedy[1], {"model": model, "torch": torch})
    student = get_bitdistiller_model(model, BitDistillerConfig.from_recipe("bitdistiller", **CONFIG))
    with student.disable_adapter():
        before = student(tiny.token_ids()).logits.detach().clone()
    run = helpers.trainer(student, tmp_path / "run", learning_rate=0.5)
    run.train()
    with student.disable_adapter():
        assert torch.equal(student(tiny.token_ids()).logits, before)
    packed = student.pack_and_unload(progressbar=False)
    embeddings, head = packed.get_input_embeddings().weight, packed.get_output_embeddings().weight
    assert not torch.equal(embeddings, head)
    packed.save_pretrained(tmp_path / "packed")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(reloaded.get_output_embeddings().weight, head)
    with use_backend("reference"):
        assert torch.equal(reloaded(tiny.token_ids()).logits, packed(tiny.token_ids()).logits)
