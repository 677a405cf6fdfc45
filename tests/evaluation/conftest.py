"""What evaluation tests share: a tiny model with a real tokenizer, and students of it."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
from peft import PeftModel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bitdistiller_peft import BitDistillerConfig, get_bitdistiller_model
from tests import standin, tiny


def opinionated(model: PreTrainedModel) -> PreTrainedModel:
    """Scale random weights up, so that layers and head have a say."""
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(6)
    return model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return standin.save_standin(tmp_path_factory.mktemp("standin"))


@pytest.fixture
def model(folder: Path) -> PreTrainedModel:
    return opinionated(tiny.load(folder))


@pytest.fixture
def student(model: PreTrainedModel) -> PeftModel:
    return get_bitdistiller_model(model, BitDistillerConfig(bits=2, group_size=32, train_other="norms"))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return standin.tokenizer()


@pytest.fixture(scope="session")
def text() -> str:
    return standin.english()[0]


@pytest.fixture(scope="session")
def with_bos() -> Callable[[], PreTrainedTokenizerFast]:
    """Make a tokenizer that puts a BOS before a text and an EOS behind it."""

    def make() -> PreTrainedTokenizerFast:
        fast = deepcopy(standin.tokenizer())
        pairs = [(token, fast.convert_tokens_to_ids(token)) for token in (fast.bos_token, fast.eos_token)]
        fast.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{fast.bos_token} $A {fast.eos_token}", special_tokens=pairs
        )
        return fast

    return make


@pytest.fixture
def twin(folder: Path) -> PreTrainedModel:
    """Another model with the weights of `model`."""
    return opinionated(tiny.load(folder))
