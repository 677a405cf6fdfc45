"""A YAML file of settings is not believed either: no aliases, no depth, no objects; file, line and remedy are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitdistiller_peft.cli.options import Option, convert
from bitdistiller_peft.cli.parse import parse
from bitdistiller_peft.cli.verbs import calibrate
from bitdistiller_peft.cli.yamlfile import MAX_YAML, parse_value
from bitdistiller_peft.errors import ConfigError

BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
SETTINGS = {
    "aliases": ("a: &a 1\nb: *a\n", "no aliases"),
    "a-bomb-of-aliases": (BOMB, "no aliases"),
    "a-loop": ("quant: &q\n  bits: *q\n", "no aliases"),
    "merge": ("quant: &q {bits: 2}\ncalibrate:\n  <<: *q\n", "no aliases"),
    "nested-deep": ("model: " + "[" * 50_000, "nested too deeply"),
    "mappings-deep": ("".join("  " * n + "a:\n" for n in range(900)), "nested too deeply|unknown key"),
    "an-object": ("model: !!python/object/apply:os.system [true]\n", "not YAML"),
    "a-name": ("model: !!python/name:os.system\n", "not YAML"),
    "a-date-that-is-none": ("seed: 2001-99-99\n", "not YAML"),
    "bytes": ("model: !!binary 'YQ=='\n", "`model` must be text"),
    "a-number-of-5000-digits": ("seed: " + "9" * 5000 + "\n", "not YAML"),
    "a-large-number": ("seed: 1" + "0" * 400 + "\n", "`seed` must be a whole number"),
    "infinity": ("seed: .inf\n", "`seed` must be a whole number"),
    "nan": ("seed: .nan\n", "`seed` must be a whole number"),
    "a-list-for-a-number": ("seed: [1]\n", "`seed` must be a whole number"),
    "a-mapping-for-a-text": ("model: {a: b}\n", "`model` must be text"),
    "a-list-for-a-section": ("quant: [1]\n", "must hold settings"),
    "a-text-for-a-section": ("quant: all\n", "must hold settings"),
    "a-key-that-is-a-number": ("1: 2\n", "a key must be text"),
    "a-key-that-is-a-list": ("? [a]\n: 2\n", "a key must be text|not YAML"),
    "a-key-that-is-a-mapping": ("quant:\n  ? {a: b}\n  : 2\n", "a key must be text|not YAML"),
    "a-key-twice": ("seed: 1\nseed: 2\n", "stands twice"),
    "two-documents": ("seed: 1\n---\nseed: 2\n", "not YAML"),
    "a-list": ("- seed\n", "must hold `key: value`"),
    "a-text": ("seed\n", "must hold `key: value`"),
    "a-tab": ("quant:\n\tbits: 2\n", "not YAML"),
    "a-null-character": ("seed: \0\n", "not YAML"),
    "too-long": ("#" * MAX_YAML + "\n", "at most"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_cannot_be_are_refused_with_file_and_remedy(name: str, tmp_path: Path) -> None:
    content, words = SETTINGS[name]
    path = tmp_path / "run.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=words) as caught:
        parse(calibrate.VERB, ["-c", str(path)])
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_settings_that_are_no_text_are_refused(tmp_path: Path) -> None:
    for content in (b"seed: \xff\n", b"\xff\xfes\0"):
        (tmp_path / "run.yaml").write_bytes(content)
        with pytest.raises(ConfigError, match=r"run\.yaml"):
            parse(calibrate.VERB, ["-c", str(tmp_path / "run.yaml")])
    with pytest.raises(ConfigError, match=r"`config` must be a file"):
        parse(calibrate.VERB, ["-c", str(tmp_path)])


@pytest.mark.parametrize("text", ["[" * 50_000, "*a", "2001-99-99", "9" * 5000])
def test_a_value_on_the_command_line_that_is_no_yaml_is_text(text: str) -> None:
    assert parse_value(text) == text


@pytest.mark.parametrize(("kind", "value"), [("int", float("inf")), ("int", 10**400), ("float", 10**400)])
def test_numbers_that_mean_nothing_are_refused(kind: str, value: object) -> None:
    with pytest.raises(ConfigError, match=r"`rate` must be"):
        convert(Option("rate", kind, "", None), value)
