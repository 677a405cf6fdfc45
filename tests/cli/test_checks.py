"""What cannot work is refused before a model is loaded, on a dry run too, and no folder is left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bitdistiller_peft.cli import models
from bitdistiller_peft.cli.options import Option
from bitdistiller_peft.cli.schema import all_keys
from bitdistiller_peft.cli.verb import Settings
from tests.cli.conftest import Command, chain_yaml


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(models, "_load_plain", load)


GENERATE = {
    "no-prompts": (["--max-prompts", 0], 2, "`max_prompts` must be at least 1: got max_prompts=0"),
    "fewer-prompts": (["--max-prompts", -1], 2, "`max_prompts` must be at least 1"),
    "tokens": (["--max-new-tokens", -8], 2, "`max_new_tokens` must be a whole number of at least 1"),
    "batch": (["--batch-size", 0], 2, "`batch_size` must be"),
    "temperature": (["--temperature", -1], 2, "`temperature` must be"),
    "no-model": (["--model", "/nowhere"], 2, "`model` must be a folder that exists"),
    "not-a-model": (["--model", "{files}"], 3, "must hold a model: it has no config.json"),
}
CALIBRATE = {
    "group-size": (["--group-size", 48], 2, "model.layers.0.self_attn.q_proj"),
    "method": (["--method", "clop"], 2, "clop"),
    "epochs": (["--method", "blockwise", "--epochs", -1], 2, "`epochs` must be"),
    "no-model": (["--model", "/nowhere"], 2, "`model` must be a folder that exists"),
    "not-a-model": (["--model", "{files}"], 3, "must hold a model"),
}
DISTILL = {
    "rate": (["--learning-rate", -1, "--group-size", 32], 2, "`learning_rate` must be finite and not negative"),
    "group-size": (["--group-size", 48], 2, "model.layers.0.self_attn.q_proj"),
    "length": (["--max-length", 0, "--group-size", 32], 2, "`max_length` must be a positive integer or None"),
    "no-model": (["--model", "/nowhere", "--student", "out"], 2, "`model` must be a folder that exists"),
}
CACHE = {
    "batch": (["--cache.batch-size", 0], 2, "`batch_size` must be at least 1: got batch_size=0"),
    "k": (["--cache.k", 8], 2, "`k` must be left out for kind='hidden': got k=8"),
    "no-model": (["--model", "/nowhere"], 2, "`model` must be a folder that exists"),
    "no-teacher": (["--cache.teacher", "/nowhere"], 2, "`cache.teacher` must be a folder that exists"),
}
CASES = [
    pytest.param(verb, *case, id=f"{verb}-{name}")
    for verb, cases in (("generate", GENERATE), ("calibrate", CALIBRATE), ("distill", DISTILL), ("cache", CACHE))
    for name, case in cases.items()
]


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["run", "dry-run"])
@pytest.mark.parametrize(("verb", "arguments", "code", "message"), CASES)
def test_what_cannot_work_costs_nothing(
    command: Command, base: Path, files: Path, tmp_path: Path, verb: str, arguments: list[object], code: int,
    message: str, more: list[str],
) -> None:  # fmt: skip
    texts = {"generate": ["--prompts", files / "prompts.txt"], "calibrate": ["--texts", files / "text.txt"]}
    given = texts.get(verb, ["--data", files / "text.txt"])
    said = [str(argument).format(files=files) for argument in arguments]
    done = command(verb, "--model", base, "--output", tmp_path / "out", *given, *said, *more)
    assert (done.code, message in done.err) == (code, True), done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("generate.max_new_tokens=0", "`max_new_tokens` must be"),
        ("generate.max_prompts=0", "`max_prompts` must be"),
        ("quant.group_size=48", "model.layers.0.self_attn.q_proj"),
        ("calibrate.method=clop", "clop"),
    ],
)
def test_a_chain_is_judged_as_a_whole(
    command: Command, base: Path, files: Path, tmp_path: Path, change: str, message: str
) -> None:
    (tmp_path / "run.yaml").write_text(chain_yaml(base, files, tmp_path / "out"))
    key, _, value = change.partition("=")
    done = command("run", "-c", tmp_path / "run.yaml", f"--{key.replace('_', '-')}", value)
    assert (done.code, message in done.err) == (2, True), done.err
    assert not (tmp_path / "out").exists()


def test_the_revision_is_that_of_the_model_and_of_its_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    asked: list[tuple[str, object]] = []
    monkeypatch.setattr(
        AutoTokenizer, "from_pretrained", lambda source, revision=None: asked.append((source, revision))
    )
    values = {key: option.default for key, option in all_keys().items() if isinstance(option, Option)}
    named = Settings("eval", values | {"model": "me/model", "revision": "v1"})
    models.load_tokenizer("me/model", settings=named)
    models.load_tokenizer("me/other", settings=named)
    models.load_tokenizer("me/only", settings=named.with_values(model=None))
    assert asked == [("me/model", "v1"), ("me/other", None), ("me/only", "v1")]


def test_the_same_note_is_made_once(capsys: pytest.CaptureFixture[str]) -> None:
    from bitdistiller_peft.cli.verb import Console

    console = Console()
    for text in ("one", "two", "one"):
        console.note(text)
    assert capsys.readouterr().err == "one\ntwo\n"


@pytest.mark.usefixtures("no_loading")
def test_every_model_that_is_to_be_compared_must_be_there_before_the_first_is_loaded(
    command: Command, base: Path, files: Path, tmp_path: Path
) -> None:
    nowhere = str(tmp_path / "nowhere")
    for arguments in (["eval", base, "--teacher", nowhere], ["compare", base, nowhere]):
        done = command(*arguments, "--text", files / "text.txt", "--seq-len", 32)
        words = f"must be a folder that exists, or a name on the Hub: got '{nowhere}'"
        assert (done.code, words in done.err) == (2, True)
    done = command("eval", base, "--teacher", files, "--text", files / "text.txt")
    assert (done.code, "it has no config.json" in done.err) == (3, True)


@pytest.mark.usefixtures("no_loading")
def test_too_few_chunks_for_an_interval_are_refused_at_once(command: Command, base: Path, files: Path) -> None:
    done = command("compare", base, str(base) + "/", "--text", files / "text.txt", "--max-chunks", 4)
    assert (done.code, "`max_chunks` must be at least 5 for a comparison: got max_chunks=4" in done.err) == (2, True)


def test_a_chains_folder_stands_for_what_it_made(tmp_path: Path) -> None:
    for place, expected in (("calibrate/packed", "calibrate/packed"), ("distill/packed", "distill/packed")):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "config.json").write_text("{}")
        assert models.model_folder(str(tmp_path)) == str(tmp_path / expected)


def test_init_writes_no_file_that_cannot_work(command: Command, tmp_path: Path) -> None:
    done = command("init", tmp_path / "run.yaml", "--bits", 5)
    assert (done.code, "`bits` must be one of" in done.err, list(tmp_path.iterdir())) == (2, True, [])


def test_a_training_shorter_than_the_logging_steps_has_a_last_line(
    command: Command, base: Path, files: Path, tmp_path: Path
) -> None:
    arguments = ["distill", "--model", base, "--data", files / "text.txt", "--group-size", 32, "--device", "cpu"]
    arguments += ["--max-steps", 3, "--logging-steps", 2, "--max-length", 32, "--per-device-train-batch-size", 1]
    done = command(*arguments, "--bf16=false", "--output", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    logged = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in logged if "loss" in entry] == [2, 3]
    assert done.json["last"]["step"] == 3
