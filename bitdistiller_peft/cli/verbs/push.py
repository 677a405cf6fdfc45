"""`bitdistiller push`: upload a model folder, after it was verified and its list of files was shown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from bitdistiller_peft.cli import stages
from bitdistiller_peft.cli.folder import Folder, bits_per_weight, read_folder
from bitdistiller_peft.cli.tables import table
from bitdistiller_peft.cli.verb import Console, Positional, Settings, Verb
from bitdistiller_peft.cli.verbs.verify import check_bytes
from bitdistiller_peft.errors import CheckpointError, ConfigError

WANTED = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json"),
    *("bitdistiller.json", "README.md", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*"),
    *("merges.txt", "chat_template.jinja", "chat_templates/*", "preprocessor_config.json", "recipe.yaml"),
)
CARD = "README.md"
_REPO = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")


def run(settings: Settings, console: Console) -> dict[str, Any]:
    """Push the folder that was named, or the packed model of the chain."""
    source, repo = settings.arguments["folder"], settings["push.repo"]
    if source is None:
        found = stages.packed_folder(settings)
        if found is None:
            raise ConfigError("`FOLDER` must be given, or `output` in the file of --config hold a packed model.")
        source = str(found)
    if repo is None:
        raise ConfigError("`push.repo` must be given: pass --repo user/name, or `push.repo` in the file of --config.")
    return execute(settings, console, source, repo)


def execute(settings: Settings, console: Console, source: str, repo: str) -> dict[str, Any]:
    """Verify, show, and upload in one commit; a card that the repository has already is kept.

    Args:
        settings: for `push:`.
        console: gets the list of files.
        source: model folder.
        repo: repository on the Hub.

    Raises:
        ConfigError: `repo` is no name of a repository.
        CheckpointError: the folder is no quantized model, or differs from its checksums.
    """
    if not _REPO.fullmatch(repo):
        raise ConfigError(f"`repo` must be like user/name: got repo={repo!r}.")
    folder = read_folder(source)
    _check(folder)
    files = sorted({file for pattern in WANTED for file in folder.path.glob(pattern) if file.is_file()})
    sizes = {str(file.relative_to(folder.path)): file.stat().st_size for file in files}
    console.say(table(("file", "bytes"), [(name, f"{size:,}") for name, size in sizes.items()]))
    state = "in training, latent" if folder.kind in ("adapter", "latent") else "packed"
    bits = bits_per_weight(folder)
    console.say(f"\n{len(files)} files, {sum(sizes.values()):,} bytes, {bits:.3f} bits per weight, {state} -> {repo}")
    result = {"repo": repo, "folder": str(folder.path), "files": sizes, "state": state, "url": None}
    if settings.is_dry_run:
        console.say("dry run: nothing was uploaded")
        return {**result, "dry_run": True}
    url = _upload(settings, folder, files, repo)
    console.say(f"uploaded: {url}")
    return {**result, "url": str(url)}


def _check(folder: Folder) -> None:
    if folder.kind == "full precision":
        raise CheckpointError(f"{folder.path} must hold a quantized model: it is in full precision.")
    if folder.kind != "adapter":
        check_bytes(folder)


def _upload(settings: Settings, folder: Folder, files: list[Path], repo: str) -> Any:
    from huggingface_hub import CommitOperationAdd, HfApi

    api, branch = HfApi(), settings["push.branch"]
    repo = api.create_repo(repo, private=settings["push.private"], exist_ok=True).repo_id
    if branch:
        api.create_branch(repo, branch=branch, exist_ok=True)
    has_card = api.file_exists(repo, CARD, revision=branch)
    operations = []
    for file in files:
        name = str(file.relative_to(folder.path))
        if name == CARD and has_card:
            continue
        content: Any = _card(file, folder, repo) if name == CARD else str(file)
        operations.append(CommitOperationAdd(path_in_repo=name, path_or_fileobj=content))
    return api.create_commit(repo, operations, commit_message=settings["push.message"], revision=branch).commit_url


def _card(file: Path, folder: Folder, repo: str) -> bytes:
    """The card as it reads on the Hub: it was written with the folder in the place of the repository."""
    text = file.read_text(encoding="utf-8")
    call = r"PeftModel\.from_pretrained\([^,)]+, " if folder.kind == "adapter" else r"CausalLM\.from_pretrained\("
    text = re.sub(rf"({call})(['\"])[^'\"\n]*\2", lambda found: f"{found[1]}{found[2]}{repo}{found[2]}", text)
    title = repo.rpartition("/")[2]
    return re.sub(r"^# .*$", f"# {title}", text, count=1, flags=re.MULTILINE).encode()


VERB = Verb(
    "push",
    "upload a model folder; shows the list of files first",
    run,
    sections=("push",),
    positionals=(Positional("folder", "packed, latent or adapter; default: what the chain of --config made", "?"),),
    epilog="example: bitdistiller push out/distill/packed --repo user/name --dry-run",
)
