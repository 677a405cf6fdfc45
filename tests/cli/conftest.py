"""A tiny model, texts and prompts that the verbs run on, and the command itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bitdistiller_peft.cli import main
from tests.standin import english, save_standin


class Done(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Command = Callable[..., Done]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command in this process."""

    def run(*arguments: object) -> Done:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Done(code, out, err)

    return run


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny full-precision model with its tokenizer."""
    return save_standin(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`text.txt` and `prompts.txt`."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "text.txt").write_text("\n\n".join(english()[:4]), encoding="utf-8")
    (folder / "prompts.txt").write_text("What is a class?\n\nWhat is a slice?\nName a loop.\n", encoding="utf-8")
    return folder


def chain_yaml(base: Path, files: Path, output: Path) -> str:
    """A whole chain that takes a second."""
    return f"""\
model: {base}
output: {output}
device: cpu
quant: {{bits: 2, group_size: 32}}
calibrate:
  texts: [{files / "text.txt"}]
  num_samples: 2
  seq_len: 64
generate:
  prompts: {files / "prompts.txt"}
  max_new_tokens: 8
distill:
  learning_rate: 1e-4
  max_steps: 2
  per_device_train_batch_size: 1
  max_length: 64
  gradient_checkpointing: false
  bf16: false
  save_steps: 1
  logging_steps: 1
eval:
  text: [{files / "text.txt"}]
  seq_len: 64
  max_chunks: 6
"""


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A packed model with its tokenizer, rounded to nearest."""
    from transformers import AutoModelForCausalLM

    from bitdistiller_peft import BitDistillerQuantConfig
    from tests.standin import tokenizer

    folder = tmp_path_factory.mktemp("packed") / "model"
    config = BitDistillerQuantConfig(bits=2, group_size=32)
    AutoModelForCausalLM.from_pretrained(base, quantization_config=config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
