"""What is pushed is complete: weights, config, a card that says how to load, and checksums that downloads must meet."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard

from bitdistiller_peft.hub import MANIFEST_NAME, verify_files
from tests.hub.fake_hub import fake_hub
from tests.hub.models import WEIGHTS, Saved, copy_of, logits, run_python
from tests.tiny import load

GetSaved = Callable[..., Saved]


class Uploads:
    """The repository that a fake Hub holds, and what it was asked."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.repository: dict[str, Any] = {}
        self.commit: dict[str, Any] = {}
        self.has_card = False

    def save(self, folder: Path) -> Path:
        folder.mkdir()
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        return folder


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> Uploads:
    """Take `HfApi`'s place: nothing leaves the machine, everything is kept."""
    hub = Uploads()

    def create_repo(self: HfApi, repo_id: str, **kwargs: Any) -> SimpleNamespace:
        hub.repository = {"repo_id": repo_id, **kwargs}
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"user/{repo_id}")

    def upload_folder(self: HfApi, *, folder_path: Path, ignore_patterns: list[str] | None, **kwargs: Any) -> str:
        hub.commit = kwargs
        hub.files = {
            f.name: f.read_bytes() for f in Path(folder_path).iterdir() if f.name not in (ignore_patterns or [])
        }
        return "https://example.com/commit"

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(HfApi, "file_exists", lambda self, *args, **kwargs: hub.has_card)
    return hub


def test_pushing_uploads_weights_config_card_and_checksums(saved: GetSaved, uploads: Uploads, tmp_path: Path) -> None:
    original = saved("llama")
    original.model.push_to_hub("my-model", private=True, tags=["tiny"], commit_message="The first")
    assert set(uploads.files) == {WEIGHTS, "config.json", "generation_config.json", "README.md", MANIFEST_NAME}
    assert uploads.repository["repo_id"] == "my-model"
    assert uploads.repository["private"] is True
    assert (uploads.commit["repo_id"], uploads.commit["commit_message"]) == ("user/my-model", "The first")
    card = uploads.files["README.md"].decode()
    assert 'from_pretrained("user/my-model")' in card
    assert "pip install bitdistiller_peft" in card
    assert ModelCard(card).data.tags == ["bitdistiller", "quantized", "tiny"]
    assert tempfile.gettempdir() not in card, "the temporary folder is nobody's business"
    folder = uploads.save(tmp_path / "download")
    assert verify_files([folder / WEIGHTS], mode="full")
    assert logits(load(folder)).equal(original.logits)


def test_saving_with_push_writes_the_folder_and_uploads_the_same(
    saved: GetSaved, uploads: Uploads, tmp_path: Path
) -> None:
    original = saved("llama")
    target = tmp_path / "my-model"
    original.model.save_pretrained(target, push_to_hub=True, max_shard_size="20KB", commit_message="Shards")
    local = {file.name: file.read_bytes() for file in target.iterdir()}
    assert local.keys() == uploads.files.keys()
    assert len([name for name in local if name.endswith(".safetensors")]) > 2
    assert {name for name in local if local[name] != uploads.files[name]} == {"README.md"}
    assert 'from_pretrained("user/my-model")' in uploads.files["README.md"].decode()
    assert uploads.commit["commit_message"] == "Shards"
    original.model.save_pretrained(tmp_path / "other", push_to_hub=True, repo_id="team/model")
    assert uploads.commit["repo_id"] == "team/model"


def test_pushing_keeps_the_card_that_a_repository_has(saved: GetSaved, uploads: Uploads) -> None:
    uploads.has_card = True
    saved("llama").model.push_to_hub("my-model")
    assert "README.md" not in uploads.files
    assert MANIFEST_NAME in uploads.files


def test_arguments_by_position_mean_what_they_mean_to_transformers(
    saved: GetSaved, uploads: Uploads, tmp_path: Path
) -> None:
    model = saved("llama").model
    model.save_pretrained(tmp_path / "helper", False)
    assert not list((tmp_path / "helper").iterdir()), "only the main process writes"
    model.save_pretrained(tmp_path / "main", True, None, True)
    assert WEIGHTS in uploads.files


FROM_HUB = """
import json, warnings
import bitdistiller_peft
from transformers import AutoModelForCausalLM

def load(name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            AutoModelForCausalLM.from_pretrained("user/" + name)
        except Exception as error:
            return type(error).__name__ + ": " + str(error)
        return [str(w.message) for w in caught if "unverified" in str(w.message)]

print(json.dumps({name: load(name) for name in ("sound", "damaged", "bare")}))
"""


def test_a_download_is_held_to_the_checksums_in_the_repository(saved: GetSaved, tmp_path: Path) -> None:
    """`from_pretrained` fetches the files that it knows, so the loader has to ask for the manifest itself."""
    root = tmp_path / "repositories"
    sound, damaged, bare = (copy_of(saved("llama").folder, root / name) for name in ("sound", "damaged", "bare"))
    assert (sound / MANIFEST_NAME).is_file()
    content = bytearray((damaged / WEIGHTS).read_bytes())
    content[-5] ^= 4
    (damaged / WEIGHTS).write_bytes(content)
    (bare / MANIFEST_NAME).unlink()
    with fake_hub(root) as address:
        settings = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}
        child = run_python(FROM_HUB, **settings, HF_HUB_DISABLE_XET="1", NO_PROXY="127.0.0.1")
    assert child.returncode == 0, child.stderr[-2000:]
    outcome = json.loads(child.stdout.splitlines()[-1])
    assert outcome["sound"] == []
    assert outcome["damaged"].startswith("ChecksumError: model.safetensors must equal what was saved: tensor")
    (warning,) = outcome["bare"]
    assert warning.startswith(f"{MANIFEST_NAME} is missing beside {WEIGHTS}")


def test_the_card_and_the_config_say_what_the_model_is_made_from(saved: GetSaved) -> None:
    folder = saved("llama").folder
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert config["provenance"]["base_model"]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "base_model:" not in card, "a local path is no model on the Hub"
    assert "| int | 2 | 32 | packed |" in card
