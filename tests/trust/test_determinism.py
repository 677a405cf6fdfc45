"""The same seed gives the same bytes: every stage, three times, in one process; `test_kills` compares processes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from bitdistiller_peft import evaluate_divergence, evaluate_perplexity
from bitdistiller_peft.export import export_model
from tests.hub.models import make_packed
from tests.tiny import load
from tests.training import helpers
from tests.trust.stages import STAGES, calibrated, digest_of_files

GetFolder = Callable[..., Path]
FOUR_BITS = {"bits": 4, "grid": "int_sym", "group_size": 32}
TERNARY = {"grid": "ternary", "group_size": "tensor", "activation_bits": 8, "scale_dtype": "float32"}
METHODS = {"clip": {}, "gptq": {}, "awq": {}, "blockwise": {"epochs": 1}}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_gives_the_same_bytes_three_times(stage: str, tmp_path: Path) -> None:
    digests = {STAGES[stage](tmp_path / "bases", _folder(tmp_path, number)) for number in range(3)}
    assert len(digests) == 1


@pytest.mark.parametrize("method", METHODS)
def test_a_calibration_gives_the_same_bytes_three_times(method: str, tmp_path: Path) -> None:
    folders = [_folder(tmp_path, number) for number in range(3)]
    assert len({calibrated(tmp_path / "bases", folder, method, **METHODS[method]) for folder in folders}) == 1


@pytest.mark.parametrize(
    "name", ["compressed-tensors", "gptq", "awq", "gguf", "dequantized", "onnx", "openvino", "bitnet"]
)
def test_an_export_gives_the_same_files_three_times(
    name: str, packed_folder: Callable[..., Path], tmp_path: Path
) -> None:
    source, digests = packed_folder("llama", **(TERNARY if name == "bitnet" else FOUR_BITS)), set()
    for number in range(3):
        export_model(source, name, tmp_path / str(number))
        digests.add(digest_of_files(tmp_path / str(number), "*"))
    assert len(digests) == 1


def test_an_evaluation_gives_the_same_numbers_three_times(packed_folder: GetFolder, tmp_path: Path) -> None:
    text, tokenizer = " ".join(f"w{i % 40} w{i % 7}" for i in range(40)), helpers.tokenizer()
    how = {"seq_len": 16, "batch_size": 2, "show_progress": False}
    teacher, found = helpers.base(tmp_path / "bases"), set()
    for _ in range(3):
        model = load(packed_folder("llama"))
        scored = evaluate_perplexity(model, tokenizer, text, **how)
        distance = evaluate_divergence(model, teacher, tokenizer, text, **how)
        found.add((scored.perplexity, scored.chunk_nll_nats, distance.mean_kl_nats, distance.p95_kl_nats))
    assert len(found) == 1


def test_three_saves_of_one_recipe_are_the_same_files(tmp_path: Path) -> None:
    found = []
    for number in range(3):
        folder = tmp_path / str(number) / "model"
        make_packed("llama", tmp_path / "bases").save_pretrained(folder, max_shard_size="20KB")
        files = sorted(path for path in folder.iterdir() if path.name != "README.md")  # the card names its folder
        found.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files})
    assert found[0] == found[1] == found[2]
    assert {"bitdistiller.json", "config.json", "model.safetensors.index.json"} < found[0].keys()


def _folder(parent: Path, number: int) -> Path:
    folder = parent / str(number)
    folder.mkdir()
    return folder
