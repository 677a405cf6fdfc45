"""`bitdistiller push`: upload a model folder, after it was verified and its list of files was shown."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

from bitdistiller_peft.cli import stages
from bitdistiller_peft.cli.folder import Folder, bits_per_weight, read_folder
from bitdistiller_peft.cli.measured import Measured, measured
from bitdistiller_peft.cli.output import RESULT
from bitdistiller_peft.cli.tables import table
from bitdistiller_peft.cli.texts import read_text
from bitdistiller_peft.cli.verb import Console, Positional, Settings, Verb
from bitdistiller_peft.cli.verbs.verify import check_bytes
from bitdistiller_peft.errors import CheckpointError, ConfigError, DataError

WANTED = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json"),
    *("bitdistiller.json", "README.md", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*"),
    *("merges.txt", "chat_template.jinja", "chat_templates/*", "preprocessor_config.json", ".eval_results/*.yaml"),
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
    """Verify, show, and upload in one commit; of a card that the repository has already, our own parts are renewed.

    Args:
        settings: for `push:`.
        console: gets the list of files.
        source: model folder.
        repo: repository on the Hub.

    Raises:
        ConfigError: `repo` is no name of a repository.
        CheckpointError: the folder is no quantized model, or differs from its checksums.
        DataError: `push.results` does not know the model.
        HubError: the Hub refuses, or does not answer; the folder stays as it is.
    """
    if not _REPO.fullmatch(repo):
        raise ConfigError(f"`repo` must be like user/name: got repo={repo!r}.")
    folder = read_folder(source)
    _check(folder)
    results = _results(settings, folder)
    found = sorted({file for pattern in WANTED for file in folder.path.glob(pattern) if file.is_file()})
    files = {str(file.relative_to(folder.path)): file for file in found} | results.files
    sizes = {name: file.stat().st_size for name, file in files.items()}
    console.say(table(("file", "bytes"), [(name, f"{size:,}") for name, size in sizes.items()]))
    state = "in training, latent" if folder.kind in ("adapter", "latent") else "packed"
    bits = bits_per_weight(folder)
    if results.rows:
        figures = ", ".join(f"{row['metric']} {row['value']:.6g}" for row in results.rows)
        console.say(f"\nmeasured, for the card: {figures}")
    console.say(f"\n{len(files)} files, {sum(sizes.values()):,} bytes, {bits:.3f} bits per weight, {state} -> {repo}")
    result = {"repo": repo, "folder": str(folder.path), "files": sizes, "state": state, "url": None}
    if settings.is_dry_run:
        console.say("dry run: nothing was uploaded")
        return {**result, "dry_run": True}
    url = _upload(settings, folder, repo, files, results.rows)
    console.say(f"uploaded: {url}")
    return {**result, "url": url}


def _check(folder: Folder) -> None:
    if folder.kind == "full precision":
        raise CheckpointError(f"{folder.path} must hold a quantized model: it is in full precision.")
    if folder.kind != "adapter":
        check_bytes(folder)


def _results(settings: Settings, folder: Folder) -> Measured:
    """What was measured of this very model: in the folder that was named, or in the evaluation of its chain."""
    source = settings["push.results"]
    if source is not None:
        return measured(source, folder.path)
    beside = folder.path.parent.parent / "eval"
    if folder.path.name == "packed" and (beside / RESULT).is_file():
        with contextlib.suppress(DataError):  # it may be of another model of the chain
            return measured(str(beside), folder.path)
    return Measured()


def _upload(settings: Settings, folder: Folder, repo: str, files: dict[str, Path], rows: list[dict[str, Any]]) -> str:
    from bitdistiller_peft.hub.upload import Destination, commit_files, open_repository

    to = Destination(repo, branch=settings["push.branch"], private=settings["push.private"])
    repo = open_repository(to)
    contents: dict[str, Path | bytes] = dict(files)
    if CARD in contents:
        contents[CARD] = _card(folder, repo, rows)
    return str(commit_files(repo, contents, to, message=settings["push.message"]).commit_url)


def _card(folder: Folder, repo: str, rows: list[dict[str, Any]]) -> bytes:
    """The card as it reads on the Hub: it was written with the folder in the place of the repository."""
    from bitdistiller_peft.hub.card import with_results

    text = read_text(folder.path / CARD)
    call = r"PeftModel\.from_pretrained\([^,)]+, " if folder.kind == "adapter" else r"CausalLM\.from_pretrained\("
    text = re.sub(rf"({call})(['\"])[^'\"\n]*\2", lambda found: f"{found[1]}{found[2]}{repo}{found[2]}", text)
    title = repo.rpartition("/")[2]
    text = re.sub(r"^# .*$", f"# {title}", text, count=1, flags=re.MULTILINE)
    return with_results(text, rows).encode()


VERB = Verb(
    "push",
    "upload a model folder; shows the list of files first",
    run,
    sections=("push",),
    positionals=(Positional("folder", "packed, latent or adapter; default: what the chain of --config made", "?"),),
    epilog="example: bitdistiller push out/distill/packed --repo user/name --dry-run",
)
