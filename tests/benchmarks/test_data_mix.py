"""The benchmark of data mixes trains every mix from one start, on tokens of the sources that it names."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import _results, data_mix
from bitdistiller_peft.recipes import best
from tests.standin import english, save_standin


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(_results, "RESULTS", tmp_path / "results")
    monkeypatch.setitem(best.WINDOWS, "balanced", 8)
    monkeypatch.setattr(data_mix, "OWN_PROMPTS", 4)
    monkeypatch.setattr(data_mix, "OWN_TOKENS", 16)
    save_standin(tmp_path / "model")
    (tmp_path / "topics.txt").write_text("\n\n".join(english()[10:14]))
    (tmp_path / "train.txt").write_text("\n\n".join(english()[:4]))
    answers = [line for text in english()[4:10] for line in text.splitlines() if len(line) > 40][:24]
    rows = [{"instruction": f"Go on, {n}.", "input": "", "output": answer} for n, answer in enumerate(answers)]
    rows[0] = {"messages": [{"role": "user", "content": "Go."}, {"role": "assistant", "content": answers[0]}]}
    rows[1]["instruction"] = "too long " * 100
    for name, part in (("chats", rows[:12]), ("held_out", rows[12:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return tmp_path


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, *rows: str) -> dict[str, Any]:
    arguments = ["--model", str(folder / "model"), "--train-text", str(folder / "train.txt")]
    arguments += ["--conversations", str(folder / "chats.jsonl"), "--eval", f"topics={folder / 'topics.txt'}"]
    arguments += ["--eval-conversations", str(folder / "held_out.jsonl"), "--cache", str(folder / "cache")]
    monkeypatch.setattr(sys, "argv", ["data_mix", *arguments, "--tokens", "1024", "--chunks", "1", "--rows", *rows])
    data_mix.main()
    found: dict[str, Any] = json.loads((folder / "results" / "data_mix.cpu.json").read_text())
    return found


def test_every_mix_starts_from_the_same_student(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = run(folder, monkeypatch, "start", "plain", "chat", "plain-chat-own")
    rows = {row["row"]: row for row in written["rows"]}
    assert list(rows) == ["start", "plain", "chat", "plain-chat-own"]
    assert rows["start"]["tokens"] == 0
    assert rows["plain"]["targets"] == rows["plain"]["tokens"] == 1024
    assert 0 < rows["chat"]["targets"] < rows["chat"]["tokens"]
    assert rows["chat"]["targets"] < rows["plain-chat-own"]["targets"] < 1024
    assert all(rows[name]["kl_topics"] != rows["start"]["kl_topics"] for name in ("plain", "chat", "plain-chat-own"))
    ratio = rows["chat"]["kl_conversations"] / rows["plain"]["kl_conversations"]
    assert written["figures"]["chat_kl_conversations"]["value"] == pytest.approx(ratio)
    assert "conversations" in capsys.readouterr().out
    # a row made alone, from a start of its own, is the one made after others
    (folder / "results" / "data_mix.cpu.json").unlink()
    (alone,) = run(folder, monkeypatch, "chat")["rows"]
    assert {**alone, "seconds": 0} == {**rows["chat"], "seconds": 0}


def test_long_prompts_are_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(data_mix.conversations(folder / "chats.jsonl")) == 12
    seen: list[Any] = []

    def row(self: data_mix.Bench, shares: dict[str, float]) -> dict[str, Any]:
        seen.append({name: self.source(name) for name in ("plain", "chat")})
        return {"tokens": 0}

    monkeypatch.setattr(data_mix.Bench, "row", row)
    run(folder, monkeypatch, "plain")
    assert len(seen[0]["chat"]) == 11
