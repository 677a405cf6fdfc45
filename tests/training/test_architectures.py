"""On every architecture the loss is that of the model's own logits: scale, cap, tied head, experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CohereConfig, Gemma2Config, Gemma2ForCausalLM, GraniteConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from bitdistiller_peft import BitDistillerConfig, get_bitdistiller_model
from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.training.forward import add_distill_forward, check_forward
from tests import tiny
from tests.training import helpers

SCALED = {
    "granite": lambda: GraniteConfig(**tiny.DECODER, logits_scaling=4.0, tie_word_embeddings=False),
    "cohere": lambda: CohereConfig(**tiny.DECODER, logit_scale=0.25, tie_word_embeddings=False, pad_token_id=0),
}


def check_against_logits(model: torch.nn.Module, folder: Path) -> None:
    rows = helpers.dataset(4)
    total, count = helpers.textbook_loss(model, helpers.batch(rows), gamma=0.4)
    run = helpers.trainer(model, folder, data=rows, eval_data=rows, max_steps=1)
    assert run.evaluate()["eval_loss"] == pytest.approx(total / count, rel=2e-4, abs=1e-7)
    run.train()  # with dropout where the architecture has it
    assert 0 < helpers.history(run)[0] < 20


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_the_loss_is_that_of_the_models_own_logits(bases: Path, tmp_path: Path, name: str) -> None:
    check_against_logits(helpers.student(bases, name, group_size=-1), tmp_path)


@pytest.mark.parametrize("name", SCALED)
def test_scaled_logits_are_honoured(tmp_path: Path, name: str, local_seed) -> None:
    with local_seed(0):
        config = SCALED[name]()
        model: PreTrainedModel = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
    model.lm_head.weight.data.mul_(50)
    check_against_logits(get_bitdistiller_model(model, BitDistillerConfig(bits=2, group_size=32)), tmp_path)


def test_capped_logits_are_honoured(tmp_path: Path, local_seed) -> None:
    with local_seed(0):
        model = Gemma2ForCausalLM(Gemma2Config(**tiny.GEMMA, final_logit_softcapping=2.0)).eval()
    model.model.norm.weight.data.add_(20)  # far into the cap
    check_against_logits(get_bitdistiller_model(model, BitDistillerConfig(bits=2, group_size=32)), tmp_path)


def test_an_architecture_with_other_logits_is_refused(bases: Path) -> None:
    model = helpers.base(bases)
    plain = model.forward

    def doubled(*args: object, **kwargs: object) -> object:
        output = plain(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    model.forward = doubled
    add_distill_forward(model)
    with pytest.raises(ConfigError, match="LlamaForCausalLM"):
        check_forward(model, torch.device("cpu"))


def test_a_patched_model_still_generates_and_returns_logits(bases: Path, tmp_path: Path) -> None:
    model = helpers.student(bases)
    tokens = tiny.token_ids(1, 4)
    before = model(input_ids=tokens).logits
    run = helpers.trainer(model, tmp_path)
    assert torch.equal(before, run.model(input_ids=tokens).logits)
    generated = run.model.generate(input_ids=tokens, max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 7)
