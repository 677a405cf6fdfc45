"""Each verb does what it says on a tiny model, and refuses what it should with the code that it promises."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM

from bitdistiller_peft import BitDistillerConfig, get_bitdistiller_model
from bitdistiller_peft.cli.verbs import estimate, serve
from bitdistiller_peft.cli.yamlfile import plain, read_yaml
from tests.cli.conftest import Command, chain_yaml

WEIGHTS = "model.safetensors"


def test_env_tells_versions(command: Command) -> None:
    done = command("env", "--json")
    assert done.code == 0
    assert done.json["torch"] == torch.__version__
    assert done.json["plugged into"] == "peft, transformers"
    assert "accelerator" in done.json


# ------------------------------------------------------------------------------------------------ inspect, verify


def test_inspect_counts_every_byte_and_every_weight(command: Command, packed: Path, base: Path) -> None:
    found = command("inspect", packed, "--json").json
    assert found["kind"] == "packed"
    assert found["quantization"]["bits"] == 2
    dense = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(base).parameters())
    assert found["weights"] == dense
    header = 8 + int.from_bytes((packed / WEIGHTS).read_bytes()[:8], "little")
    assert found["bytes"] == (packed / WEIGHTS).stat().st_size - header
    assert found["bits_per_weight"] == pytest.approx(8 * found["bytes"] / dense, abs=1e-4)
    parts = {row["part"]: row for row in found["parts"]}
    assert set(parts) == {"codes", "scales", "zero points", "embeddings and head", "norms"}
    assert 8 * parts["codes"]["bytes"] == 2 * parts["codes"]["weights"]
    assert command("inspect", base, "--json").json["kind"] == "full precision"


def test_inspect_agrees_with_the_summary_of_the_loaded_model(command: Command, packed: Path) -> None:
    from bitdistiller_peft import quant_summary

    summary = quant_summary(AutoModelForCausalLM.from_pretrained(packed))
    found = command("inspect", packed, "--json").json
    assert found["bytes"] == summary.num_bytes
    assert found["bits_per_weight"] == pytest.approx(summary.bits_per_weight, abs=1e-4)


def test_verify_passes_a_sound_folder_and_names_what_differs(command: Command, packed: Path, tmp_path: Path) -> None:
    assert command("verify", packed).code == 0
    assert command("verify", packed, "--fast", "--json").json["checksum"] == "CRC-32"
    damaged = shutil.copytree(packed, tmp_path / "damaged")
    content = bytearray((damaged / WEIGHTS).read_bytes())
    content[-3] ^= 1
    (damaged / WEIGHTS).write_bytes(content)
    for more in ([], ["--fast"]):
        done = command("verify", damaged, *more)
        assert done.code == 3
        assert f"{WEIGHTS} must equal what was saved: tensor" in done.err
        assert "Traceback" not in done.err
    (damaged / "bitdistiller.json").unlink()
    assert command("verify", damaged).code == 3
    assert command("verify", tmp_path / "nothing").code == 3


# ------------------------------------------------------------------------------------------------ calibrate


def test_calibrate_writes_the_student_its_settings_and_if_asked_the_packed_model(
    command: Command, base: Path, files: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    arguments = ["calibrate", "--model", base, "--group-size", "32", "--texts", files / "text.txt"]
    arguments += ["--num-samples", "2", "--seq-len", "64", "--output", output, "--device", "cpu", "--pack"]
    done = command(*arguments, "--json")
    assert done.code == 0, done.err
    assert done.json["packed"] == str(output / "packed")
    model = AutoModelForCausalLM.from_pretrained(output / "packed")
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()
    written = plain(read_yaml(output / "resolved.yaml"))
    assert written["quant"]["group_size"] == 32
    assert written["calibrate"]["num_samples"] == 2
    assert "output" not in written
    again = command(*arguments)
    assert (again.code, "calibrated before" in again.out) == (0, True)
    other = command(*arguments, "--bits", "3")
    assert other.code == 2
    assert "quant.bits was 2, is 3" in other.err
    same = command("calibrate", "-c", output / "resolved.yaml", "--output", output)
    assert same.code == 0, "the resolved settings work as a config file"


@pytest.mark.parametrize(
    ("method", "option", "other"),
    [
        ("gptq", ("--damping", 0.05), ("--alphas", "[0.0, 0.5]")),
        ("awq", ("--alphas", "[0.0, 0.5]"), ("--damping", 0.05)),
    ],
)
def test_every_method_of_the_library_is_one_of_the_command_with_its_own_options(
    command: Command,
    base: Path,
    files: Path,
    tmp_path: Path,
    method: str,
    option: tuple[Any, ...],
    other: tuple[Any, ...],
) -> None:
    arguments = ["calibrate", "--model", base, "--group-size", "32", "--texts", files / "text.txt", "--method", method]
    arguments += ["--num-samples", "2", "--seq-len", "64", "--output", tmp_path / "out", "--device", "cpu", "--pack"]
    refused = command(*arguments, *other)
    assert (refused.code, method in refused.err) == (2, True), refused.err
    done = command(*arguments, *option, "--json")
    assert (done.code, done.json["method"]) == (0, method)
    assert torch.isfinite(
        AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "packed")(torch.arange(8)[None]).logits
    ).all()


def test_an_output_folder_of_something_else_is_refused_and_left_alone(
    command: Command, base: Path, files: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    done = command(
        "calibrate", "--model", base, "--group-size", 32, "--texts", files / "text.txt", "--output", tmp_path
    )
    assert done.code == 2
    assert "holds other files" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_dry_run_shows_the_settings_and_writes_nothing(
    command: Command, base: Path, files: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    cases = {
        "calibrate": ["--texts", files / "text.txt", "--group-size", 32],
        "generate": ["--prompts", files / "prompts.txt"],
    }
    for verb, more in cases.items():
        done = command(verb, "--model", base, *more, "--output", output, "--dry-run")
        assert done.code == 0
        assert f"model: {base}" in done.out
        assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["calibrate", "--texts", "python-topics", "--output", "x"], 2, "`model` must be given: pass --model"),
        (["calibrate", "--model", "BASE", "--output", "x"], 2, "`calibrate.texts` must be given"),
        (["calibrate", "--model", "BASE", "--texts", "nowhere.txt", "--output", "x"], 2, "a text must be a file"),
        (["calibrate", "--model", "./nowhere", "--texts", "python-topics", "--output", "OUT"], 2, "folder that exists"),
        (["calibrate", "--model", "BASE", "--bits", "5", "--texts", "python-topics", "--output", "OUT"], 2, "`bits`"),
        (["calibrate", "--model", "BASE", "--group-size", "48", "--texts", "python-topics", "--output", "OUT"], 2,
         "`group_size` must divide"),
        (["generate", "--model", "BASE", "--output", "x"], 2, "`generate.prompts` must be given"),
        (["distill", "--model", "BASE", "--output", "x"], 2, "`distill.data` must be given"),
        (["eval", "BASE"], 2, "`eval.text` must be given"),
        (["eval", "--text", "python-topics"], 2, "`MODEL` must be given"),
        (["eval", "BASE", "--text", "python-topics", "--seq-len", "9999"], 2, "`seq_len` must fit the context"),
        (["eval", "BASE", "--text", "python-topics", "--device", "cuda:7"], 2, "`device` must be"),
        (["compare", "BASE", "--text", "python-topics"], 2, "`MODELS` must be two or more"),
        (["push", "BASE"], 2, "`push.repo` must be given"),
        (["push", "BASE", "--repo", "user/name"], 3, "must hold a quantized model"),
        (["push", "BASE", "--repo", "a b"], 2, "`repo` must be like user/name"),
        (["run"], 2, "`output` must be given"),
    ],
    ids=lambda value: "-".join(map(str, value))[:40] if isinstance(value, list) else "",
)  # fmt: skip
def test_a_fault_of_the_user_is_one_line_without_a_traceback(
    command: Command, base: Path, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    named = {"BASE": str(base), "OUT": str(tmp_path / "out")}
    done = command(*(named.get(argument, argument) for argument in arguments))
    assert done.code == code
    assert message in done.err.splitlines()[-1]
    assert "Traceback" not in done.err


def test_debug_shows_the_traceback(command: Command) -> None:
    assert "Traceback" in command("run", "--debug").err


# ---------------------------------------------------------------------------------------- generate, eval, compare


def test_generate_answers_every_prompt_as_a_chat(command: Command, base: Path, files: Path, tmp_path: Path) -> None:
    arguments = ["generate", "--model", base, "--prompts", files / "prompts.txt", "--max-new-tokens", "4"]
    done = command(*arguments, "--output", tmp_path / "data", "--json")
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in (tmp_path / "data" / "teacher_data.jsonl").read_text().splitlines()]
    assert len(rows) == done.json["rows"] == 3
    assert rows[0]["prompt"] == [{"role": "user", "content": "What is a class?"}]
    text = command(*arguments, "--prompt-format", "text", "--max-prompts", "2", "--output", tmp_path / "text")
    assert text.code == 0
    rows = [json.loads(line) for line in (tmp_path / "text" / "teacher_data.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["What is a class?", "What is a slice?"]


def test_eval_scores_a_packed_model_and_its_distance_from_the_teacher(
    command: Command, base: Path, packed: Path, files: Path, tmp_path: Path
) -> None:
    from bitdistiller_peft import evaluate_perplexity
    from tests.standin import tokenizer

    how = ["--text", files / "text.txt", "--seq-len", "64", "--max-chunks", "3"]
    done = command("eval", packed, *how, "--teacher", base, "--output", tmp_path / "eval", "--json")
    assert done.code == 0, done.err
    (row,) = done.json["rows"]
    direct = evaluate_perplexity(
        AutoModelForCausalLM.from_pretrained(packed),
        tokenizer(),
        (files / "text.txt").read_text(),
        seq_len=64,
        max_chunks=3,
    )
    assert row["perplexity"]["perplexity"] == direct.perplexity
    assert row["perplexity"]["state"] == "packed"
    assert row["divergence"]["mean_kl_nats"] > 0
    assert row["divergence"]["teacher_state"] == "full_precision"
    assert json.loads((tmp_path / "eval" / "result.json").read_text())["rows"][0]["model"] == str(packed)
    assert direct.protocol in (tmp_path / "eval" / "results.md").read_text()


def test_compare_pairs_every_two_models_chunk_by_chunk(
    command: Command, base: Path, packed: Path, files: Path, tmp_path: Path
) -> None:
    again = shutil.copytree(packed, tmp_path / "again")
    how = ["--text", files / "text.txt", "--seq-len", "64", "--max-chunks", "8"]
    result = command("compare", base, packed, again, *how, "--output", tmp_path / "out", "--json").json
    full, quantized, _ = (row["perplexity"] for row in result["rows"])
    assert [(pair["first"], pair["other"]) for pair in result["pairs"]] == [
        (str(base), str(packed)),
        (str(base), str(again)),
        (str(packed), str(again)),
    ]
    first, _, same = result["pairs"]
    mean = sum(b - a for a, b in zip(full["chunk_nll_nats"], quantized["chunk_nll_nats"], strict=True)) / 8
    assert first["difference"] == pytest.approx(mean, abs=1e-12)
    assert first["low"] <= first["difference"] <= first["high"]
    assert first["perplexity_ratio"] == pytest.approx(quantized["perplexity"] / full["perplexity"])
    assert (same["difference"], same["low"], same["high"], same["significant"]) == (0, 0, 0, False)
    assert result["protocol"] in (tmp_path / "out" / "results.md").read_text()
    few = command("compare", base, packed, *how[:4], "--max-chunks", "2")
    assert (few.code, "at least 5 for a comparison" in few.err) == (2, True)


@pytest.mark.parametrize("twice", [False, True], ids=["one", "twice"])
def test_compare_wants_models_that_differ(command: Command, base: Path, files: Path, twice: bool) -> None:
    done = command("compare", *[base] * (1 + twice), "--text", files / "text.txt")
    assert (done.code, "two or more, each once" in done.err) == (2, True)


@pytest.mark.parametrize("verb", ["eval", "compare"])
def test_something_to_measure_on_must_be_given(command: Command, base: Path, packed: Path, verb: str) -> None:
    done = command(verb, packed, *([base] if verb == "compare" else []))
    assert (done.code, "`eval.text` must be given, or `eval.tasks`" in done.err) == (2, True)


# ------------------------------------------------------------------------------------------------ chat, serve


def test_chat_streams_the_greedy_answer(command: Command, packed: Path) -> None:
    arguments = ["chat", packed, "--prompt", "What is a class?", "--max-new-tokens", "12"]
    answer = command(*arguments, "--json").json["turns"][0]["answer"]
    assert answer
    assert command(*arguments).out == answer + "\n"


def test_chat_reads_lines_until_exit(command: Command, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n/exit\nthree\n"))
    turns = command("chat", packed, "--max-new-tokens", "2", "--json").json["turns"]
    assert [turn["prompt"] for turn in turns] == ["one", "two"]


def test_serve_hands_over_to_transformers(command: Command, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.cli.serve
    import transformers.utils.import_utils

    asked: dict[str, Any] = {}
    monkeypatch.setattr(transformers.utils.import_utils, "is_serve_available", lambda: True)
    monkeypatch.setattr(transformers.cli.serve, "Serve", lambda **kwargs: asked.update(kwargs))
    done = command("serve", packed, "--port", "8123", "--device", "cpu")
    assert done.code == 0, done.err
    assert asked == {
        "force_model": str(packed), "device": "cpu", "dtype": "auto", "host": "localhost", "port": 8123,
        "default_seed": 0,
    }  # fmt: skip
    monkeypatch.setattr(transformers.utils.import_utils, "is_serve_available", lambda: False)
    assert "pip install 'transformers[serving]'" in command("serve", packed).err
    assert serve.VERB.name == "serve"


# ------------------------------------------------------------------------------------------------ push


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Takes `HfApi`'s place: nothing leaves the machine."""
    seen = SimpleNamespace(files={}, repository=None, card=None)

    def create_repo(self: HfApi, repo_id: str, **kwargs: Any) -> SimpleNamespace:
        seen.repository = {"repo_id": repo_id, **kwargs}
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self: HfApi, repo_id: str, operations: list[Any], **kwargs: Any) -> SimpleNamespace:
        for operation in operations:
            with operation.as_file() as file:
                seen.files[operation.path_in_repo] = file.read()
        return SimpleNamespace(commit_url=f"https://example.com/{repo_id}")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(HfApi, "file_exists", lambda self, repo, name, **kwargs: name == "README.md" and seen.card)
    monkeypatch.setattr(HfApi, "hf_hub_download", lambda *args, **kwargs: seen.card)
    return seen


def test_push_shows_the_files_and_uploads_exactly_them(
    command: Command, packed: Path, hub: SimpleNamespace, tmp_path: Path
) -> None:
    folder = shutil.copytree(packed, tmp_path / "model")
    (folder / "secrets.txt").write_text("not for the world")
    dry = command("push", folder, "--repo", "user/tiny", "--dry-run")
    assert dry.code == 0
    assert WEIGHTS in dry.out
    assert hub.repository is None
    done = command("push", folder, "--repo", "user/tiny", "--json")
    assert done.code == 0, done.err
    assert hub.repository == {"repo_id": "user/tiny", "private": True, "exist_ok": True}
    assert set(hub.files) == set(done.json["files"]) == {p.name for p in packed.iterdir()}
    assert hub.files[WEIGHTS] == (packed / WEIGHTS).read_bytes()
    card = hub.files["README.md"].decode()
    assert 'from_pretrained("user/tiny")' in card
    assert "# tiny\n" in card
    assert str(tmp_path) not in card


def test_push_keeps_the_card_of_the_repository_and_never_uploads_damage(
    command: Command, packed: Path, hub: SimpleNamespace, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text("Mine.", encoding="utf-8")
    hub.card = tmp_path / "README.md"
    folder = shutil.copytree(packed, tmp_path / "model")
    assert command("push", folder, "--repo", "user/tiny").code == 0
    assert hub.files["README.md"] == b"Mine."
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-3] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    hub.files.clear()
    assert command("push", folder, "--repo", "user/tiny").code == 3
    assert not hub.files


# ------------------------------------------------------------------------------------------------ estimate, init


def test_estimate_knows_the_size_of_what_will_be_packed(
    command: Command, base: Path, packed: Path, files: Path
) -> None:
    arguments = ["estimate", "--model", base, "--quant.group-size", "32", "--device", "cpu", "--no-probe"]
    found = command(*arguments, "--json").json
    truth = command("inspect", packed, "--json").json
    assert found["packed_bytes"] == truth["bytes"]
    assert found["weights"] == truth["weights"]
    assert found["bits_per_weight"] == pytest.approx(truth["bits_per_weight"], abs=1e-4)
    assert set(found["peak_bytes"]) == {"calibrate", "generate", "distill", "eval"}


@pytest.mark.parametrize("kind", ["--embedding-bits", "--head-bits"])
def test_estimate_counts_tables_of_codes(command: Command, base: Path, tmp_path: Path, kind: str) -> None:
    student = get_bitdistiller_model(
        AutoModelForCausalLM.from_pretrained(base),
        BitDistillerConfig(group_size=32, **{kind[2:].replace("-", "_"): 8}),
    )
    student.pack_and_unload(progressbar=False).save_pretrained(tmp_path)
    quant = ["--quant.group-size", "32", kind.replace("--", "--quant."), "8"]
    found = command("estimate", "--model", base, *quant, "--device", "cpu", "--no-probe", "--json").json
    truth = command("inspect", tmp_path, "--json").json
    assert (found["packed_bytes"], found["weights"]) == (truth["bytes"], truth["weights"])
    assert all(part["bytes"] for part in truth["parts"])


def test_estimate_refuses_what_cannot_fit_and_names_the_setting_that_would(
    command: Command, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["estimate", "--model", base, "--quant.group-size", "32", "--no-probe"]
    arguments += ["--distill.gradient-checkpointing", "false"]
    peaks = command(*arguments, "--json").json["peak_bytes"]
    monkeypatch.setattr(estimate, "_capacity", lambda settings: ("memory", peaks["distill"] - 1))
    done = command(*arguments)
    assert done.code == 4
    assert "distill needs" in done.err
    assert "Set distill.gradient_checkpointing=True" in done.err
    arguments += ["--distill.per-device-train-batch-size", "4096", "--distill.gradient-checkpointing", "true"]
    done = command(*arguments)  # the batch alone will do: nothing else is asked for
    assert "Set distill.per_device_train_batch_size=1: " in done.err
    monkeypatch.setattr(estimate, "_capacity", lambda settings: ("memory", 1 << 20))
    assert "take a smaller model" in command(*arguments).err


def test_init_writes_a_file_that_run_accepts(command: Command, base: Path, files: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "run.yaml"
    arguments = ["init", path, "--model", base, "--bits", "3", "--group-size", "32", "--grid", "nf"]
    arguments += ["--text", files / "text.txt", "--prompts", files / "prompts.txt", "--output", tmp_path / "out"]
    assert command(*arguments).code == 0
    done = command("run", "-c", path, "--dry-run", "--json")
    assert done.code == 0, done.err
    assert done.json["stages"] == ["calibrate", "generate", "distill", "eval", "report"]
    named = command("init", tmp_path / "named.yaml", "--prompts", tmp_path / "none.txt")
    assert "none.txt: a prompt per line" in named.out
    assert not (tmp_path / "none.txt").exists()
    written = plain(read_yaml(path))
    assert written["quant"] == {"bits": 3, "group_size": 32, "grid": "nf", "learn_zero_point": False}
    again = command(*arguments)
    assert (again.code, "which exists" in again.err) == (2, True)


def test_init_alone_is_enough_for_a_run(command: Command, base: Path, files: Path, tmp_path: Path) -> None:
    path, prompts = tmp_path / "run.yaml", tmp_path / "prompts.txt"
    arguments = ["--model", base, "--group-size", "32", "--text", files / "text.txt", "--output", tmp_path / "out"]
    assert command("init", path, *arguments).code == 0
    lines = prompts.read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(set(lines)) > 200
    assert all(line == line.strip() and "{" not in line for line in lines)
    done = command("run", "-c", path, "--dry-run")
    assert done.code == 0, done.err
    prompts.write_text("Mine.\n", encoding="utf-8")
    assert command("init", tmp_path / "second.yaml", *arguments).code == 0
    assert prompts.read_text(encoding="utf-8") == "Mine.\n", "what is there stays"


# ------------------------------------------------------------------------------------------------ the chain


def test_a_folder_that_was_only_claimed_takes_other_settings(
    command: Command, base: Path, files: Path, tmp_path: Path
) -> None:
    output = tmp_path / "made" / "out"
    arguments = ["calibrate", "--model", base, "--texts", files / "text.txt", "--output", output]
    less = ["--group-size", "32", "--num-samples", "2", "--seq-len", "32"]
    assert command(*arguments, *less[:-1], "9999999").code == 2  # the text is shorter, which its tokens tell
    assert not (tmp_path / "made").exists(), "a refusal leaves no trace"
    assert command(*arguments, *less).code == 0
    claimed = (output / "resolved.yaml").read_text(encoding="utf-8")
    shutil.rmtree(output)
    output.mkdir()
    stopped = claimed.replace("bits: 2", "bits: 4")
    (output / "resolved.yaml").write_text(stopped, encoding="utf-8")  # as a kill leaves it
    assert command(*arguments, *less[:-1], "9999999").code == 2
    assert [file.name for file in output.iterdir()] == ["resolved.yaml"], "what was there stays"
    assert command(*arguments, *less).code == 0
    done = command(*arguments, *less, "--bits", "3")
    assert (done.code, "quant.bits was 2, is 3" in done.err) == (2, True)


@pytest.mark.parametrize(
    ("setting", "word"), [("bits: 5", "`bits`"), ("lr_scheduler_type: cosin", "cosin"), ("optim: adamm", "adamm")]
)
def test_a_value_that_a_later_stage_would_refuse_is_refused_before_the_first(
    command: Command, base: Path, files: Path, tmp_path: Path, setting: str, word: str
) -> None:
    path, (name, _, value) = tmp_path / "run.yaml", setting.partition(": ")
    path.write_text(chain_yaml(base, files, tmp_path / "out"), encoding="utf-8")
    key = f"--{'quant' if name == 'bits' else 'distill'}.{name}"
    done = command("run", "-c", path, f"{key}={value}")
    assert (done.code, word in done.err) == (2, True), done.err
    assert not (tmp_path / "out").exists()


def test_the_chain_runs_and_a_second_call_does_nothing_again(
    command: Command, base: Path, files: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    output = tmp_path / "out"
    path.write_text(chain_yaml(base, files, output))
    done = command("run", "-c", path, "--json")
    assert done.code == 0, done.err
    packed = Path(done.json["packed"])
    assert packed == output / "distill" / "packed"
    rows = done.json["stages"]["eval"]["rows"]
    assert [row["model"] for row in rows] == [str(base), str(packed)]
    assert all(math.isfinite(row["perplexity"]["perplexity"]) for row in rows)
    assert rows[1]["divergence"]["mean_kl_nats"] > 0
    assert done.json["stages"]["distill"]["findings"] == []
    assert (output / "distill" / "trainer" / "doctor.json").is_file()
    assert command("verify", packed).code == 0
    for stage in ("calibrate", "generate", "distill", "eval"):
        assert (output / stage / "resolved.yaml").is_file()

    before = {p: p.stat().st_mtime_ns for p in output.rglob("*") if p.is_file() and p.parent != output}
    again = command("run", "-c", path, "--json")
    assert again.code == 0
    assert again.json == done.json
    assert before == {p: p.stat().st_mtime_ns for p in output.rglob("*") if p.is_file() and p.parent != output}

    changed = command("run", "-c", path, "--distill.learning-rate", "1e-3")
    assert changed.code == 2
    assert "distill.learning_rate was 0.0001, is 0.001" in changed.err


def test_stages_one_by_one_share_the_file_with_the_chain(
    command: Command, base: Path, files: Path, tmp_path: Path
) -> None:
    path, output = tmp_path / "run.yaml", tmp_path / "out"
    path.write_text(chain_yaml(base, files, output))
    for stage in ("calibrate", "generate", "distill"):
        assert command(stage, "-c", path).code == 0
        assert (output / stage / "result.json").is_file()
    evaluated = command("eval", "-c", path, "--json").json
    assert evaluated["rows"][0]["model"] == str(output / "distill" / "packed")
    written = plain(read_yaml(output / "distill" / "resolved.yaml"))
    assert written["distill"]["student"] == str(output / "calibrate")
    dry = command("push", "-c", path, "--repo", "user/tiny", "--dry-run", "--json").json
    assert dry["folder"] == str(output / "distill" / "packed")


def test_export_writes_a_folder_per_format_and_refuses_an_unknown_one(
    command: Command, packed: Path, tmp_path: Path
) -> None:
    done = command("export", packed, "--formats", "dequantized", "--output", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    assert (tmp_path / "out" / "dequantized" / "config.json").is_file()
    assert set(done.json["reports"]) == {"dequantized"}
    unknown = command("export", packed, "--formats", "dequantised", "--output", tmp_path / "other")
    assert (unknown.code, "Did you mean 'dequantized'?" in unknown.err) == (2, True)
    assert not (tmp_path / "other").exists()


def test_verify_export_compares_codes_and_logits_and_names_what_differs(
    command: Command, packed: Path, tmp_path: Path
) -> None:
    from bitdistiller_peft import export_model

    exported = export_model(packed, "dequantized", tmp_path / "out").folder
    arguments = ("verify-export", packed, exported, "--format", "dequantized")
    assert command(*arguments, "--dry-run").code == 0
    done = command(*arguments, "--engine", "transformers", "--json")
    assert done.code == 0, done.err
    assert done.json["num_weights"] == 14
    assert [found["by"].split()[0] for found in done.json["logits"]] == ["the", "transformers_engine"]
    assert all(found["difference"] <= found["tolerance"] for found in done.json["logits"])
    assert command(*arguments, "--no-logits", "--json").json["logits"] == []
    content = bytearray((exported / WEIGHTS).read_bytes())
    content[-3] ^= 1
    (exported / WEIGHTS).write_bytes(content)
    done = command(*arguments)
    assert done.code == 3
    assert "must equal the packed model's" in done.err
    assert command(*arguments[:-2]).code == 2
    done = command(*arguments[:-1], "dequantised")
    assert done.code == 2
    assert "Did you mean 'dequantized'?" in done.err


def test_a_chain_that_cannot_export_says_so_before_its_first_stage(
    command: Command, base: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitdistiller_peft.export.formats.find_spec", lambda name: None)
    path = tmp_path / "run.yaml"
    for formats, words in (("gguf", "pip install 'bitdistiller_peft[export]'"), ("ggfu", "gguf")):
        more = f"export: {{formats: [{formats}]}}\nrun: {{stages: [calibrate, export]}}\n"
        path.write_text(chain_yaml(base, files, tmp_path / "out") + more)
        done = command("run", "-c", path)
        assert (done.code, words in done.err) == (2, True)
        assert not (tmp_path / "out").exists()


def test_the_chain_exports_and_pushes_once(
    command: Command, base: Path, files: Path, hub: SimpleNamespace, tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    more = "export: {formats: [dequantized]}\npush: {repo: user/tiny}\nrun: {stages: [push, calibrate, export]}\n"
    path.write_text(chain_yaml(base, files, tmp_path / "out") + more)
    done = command("run", "-c", path, "--json")
    assert done.code == 0, done.err
    assert list(done.json["stages"]) == ["calibrate", "export", "push"]
    assert (tmp_path / "out" / "export" / "dequantized" / "config.json").is_file()
    assert WEIGHTS in hub.files
    hub.files.clear()
    again = command("run", "-c", path, "--json")
    assert again.code == 0, again.err
    assert again.json == done.json
    assert not hub.files
