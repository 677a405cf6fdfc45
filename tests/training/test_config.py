"""The config is an `SFTConfig`: TRL's parser reads it, every default runs, every knob moves something."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import set_seed
from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser

from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.kernels import multiplies_bf16
from bitdistiller_peft.training import DistillConfig, DistillTrainer
from tests.training import helpers


def test_trls_parser_reads_yaml_and_command_line(tmp_path: Path) -> None:
    settings = tmp_path / "run.yaml"
    settings.write_text(
        "output_dir: out\nuse_cpu: true\nbf16: false\nloss_type: mixture\ngamma: 0.25\n"
        "loss_weights: {cakld: 1.0, ce: 0.5}\nscale_learning_rate: 1.0e-3\ndataset_name: none\n"
    )
    parser = TrlParser((ScriptArguments, DistillConfig, ModelConfig))
    command = ["--config", str(settings), "--temperature", "2.0", "--flip_rate_layers", "-1"]
    _, parsed, _ = parser.parse_args_and_config(command)
    assert isinstance(parsed, DistillConfig)
    assert (parsed.gamma, parsed.temperature, parsed.flip_rate_layers) == (0.25, 2.0, -1)
    assert parsed.scale_learning_rate == 1e-3
    assert parsed.objective(None).terms == {"cakld": 1.0, "ce": 0.5}


@pytest.mark.parametrize(("text", "gamma"), [("0.25", 0.25), ("estimate", "estimate"), ("per_token", "per_token")])
def test_gamma_on_the_command_line_is_a_number_or_a_word(tmp_path: Path, text: str, gamma: object) -> None:
    command = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false", "--gamma", text]
    (parsed,) = TrlParser((DistillConfig,)).parse_args_and_config(command)
    assert parsed.gamma == gamma


def test_dictionaries_on_the_command_line_are_json(tmp_path: Path) -> None:
    command = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false", "--loss_type", "mixture"]
    command += ["--loss_weights", '{"forward_kl": 1, "ce": 0.5}', "--teacher_init_kwargs", '{"dtype": "bfloat16"}']
    (parsed,) = TrlParser((DistillConfig,)).parse_args_and_config(command)
    assert parsed.loss_weights == {"forward_kl": 1, "ce": 0.5}
    assert parsed.teacher_init_kwargs == {"dtype": "bfloat16"}


def test_our_fields_do_not_shadow_those_of_sft_except_the_loss() -> None:
    ours = set(DistillConfig.__annotations__)
    assert ours & set(SFTConfig.__dataclass_fields__) == {"loss_type"}


def test_the_help_names_every_field() -> None:
    for name in DistillConfig.__annotations__:
        assert DistillConfig.__dataclass_fields__[name].metadata["help"]
        assert f"        {name}: " in (DistillConfig.__doc__ or "")


@pytest.mark.parametrize(
    ("knob", "other"),
    [
        ("loss_type", "jsd"),
        ("gamma", 0.9),
        ("ce_weight", 0.5),
        ("temperature", 3.0),
        ("teacher", "other"),
        ("scale_learning_rate", 0.5),
        ("zero_point_learning_rate", 0.5),
    ],
)
def test_every_knob_moves_the_student(bases: Path, tmp_path: Path, knob: str, other: Any) -> None:
    def trained(**changes: Any) -> dict[str, Any]:
        model = helpers.student(bases, learn_zero_point=True)
        for name, parameter in model.named_parameters():
            if name.endswith("_scale"):
                parameter.data.mul_(0.7)  # a zero point learns from clamped weights alone
        run = helpers.trainer(model, tmp_path / "run", max_steps=1, **changes)
        run.train()
        return helpers.weights(model)

    if knob == "teacher":
        other = str(tmp_path / "teacher")
        helpers.base(bases, seed=1).save_pretrained(other)
    if knob == "loss_type":
        assert helpers.difference(trained(gamma="estimate"), trained(loss_type=other, gamma="estimate")) > 0
        return
    assert helpers.difference(trained(), trained(**{knob: other})) > 0


@pytest.mark.parametrize(("knob", "value"), [("jsd_beta", 0.1), ("rescale_temperature", False)])
def test_knobs_of_other_losses_move_the_student(bases: Path, tmp_path: Path, knob: str, value: Any) -> None:
    common = {"loss_type": "jsd", "gamma": "estimate", "temperature": 2.0, "max_steps": 1}
    runs = [helpers.trainer(helpers.student(bases), tmp_path, **common | extra) for extra in ({}, {knob: value})]
    for run in runs:
        run.train()
    assert helpers.difference(*(helpers.weights(run.model) for run in runs)) > 0


@pytest.mark.parametrize("rate", ["learning_rate", "scale_learning_rate", "zero_point_learning_rate"])
@pytest.mark.parametrize("value", [-1e-5, math.nan, math.inf])
def test_learning_rates_that_cannot_be_are_refused(tmp_path: Path, rate: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"`{rate}` must be finite and not negative"):
        helpers.config(tmp_path, **{rate: value})
    assert getattr(helpers.config(tmp_path, **{rate: 0.0}), rate) == 0.0


@pytest.mark.parametrize("loss", ["cakld", "forward_kl", "reverse_kl", "jsd", "ce"])
def test_every_loss_learns(bases: Path, tmp_path: Path, loss: str) -> None:
    set_seed(0)
    settings = {"loss_type": loss, "gamma": "estimate", "max_steps": 8, "learning_rate": 1e-3, "optim": "adamw_torch"}
    run = helpers.trainer(
        helpers.student(bases), tmp_path, data=helpers.dataset(4), per_device_train_batch_size=4, **settings
    )
    run.train()
    losses = helpers.history(run)
    assert losses[-1] < losses[0]


def test_conversations_are_trained_on_the_assistants_turns_alone(bases: Path, tmp_path: Path) -> None:
    from datasets import Dataset

    tokenizer = helpers.tokenizer().__class__.from_pretrained(_saved_tokenizer(tmp_path))
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + ' </s>' }}"
        "{% endgeneration %}{% else %}{{ '<s> ' + m.content + ' ' }}{% endif %}{% endfor %}"
    )
    rows = Dataset.from_dict(
        {"messages": [[{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4 w5"}]] * 2}
    )
    model = helpers.student(bases)
    args = helpers.config(tmp_path, assistant_only_loss=True, max_steps=1)
    run = DistillTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    assert run.train_dataset[0]["labels"] == [-100, -100, -100, 6, 7, 8, 2]
    run.train()
    assert len(helpers.history(run)) == 1


def _saved_tokenizer(folder: Path) -> Path:
    helpers.tokenizer().save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


@pytest.mark.parametrize("completion_only", [None, False])
def test_prompts_are_left_out_unless_asked_for(bases: Path, tmp_path: Path, completion_only: bool | None) -> None:
    from datasets import Dataset

    rows = Dataset.from_dict({"prompt": ["w1 w2"] * 2, "completion": [" w3 w4"] * 2})
    run = helpers.trainer(helpers.student(bases), tmp_path, data=rows, completion_only_loss=completion_only)
    expected = [4, 5, 6, 7, 2] if completion_only is False else [-100, -100, 6, 7, 2]
    assert run.train_dataset[0]["labels"] == expected
    run.train()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="about machines without an accelerator")
def test_the_defaults_run_on_a_machine_without_an_accelerator(tmp_path: Path) -> None:
    args = DistillConfig(str(tmp_path))
    assert args.use_cpu
    assert args.bf16 is multiplies_bf16("cpu")


@dataclass
class _Extended(DistillConfig):
    extra: int = field(default=1)


def test_the_config_can_be_extended(tmp_path: Path) -> None:
    assert _Extended(str(tmp_path), use_cpu=True, bf16=False, extra=3).extra == 3


@pytest.mark.parametrize("has_bf16", [True, False], ids=["with", "without"])
@pytest.mark.parametrize("said", [None, True, False])
def test_a_processor_computes_in_bf16_where_it_can_or_must(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_bf16: bool, said: bool | None
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    values = {} if said is None else {"bf16": said}
    config = DistillConfig(str(tmp_path), use_cpu=True, report_to="none", **values)
    assert config.bf16 is (has_bf16 if said is None else said)
