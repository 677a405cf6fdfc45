"""Settings: default < file < command line; nothing unknown passes, and the message names place and nearest match."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from bitdistiller_peft.cli.dispatch import VERBS
from bitdistiller_peft.cli.parse import parse
from bitdistiller_peft.cli.schema import SECTIONS
from bitdistiller_peft.cli.verbs.calibrate import VERB as CALIBRATE
from bitdistiller_peft.cli.verbs.distill import VERB as DISTILL
from bitdistiller_peft.cli.verbs.eval import VERB as EVAL
from bitdistiller_peft.cli.verbs.run import VERB as RUN
from bitdistiller_peft.cli.yamlfile import dump_yaml, parse_value, parse_yaml, plain
from bitdistiller_peft.errors import ConfigError


@pytest.fixture
def write(tmp_path: Path):
    def to_file(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return to_file


def test_the_command_line_goes_before_the_file_and_the_file_before_the_default(write) -> None:
    path = write("distill:\n  learning_rate: 8e-6\n  max_steps: 7\n")
    found = parse(DISTILL, ["-c", str(path), "--max-steps", "9"])
    assert found["distill.learning_rate"] == 8e-6
    assert found["distill.max_steps"] == 9
    assert found["distill.num_train_epochs"] == 3.0
    assert found.origins == {
        "distill.learning_rate": f"{path}, line 2",
        "distill.max_steps": "command line",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "distill:\n  learning_rat: 1e-5\n",
            "line 2: unknown key 'learning_rat' under `distill`. Did you mean 'learning_rate'?",
        ),
        ("modle: x\n", "line 1: unknown key 'modle'. Did you mean 'model'?"),
        ("bits: 3\n", "line 1: unknown key 'bits'. It belongs under `quant`."),
        ("\ndistil:\n  max_steps: 3\n", "line 2: unknown key 'distil'. Did you mean 'distill'?"),
        ("distill:\n  max_steps: many\n", "line 2: `max_steps` must be a whole number: got max_steps='many'."),
        ("distill:\n  packing: 1\n", "line 2: `packing` must be true or false: got packing=1."),
        (
            "calibrate:\n  method: clp\n",
            "line 2: `method` must be one of ['clip', 'gptq', 'awq', 'blockwise']: got method='clp'. Did you mean 'cl",
        ),
        ("model: a\nmodel: b\n", "line 2: 'model' stands twice; first in line 1."),
        ("quant: 2\n", "line 1: `quant` must hold settings, indented under it: got 2."),
        ("model: [a\n", "not YAML"),
        ("- a\n", "line 1: the file must hold `key: value` lines."),
        ("3: a\n", "line 1: a key must be text: got 3."),
    ],
    ids=lambda value: value.strip().replace("\n", "/")[:30],
)
def test_a_fault_in_the_file_is_named_with_its_line(write, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(DISTILL, ["-c", str(write(text))])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning-rat", "1"], "unknown option '--learning-rat'. Did you mean '--learning-rate'?"),
        (["--lerning_rate=1"], "Did you mean '--learning-rate'?"),
        (["--max-steps", "x"], "`max_steps` must be a whole number"),
        (["--packing", "maybe"], "unrecognized arguments: maybe"),
        (["--packing=maybe"], "--packing must be true or false: got 'maybe'."),
        (["--model"], "expected one argument"),
        (["-c", "/nowhere.yaml"], "`config` must be a file that can be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_fault_on_the_command_line_is_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(DISTILL, arguments)
    assert message in str(caught.value)


def test_no_prefix_is_taken_for_a_flag() -> None:
    """`--learning_rat 0.25` sets the learning rate in TRL."""
    for section in SECTIONS.values():
        for option in section.options:
            with pytest.raises(ConfigError, match="unknown option"):
                parse(RUN, [f"--{section.key(option.name)[:-1]}", "1"])


def test_trl_spelling_works() -> None:
    found = parse(DISTILL, ["--learning_rate", "8e-6", "--packing", "True", "--gradient_checkpointing=false"])
    assert found["distill.learning_rate"] == 8e-6
    assert found["distill.packing"] is True
    assert found["distill.gradient_checkpointing"] is False


def test_settings_inherited_from_the_library_are_settings_too(write) -> None:
    path = write("distill: {weight_decay: 1e-2}\nquant: {overrides: {down_proj: {bits: 4}}}\ncalibrate: {epochs: 3}\n")
    found = parse(DISTILL, ["-c", str(path), "--adam-beta2", "0.95", "--quant.zero_point_range", "[1, 2]"])
    assert found["distill.weight_decay"] == 1e-2
    assert found["distill.adam_beta2"] == 0.95
    assert found["quant.overrides"] == {"down_proj": {"bits": 4}}
    assert found["quant.zero_point_range"] == [1, 2]
    assert found["calibrate.epochs"] == 3


def test_the_chain_spells_settings_with_their_section() -> None:
    found = parse(RUN, ["--quant.bits", "3", "--distill.learning-rate", "1e-5", "--calibrate.texts", "a", "b"])
    assert (found["quant.bits"], found["distill.learning_rate"]) == (3, 1e-5)
    assert found["calibrate.texts"] == ["a", "b"]
    with pytest.raises(ConfigError, match="unknown option '--bits'"):
        parse(RUN, ["--bits", "3"])


@pytest.mark.parametrize(
    ("text", "value"),
    [("8e-6", 8e-6), ("8.0e-6", 8e-6), ("1E5", 1e5), ("-1", -1), ("yes", "yes"), ("off", "off"), ("true", True),
     ("-.5", -0.5), ("3.11.2", "3.11.2"), ("[1, 2]", [1, 2]), ("e5", "e5"), ("1e", "1e"), ("[", "[")],
)  # fmt: skip
def test_values_are_read_as_people_mean_them(text: str, value: object) -> None:
    found = parse_value(text)
    assert found == value
    assert type(found) is type(value)


@given(
    st.dictionaries(
        st.text("abcdefg_", min_size=1),
        st.one_of(
            st.floats(allow_nan=False), st.integers(), st.booleans(), st.none(), st.text("abc 1e-:#yn.", max_size=8)
        ),
    )
)
def test_what_is_written_reads_the_same_here_and_in_plain_yaml(values: dict[str, object]) -> None:
    text = dump_yaml(values)
    assert plain(parse_yaml(text, Path("x"))) == values
    assert yaml.safe_load(text) == values


@pytest.mark.parametrize("name", VERBS)
def test_the_help_of_a_verb_is_short_and_names_its_settings(command, name: str) -> None:
    done = command(name, "--help")
    assert done.code == 0
    assert done.out.startswith(f"usage: bitdistiller {name}")
    assert len(done.out.splitlines()) <= 80
    assert max(map(len, done.out.splitlines())) <= 130


def test_help_all_shows_what_is_inherited(command) -> None:
    short, full = command("distill", "--help").out, command("distill", "--help-all").out
    assert "--weight-decay" in full
    assert "--weight-decay" not in short
    assert "--quant.bits" in command("run", "--help-all").out


def test_defaults_that_are_declared_are_those_of_the_library() -> None:
    """Otherwise leaving a setting out would mean another thing here than in Python."""
    import dataclasses
    import inspect

    from bitdistiller_peft import BitDistillerConfig, DistillConfig, calibrate, generate_teacher_data

    wanted = {"report_to": "none", "save_total_limit": 2}  # ours: no reports, no full disk
    for section, kind in (("quant", BitDistillerConfig), ("distill", DistillConfig)):
        known = {field.name: field.default for field in dataclasses.fields(kind)}
        for option in SECTIONS[section].options:
            if option.name in known and option.name not in wanted:
                assert option.default == getattr(known[option.name], "value", known[option.name]), option.name
    for section, function in (("calibrate", calibrate), ("generate", generate_teacher_data)):
        known = {name: p.default for name, p in inspect.signature(function).parameters.items()}
        for option in SECTIONS[section].options:
            if option.name in known and known[option.name] is not inspect.Parameter.empty:
                assert option.default == known[option.name], option.name


def test_a_flag_does_not_take_the_place_of_an_argument_of_the_same_name() -> None:
    found = parse(EVAL, ["out/packed", "--model", "base"])
    assert (found.arguments["model"], found["model"]) == ("out/packed", "base")
    assert parse(EVAL, ["--model", "base"]).arguments["model"] is None


def test_the_clip_search_has_its_own_flags() -> None:
    found = parse(CALIBRATE, ["--skip", "q_proj", "--bits", "3", "--texts", "a.txt"])
    assert found["calibrate.skip"] == "q_proj"
    assert found["quant.bits"] == 3
