"""`cache` lets the teacher speak once, and `distill` and `run` train on what it said as with the teacher itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bitdistiller_peft.cli.yamlfile import plain, read_yaml
from bitdistiller_peft.training import TeacherCache
from tests.cli.conftest import Command, chain_yaml


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory, files: Path) -> Path:
    """Texts to train on, two of them longer than they may be."""
    paragraphs = [part for part in (files / "text.txt").read_text().split("\n\n") if part.strip()][:6]
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in paragraphs))
    return path


def arguments(base: Path, data: Path, output: Path) -> list[object]:
    return ["cache", "--model", base, "--data", data, "--max-length", "32", "--device", "cpu", "--output", output]


def training(base: Path, data: Path, output: Path) -> list[object]:
    short = ["--max-length", "32", "--max-steps", "2", "--per-device-train-batch-size", "2", "--group-size", "32"]
    more = ["--no-gradient-checkpointing", "--bf16", "false", "--device", "cpu", "--logging-steps", "1", "--no-pack"]
    return ["distill", "--model", base, "--data", data, *short, *more, "--output", output]


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def test_a_cached_teacher_trains_as_the_live_one(command: Command, base: Path, data: Path, tmp_path: Path) -> None:
    done = command(*arguments(base, data, tmp_path / "cache"), "--stored-dtype", "float32", "--json")
    assert done.code == 0, done.err
    assert "Teacher cache: 6 documents" in done.err, "the size is said, here beside the JSON"
    cache = TeacherCache(tmp_path / "cache")
    assert len(cache) == done.json["documents"] == 6
    assert done.json["bytes"] == sum(file.stat().st_size for file in (tmp_path / "cache").glob("*.safetensors"))
    assert cache.layout.dtype == "float32"
    live = command(*training(base, data, tmp_path / "live"))
    assert live.code == 0, live.err
    more = ["--teacher", "cached", "--teacher-cache", tmp_path / "cache"]
    cached = command(*training(base, data, tmp_path / "cached"), *more)
    assert cached.code == 0, cached.err
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "live"), rel=1e-5)


def test_another_learning_rate_does_not_ask_again_but_other_tokens_do(
    command: Command, base: Path, data: Path, tmp_path: Path
) -> None:
    path, output = tmp_path / "run.yaml", tmp_path / "out"
    text = f"model: {base}\noutput: {output}\ndevice: cpu\ndistill: {{data: {data}, max_length: 32}}\n"
    path.write_text(text)
    assert command("cache", "-c", path).code == 0
    stamp = (output / "cache" / "result.json").stat().st_mtime_ns
    path.write_text(text.replace("max_length: 32", "max_length: 32, learning_rate: 1e-3, teacher: cached"))
    again = command("cache", "-c", path)
    assert (again.code, "cached before" in again.out) == (0, True)
    assert (output / "cache" / "result.json").stat().st_mtime_ns == stamp
    written = plain(read_yaml(output / "cache" / "resolved.yaml"))
    assert written["distill"] == {"data": str(data), "max_length": 32, "packing": False}
    path.write_text(text.replace("32", "24"))
    other = command("cache", "-c", path)
    assert other.code == 2
    assert "distill.max_length was 32, is 24" in other.err


def test_what_was_stopped_goes_on_with_the_next_shard(
    command: Command, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitdistiller_peft.training import cache_writer

    ask, asked = cache_writer._ask, []

    def stopped(*args: Any) -> Any:
        asked.append(len(args[3]))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return ask(*args)

    monkeypatch.setattr(cache_writer, "_plan", lambda documents, layout, size: [[digest] for digest in documents])
    monkeypatch.setattr(cache_writer, "_ask", stopped)
    done = command(*arguments(base, data, tmp_path / "cache"))
    assert done.code == 130
    assert "Finished shards are kept; the same command goes on." in done.err
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").glob("shard-*")}
    assert len(kept) == 2
    done = command(*arguments(base, data, tmp_path / "cache"))
    assert done.code == 0, done.err
    assert len(asked) == 3 + 4, "only those that were missing"
    assert kept == {p: p.stat().st_mtime_ns for p in kept}


def test_a_full_disk_is_refused_before_the_teacher_speaks(
    command: Command, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    done = command(*arguments(base, data, tmp_path / "cache"))
    assert done.code == 4
    assert "must have room for" in done.err
    assert "kind='topk'" in done.err
    assert "Teacher cache: 6 documents" in done.out
    assert not list((tmp_path / "cache").glob("*.safetensors"))


def test_the_likeliest_tokens_can_be_kept_instead(command: Command, base: Path, data: Path, tmp_path: Path) -> None:
    done = command(*arguments(base, data, tmp_path / "cache"), "--kind", "topk", "--k", "16", "--json")
    assert done.code == 0, done.err
    assert TeacherCache(tmp_path / "cache").layout.width == 16


def test_a_dry_run_shows_what_the_cache_depends_on(command: Command, base: Path, data: Path, tmp_path: Path) -> None:
    done = command(*arguments(base, data, tmp_path / "cache"), "--dry-run")
    assert done.code == 0
    assert "max_length: 32" in done.out
    assert "learning_rate" not in done.out
    assert not (tmp_path / "cache").exists()
    missing = command("cache", "--model", base, "--output", tmp_path / "cache")
    assert (missing.code, "`distill.data` must be given" in missing.err) == (2, True)


def test_the_chain_makes_the_cache_where_training_asks_for_it(
    command: Command, base: Path, files: Path, tmp_path: Path
) -> None:
    path, output = tmp_path / "run.yaml", tmp_path / "out"
    text = chain_yaml(base, files, output).replace("distill:\n", "distill:\n  teacher: cached\n")
    path.write_text(text)
    dry = command("run", "-c", path, "--dry-run", "--json")
    assert dry.json["stages"][:4] == ["calibrate", "generate", "cache", "distill"]
    path.write_text(text + "run: {stages: [calibrate, generate, distill]}\n")
    done = command("run", "-c", path)
    assert (done.code, "`run.stages` must name 'cache'" in done.err) == (2, True)
    path.write_text(text + "run: {stages: [generate, cache, distill]}\n")
    done = command("run", "-c", path, "--json")
    assert done.code == 0, done.err
    written = plain(read_yaml(output / "distill" / "resolved.yaml"))["distill"]
    assert written["teacher_cache"] == str(output / "cache")
    assert written["data"] == str(output / "generate")
    provenance = json.loads((output / "distill" / "packed" / "config.json").read_text())["quantization_config"]
    assert "(cached, hidden)" in provenance["provenance"]["teacher"]
    again = command("run", "-c", path, "--json")
    assert again.json["stages"] == done.json["stages"]


def test_a_cache_that_nobody_reads_is_refused(command: Command, base: Path, files: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(chain_yaml(base, files, tmp_path / "out") + "run: {stages: [generate, cache, distill]}\n")
    done = command("run", "-c", path)
    assert (done.code, "must not name 'cache' unless training asks for it" in done.err) == (2, True)
