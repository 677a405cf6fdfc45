"""What is pushed is complete and comes back bit for bit, over the Hub's own protocol; a refusal is a clear error."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.utils import close_session
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bitdistiller_peft import BitDistillerQuantConfig
from bitdistiller_peft.cli import main
from bitdistiller_peft.errors import HubError
from bitdistiller_peft.hub import MANIFEST_NAME, upload, verify_files
from bitdistiller_peft.hub.card import with_results
from bitdistiller_peft.hub.card_sections import find_part
from tests.hub.fake_hub import READER, TOKEN, FakeHub, fake_hub
from tests.hub.models import WEIGHTS, Saved, copy_of, logits, make_student, run_python
from tests.tiny import load, save_base

GetSaved = Callable[..., Saved]
MEASURED = {"metric": "perplexity", "value": 12.5, "data": "wikitext2", "protocol": "v1/seq_len=512"}

# huggingface_hub hands a file to httpx as `data`, which has a newer name there
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub for this process, which is logged in as `user` and does not wait between tries."""
    with fake_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        close_session()
        yield hub
        close_session()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def save(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def packed(saved: GetSaved, tmp_path: Path) -> Path:
    """A packed model's folder, to be looked at before and after."""
    return copy_of(saved("llama").folder, tmp_path / "model")


# ------------------------------------------------------------------------------------------------ what arrives


def test_pushing_uploads_weights_config_card_and_checksums(saved: GetSaved, hub: FakeHub, tmp_path: Path) -> None:
    original = saved("llama")
    done = original.model.push_to_hub("my-model", private=True, tags=["tiny"], commit_message="The first")
    files = hub.files("user/my-model")
    assert set(files) == {WEIGHTS, "config.json", "generation_config.json", "README.md", MANIFEST_NAME}
    assert hub.repositories["user/my-model"].private
    assert hub.repositories["user/my-model"].messages == ["The first"]
    assert done.commit_url.startswith(f"{hub.address}/user/my-model/commit/")
    card = files["README.md"].decode()
    assert 'from_pretrained("user/my-model")' in card
    assert "pip install bitdistiller_peft" in card
    assert ModelCard(card).data.tags == ["bitdistiller", "quantized", "2-bit", "tiny"]
    assert tempfile.gettempdir() not in card, "the temporary folder is nobody's business"
    folder = save(files, tmp_path / "download")
    assert verify_files([folder / WEIGHTS], mode="full")
    assert logits(load(folder)).equal(original.logits)


def test_saving_with_push_writes_the_folder_and_uploads_the_same(saved: GetSaved, hub: FakeHub, tmp_path: Path) -> None:
    original = saved("llama")
    target = tmp_path / "my-model"
    original.model.save_pretrained(target, push_to_hub=True, max_shard_size="20KB", commit_message="Shards")
    local, there = contents(target), hub.files("user/my-model")
    assert local.keys() == there.keys()
    assert len([name for name in local if name.endswith(".safetensors")]) > 2
    assert {name for name in local if local[name] != there[name]} == {"README.md"}
    assert 'from_pretrained("user/my-model")' in there["README.md"].decode()
    assert hub.repositories["user/my-model"].messages == ["Shards"]
    original.model.save_pretrained(tmp_path / "other", push_to_hub=True, repo_id="team/model")
    assert WEIGHTS in hub.files("team/model")


def test_pushing_again_keeps_the_card_and_sends_only_what_is_new(saved: GetSaved, hub: FakeHub) -> None:
    saved("llama").model.push_to_hub("my-model")
    repository = hub.repositories["user/my-model"]
    repository.branches["main"][-1]["README.md"] = b"---\nlicense: mit\n---\nWritten by hand.\n"
    hub.requests.clear()
    saved("llama").model.push_to_hub("user/my-model")
    assert not [request for request in hub.requests if request.startswith("PUT")]
    assert repository.messages == ["Upload a model quantized with bitdistiller_peft"], "no empty commit"
    assert b"by hand" in hub.files("user/my-model")["README.md"]


def test_another_model_renews_what_the_page_says_of_it_and_nothing_else(
    bases: Path, packed: Path, hub: FakeHub, tmp_path: Path
) -> None:
    """The user has written on the page; then the same repository gets a model of other codes."""
    card = packed / "README.md"
    card.write_text(with_results(card.read_text(encoding="utf-8"), [MEASURED]), encoding="utf-8")
    assert main(["push", str(packed), "--repo", "user/model"]) == 0
    files = hub.repositories["user/model"].branches["main"][-1]
    mine = files["README.md"].decode().replace("---\n", "---\nlicense: mit\n", 1).replace("# model", "# Mine\n\nHello.")
    files["README.md"] = f"{mine}\n## Thanks\n\nTo all.\n".encode()
    assert main(["push", str(packed), "--repo", "user/model"]) == 0
    assert hub.files("user/model")["README.md"].decode() == f"{mine}\n## Thanks\n\nTo all.\n", "the same model"

    config = BitDistillerQuantConfig(bits=4, group_size=32)
    other = AutoModelForCausalLM.from_pretrained(save_base("llama", bases), quantization_config=config)
    other.save_pretrained(tmp_path / "other")
    assert main(["push", str(tmp_path / "other"), "--repo", "user/model"]) == 0
    text = hub.files("user/model")["README.md"].decode()
    for line in ("# Mine", "Hello.", "## Thanks", "To all.", "license: mit", "| bits | 4 |", "4 bits, grid `int`"):
        assert line in text
    for gone in ("## Measured", "| bits | 2 |", "model-index", "2-bit"):
        assert gone not in text
    assert ModelCard(text).data.tags == ["bitdistiller", "quantized", "4-bit"]
    assert (find_part(text, "size"), text.count("## Size")) == (
        find_part((tmp_path / "other" / "README.md").read_text(encoding="utf-8"), "size"),
        1,
    )


def test_a_branch_is_made_and_the_main_one_stays(saved: GetSaved, hub: FakeHub) -> None:
    saved("llama").model.push_to_hub("my-model", revision="next")
    saved("llama").model.push_to_hub("my-model", revision="next")
    assert WEIGHTS in hub.files("user/my-model", "next")
    assert hub.files("user/my-model") == {}


def test_arguments_by_position_mean_what_they_mean_to_transformers(
    saved: GetSaved, hub: FakeHub, tmp_path: Path
) -> None:
    model = saved("llama").model
    model.save_pretrained(tmp_path / "helper", False)
    assert not list((tmp_path / "helper").iterdir()), "only the main process writes"
    model.save_pretrained(tmp_path / "main", True, None, True)
    assert WEIGHTS in hub.files("user/main")


# ------------------------------------------------------------------------------------------------ what comes back

FROM_HUB = """
import json, sys, warnings
import bitdistiller_peft
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from tests.hub.models import logits

def outcome(name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            AutoModelForCausalLM.from_pretrained("user/" + name)
        except Exception as error:
            return type(error).__name__ + ": " + str(error)
        return [str(w.message) for w in caught if "unverified" in str(w.message)]

packed = AutoModelForCausalLM.from_pretrained("user/packed")
student = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("user/base"), "user/student").eval()
found = {"packed": logits(packed), "student": logits(student)}
found["student, packed"] = logits(student.pack_and_unload(progressbar=False))
save_file(found, sys.argv[1])
print(json.dumps({name: outcome(name) for name in ("packed", "damaged", "bare")}))
"""


def test_a_fresh_cache_gets_the_same_bits_and_holds_them_to_the_checksums(
    saved: GetSaved, bases: Path, packed: Path, hub: FakeHub, tmp_path: Path
) -> None:
    """Packed and adapter, pushed by the command and loaded by name in another process."""
    original = saved("llama")
    student = make_student("llama", bases)
    student.save_pretrained(tmp_path / "student")
    config = tmp_path / "student" / "adapter_config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(values | {"base_model_name_or_path": "user/base"}), encoding="utf-8")
    hub.add("user/base", save_base("llama", bases))
    for folder, repo in ((packed, "user/packed"), (tmp_path / "student", "user/student")):
        before = contents(folder)
        assert main(["push", str(folder), "--repo", repo, "--no-private"]) == 0
        assert contents(folder) == before
    damaged, bare = (copy_of(original.folder, tmp_path / name) for name in ("damaged", "bare"))
    content = bytearray((damaged / WEIGHTS).read_bytes())
    content[-5] ^= 4
    (damaged / WEIGHTS).write_bytes(content)
    (bare / MANIFEST_NAME).unlink()
    hub.add("user/damaged", damaged)
    hub.add("user/bare", bare)
    settings = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")}
    child = run_python(
        FROM_HUB, str(tmp_path / "logits"), **settings, HF_HUB_DISABLE_XET="1", NO_PROXY="127.0.0.1,localhost"
    )
    assert child.returncode == 0, child.stderr[-2000:]
    found = load_file(tmp_path / "logits")
    assert torch.equal(found["packed"], original.logits)
    assert torch.equal(found["student"], logits(student))
    assert torch.equal(found["student, packed"], logits(student))
    outcome = json.loads(child.stdout.splitlines()[-1])
    assert outcome["packed"] == []
    assert outcome["damaged"].startswith("ChecksumError: model.safetensors must equal what was saved: tensor")
    (warning,) = outcome["bare"]
    assert warning.startswith(f"{MANIFEST_NAME} is missing beside {WEIGHTS}")


# ------------------------------------------------------------------------------------------------ what goes wrong


def test_what_passes_is_tried_again_and_nothing_is_sent_twice(packed: Path, hub: FakeHub) -> None:
    hub.fail("POST", "/api/repos/create", 503)
    hub.fail("POST", "/preupload/", 500)
    hub.fail("PUT", "/storage/")
    hub.fail("POST", "/commit/", 502, times=2)
    assert main(["push", str(packed), "--repo", "user/model"]) == 0
    files = hub.files("user/model")
    assert files[WEIGHTS] == (packed / WEIGHTS).read_bytes()
    assert hub.repositories["user/model"].private
    assert len(hub.repositories["user/model"].messages) == 1
    after = hub.requests[next(i for i, request in enumerate(hub.requests) if "/commit/" in request) :]
    assert not [request for request in after if request.startswith("PUT")]


def test_an_answer_that_was_lost_makes_no_second_commit(
    packed: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, lost = HfApi.create_commit, []

    def once(self: HfApi, *args: object, **kwargs: object) -> object:
        done = real(self, *args, **kwargs)
        if not lost:
            lost.append(done)
            raise upload._HTTP_ERROR("the line is dead")
        return done

    monkeypatch.setattr(HfApi, "create_commit", once)
    assert main(["push", str(packed), "--repo", "user/model"]) == 0
    assert len(hub.repositories["user/model"].messages) == 1


@pytest.mark.parametrize(
    ("request_", "status", "words"),
    [
        ("POST /api/repos/create", 500, ("the Hub must answer: got repo='user/model'", "500", "Try again later")),
        ("POST /preupload/", 503, ("the Hub must answer", "503")),
        ("PUT /storage/", None, ("the Hub must answer", "Try again later")),
        ("POST /commit/", None, ("the Hub must answer", "Try again later")),
        ("POST /commit/", 409, ("`repo` must not change during an upload", "Run the same again")),
        ("POST /commit/", 412, ("`repo` must not change during an upload",)),
        ("POST /batch", 422, ("the Hub must answer", "422")),
        ("POST /commit/", 404, ("must exist and be yours to see", "404")),
    ],
    ids=lambda value: value.replace("/", "-") if isinstance(value, str) else None,
)
def test_a_failure_that_stays_is_one_clear_error_and_leaves_all_as_it_was(
    packed: Path,
    hub: FakeHub,
    capsys: pytest.CaptureFixture[str],
    *,
    request_: str,
    status: int | None,
    words: tuple[str, ...],
) -> None:
    method, _, pattern = request_.partition(" ")
    before = contents(packed)
    hub.fail(method, pattern, status, times=1000)
    assert main(["push", str(packed), "--repo", "user/model"]) == 1
    error = capsys.readouterr().err.rpartition("error: ")[2]
    for word in (*words, "The local files are unchanged."):
        assert word in error
    assert contents(packed) == before
    assert not hub.repositories or not hub.repositories["user/model"].messages
    hub.faults.clear()
    assert main(["push", str(packed), "--repo", "user/model"]) == 0
    assert hub.files("user/model")[WEIGHTS] == before[WEIGHTS]


@pytest.mark.parametrize(
    ("token", "words"),
    [("hf_wrong", ("(401)", "hf auth login", "HF_TOKEN")), (READER, ("403", "write permission"))],
    ids=["401", "403"],
)
def test_who_may_not_write_is_told_how(
    saved: GetSaved, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, *, token: str, words: tuple[str, ...]
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match="`repo` must be one that you may write to: got repo='my-model'") as caught:
        saved("llama").model.push_to_hub("my-model")
    assert all(word in str(caught.value) for word in words)
    assert not hub.repositories


def test_a_card_that_the_hub_does_not_take_is_refused_before_anything_is_sent(
    packed: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    card = packed / "README.md"
    card.write_text(card.read_text().replace("library_name", "base_model: /home/me/base\nlibrary_name"))
    assert main(["push", str(packed), "--repo", "user/model"]) == 1
    assert '"base_model" with value "/home/me/base" is not valid' in capsys.readouterr().err
    assert not hub.stored
    assert hub.files("user/model") == {}


def test_offline_is_said(packed: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        upload.open_repository(upload.Destination("user/model"))
    assert main(["push", str(packed), "--repo", "user/model", "--dry-run"]) == 0
    assert not hub.requests
