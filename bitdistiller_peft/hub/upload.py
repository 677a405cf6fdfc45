"""Upload files to the Hub in one commit: all of them or none, and a clear word when the Hub refuses.

`huggingface_hub` repeats what it sends to the storage, but not the requests that make the repository and the commit.
Those are repeated here. A second try starts from what the Hub then holds: files that it has are not sent again, and a
commit that came through although its answer was lost is not made twice.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from bitdistiller_peft.errors import CheckpointError, HubError
from bitdistiller_peft.hub.card import CARD_NAME
from bitdistiller_peft.hub.card_sections import renew_card
from bitdistiller_peft.hub.manifest import MANIFEST_NAME, read_manifest

WAITS = (1.0, 2.0, 4.0)
"""Seconds between the tries."""

_UNCHANGED = "The local files are unchanged."
_AGAIN = f"{_UNCHANGED} Try again later: what the Hub has by then is not sent again."
_HTTP_ERROR: Any = HfHubHTTPError.__bases__[0]  # of httpx, whose name differs between versions of huggingface_hub
_FAILURES = (_HTTP_ERROR, OSError, RuntimeError, ValueError)

_T = TypeVar("_T")


@dataclass(frozen=True)
class Destination:
    """Where files go.

    Attributes:
        repo: ``"user/name"``, or a name alone for a repository of one's own.
        branch: of the repository; `None` for the main one.
        private: whether a new repository is private; `None` leaves it to the user's settings on the Hub.
        token: access token; that of this machine by default.
        create_pr: propose the files as a pull request.
    """

    repo: str
    branch: str | None = None
    private: bool | None = None
    token: str | bool | None = None
    create_pr: bool | None = None


def open_repository(to: Destination) -> str:
    """Create the repository and the branch, unless they are there.

    Args:
        to: where files will go.

    Returns:
        The repository's full name.

    Raises:
        HubError: the Hub refuses, or does not answer.
    """
    api = HfApi(token=to.token)

    def create() -> str:
        repo = str(api.create_repo(to.repo, private=to.private, exist_ok=True).repo_id)
        if to.branch and not to.branch.startswith("refs/"):  # a pull request has its own
            api.create_branch(repo, branch=to.branch, exist_ok=True)
        return repo

    return _answered(create, to.repo)


def commit_files(
    repo: str, files: Mapping[str, Path | bytes], to: Destination, *, message: str, description: str | None = None
) -> CommitInfo:
    """Upload files in one commit; of a model card that the repository has already, our own parts are renewed.

    Args:
        repo: full name, from `open_repository`.
        files: contents by their path in the repository.
        to: branch, token, pull request or not.
        message: of the commit.
        description: of the commit.

    Raises:
        HubError: the Hub refuses, or does not answer; nothing is committed then.
    """
    api = HfApi(token=to.token)

    def commit() -> CommitInfo:
        contents = {**files, **_renewed_card(api, repo, files, to.branch)}
        operations = [
            CommitOperationAdd(
                path_in_repo=name, path_or_fileobj=content if isinstance(content, bytes) else str(content)
            )
            for name, content in contents.items()
        ]
        return api.create_commit(
            repo,
            operations,
            commit_message=message,
            commit_description=description,
            revision=to.branch,
            create_pr=to.create_pr,
        )

    return _answered(commit, repo)


def _renewed_card(api: HfApi, repo: str, files: Mapping[str, Path | bytes], branch: str | None) -> dict[str, bytes]:
    """The card to upload in the place of that of the files, where the repository has one; else nothing."""
    if CARD_NAME not in files or not api.file_exists(repo, CARD_NAME, revision=branch):
        return {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        there = Path(api.hf_hub_download(repo, CARD_NAME, revision=branch, local_dir=folder)).read_bytes()
        is_same = False
        if MANIFEST_NAME in files and api.file_exists(repo, MANIFEST_NAME, revision=branch):
            before = Path(api.hf_hub_download(repo, MANIFEST_NAME, revision=branch, local_dir=folder))
            is_same = _same_weights(before, files[MANIFEST_NAME], folder)
    try:
        text = there.decode()
    except UnicodeDecodeError:
        return {CARD_NAME: there}
    return {CARD_NAME: renew_card(text, _bytes(files[CARD_NAME]).decode(), is_same_model=is_same).encode()}


def _same_weights(before: Path, content: Path | bytes, folder: Path) -> bool:
    """Whether two manifests tell of the same tensors."""
    now = folder / f"new-{MANIFEST_NAME}"
    now.write_bytes(_bytes(content))
    try:
        return read_manifest(before) == read_manifest(now)
    except CheckpointError:
        return False


def _bytes(content: Path | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def _answered(call: Callable[[], _T], repo: str) -> _T:
    """Call until there is an answer, a few times at most."""
    waits = iter(WAITS)
    while True:
        try:
            return call()
        except _FAILURES as error:
            cause = _cause(error)
            wait = next(waits, None) if error is cause and _may_pass(error) else None  # the other was repeated
            if wait is None:
                raise _refusal(cause, repo) from cause
            time.sleep(wait)


def _cause(error: BaseException) -> BaseException:
    """What is behind the general error that an upload thread ends with."""
    return error.__cause__ if type(error) is RuntimeError and error.__cause__ is not None else error


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _may_pass(error: BaseException) -> bool:
    status = _status(error)
    if status is None:
        return isinstance(error, _HTTP_ERROR) and not isinstance(error, OfflineModeIsEnabled)
    return status in (408, 429) or status >= 500


def _refusal(error: BaseException, repo: str) -> HubError:
    """The error for people: what must be so, what the Hub said, what to do."""
    said = str(error).strip().splitlines() or [type(error).__name__]
    words = next((line for line in reversed(said) if line.strip()), "") if _status(error) else said[-1]
    got = f"got repo={repo!r}"
    match _status(error):
        case 401:
            text = (
                f"`repo` must be one that you may write to: {got}, and the Hub knows no valid token (401). Log in with "
                f"`hf auth login`, or set HF_TOKEN. {_UNCHANGED}"
            )
        case 402 | 403:
            text = (
                f"`repo` must be one that you may write to: {got}, and the Hub forbids it ({_status(error)}: {words}) "
                f"Use a token with write permission, or a repository of your own. {_UNCHANGED}"
            )
        case 404:
            text = f"`repo` must exist and be yours to see: {got}, and the Hub finds it not (404). {_UNCHANGED}"
        case 409 | 412:
            text = (
                f"`repo` must not change during an upload: {got}, and somebody else has written to it "
                f"({_status(error)}). Run the same again. {_UNCHANGED}"
            )
        case 400:
            text = f"the upload must suit the Hub's rules: {got} (400: {words}). {_UNCHANGED}"
        case None if isinstance(error, OfflineModeIsEnabled):
            text = f"the Hub must be reachable: {got}, and HF_HUB_OFFLINE is set. Set HF_HUB_OFFLINE=0. {_UNCHANGED}"
        case None if isinstance(error, ValueError):
            text = f"the upload must suit the Hub's rules: {got} ({'; '.join(said)}). {_UNCHANGED}"
        case status:
            text = f"the Hub must answer: {got} ({status or type(error).__name__}: {words}). {_AGAIN}"
    return HubError(text)
