"""A Hub on the loopback interface that speaks what `huggingface_hub` really sends: repositories, large files, commits.

Written from the client's source and the Hub's public API: create, preupload, LFS batch with single and multipart
transfers and verification, commits as NDJSON, metadata of cards, and downloads with ETags and redirects. Faults can be
planted into any request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import yaml

TOKEN, READER = "hf_writer", "hf_reader"
PART = 60_000
"""Bytes above which a large file goes up in parts of that size; on the real Hub it is gigabytes."""


@dataclass
class Repository:
    """Branches with the commits made to them; a commit holds every file."""

    private: bool = False
    branches: dict[str, list[dict[str, bytes]]] = field(default_factory=lambda: {"main": [{}]})
    messages: list[str] = field(default_factory=list)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        for branch, commits in self.branches.items():
            for commit in commits:
                if _oid(branch, commits, commit) == revision:
                    return commit
        return self.branches[revision][-1]


@dataclass
class Fault:
    """What goes wrong: a status, or a connection that breaks; so many times."""

    method: str
    pattern: str
    status: int | None
    times: int


@dataclass
class FakeHub:
    """The Hub's state, for tests to look into."""

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def add(self, name: str, folder: Path) -> None:
        """Put a folder there as a public repository."""
        self.repositories[name] = Repository()
        self.repositories[name].branches["main"].append({file.name: file.read_bytes() for file in folder.glob("*")})

    def fail(self, method: str, pattern: str, status: int | None = None, *, times: int = 1) -> None:
        """Let the next requests of a kind fail; without a status, the connection breaks in the middle."""
        self.faults.append(Fault(method, pattern, status, times))

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        return self.repositories[name].files(revision)


def _oid(branch: str, commits: list[dict[str, bytes]], commit: dict[str, bytes]) -> str:
    position = next(index for index, other in enumerate(commits) if other is commit)
    return hashlib.sha1(f"{branch} {position}".encode()).hexdigest()


def is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def git_oid(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def card_errors(text: str) -> list[str]:
    """The rules of the Hub for a card's metadata that can be written down."""
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    values = yaml.safe_load(found[1]) if found else None
    if not isinstance(values, dict):
        return ["empty or missing yaml metadata in repo card"]
    errors = []
    bases = values.get("base_model", [])
    for name in [bases] if isinstance(bases, str) else bases:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            errors.append(f'"base_model" with value "{name}" is not valid. Use a model id from https://hf.co/models.')
    if values.get("base_model_relation", "quantized") not in ("adapter", "merge", "quantized", "finetune"):
        errors.append('"base_model_relation" must be one of [adapter, merge, quantized, finetune]')
    if not all(isinstance(tag, str) for tag in values.get("tags", [])):
        errors.append('"tags" must be an array of strings')
    for index, entry in enumerate(values.get("model-index", [])):
        for result in entry.get("results", []):
            if not {"task", "dataset", "metrics"} <= set(result) or "name" not in entry:
                errors.append(f'"model-index[{index}]" must have a name, and results with task, dataset, metrics')
    return errors


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def _reply(self, status: int, content: object = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _serve(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.hub.requests.append(f"{self.command} {path}")
        for fault in self.hub.faults:
            if fault.times and fault.method == self.command and re.search(fault.pattern, path):
                fault.times -= 1
                return self._break(fault)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) if self.command in ("POST", "PUT") else b""
        for method, pattern, answer in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method:
                return answer(self, body, **found.groupdict())
        return self._reply(404, {"error": "no such address"}, X_Error_Code="RepoNotFound")

    def _break(self, fault: Fault) -> None:
        self.close_connection = True
        if fault.status is None:
            self.rfile.read(min(100, int(self.headers.get("Content-Length") or 0)))  # and no word more
            self.connection.close()
            return
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._reply(fault.status, {"error": f"planted {fault.status}"}, Connection="close")

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    # ------------------------------------------------------------------------------------------------ who may what

    def _may_write(self) -> bool:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token == TOKEN:
            return True
        if token == READER:
            self._reply(403, {"error": "no"}, X_Error_Message="You don't have the required permissions")
        else:
            message = "Invalid credentials in Authorization header"
            self._reply(401, {"error": message}, X_Error_Message=message)
        return False

    def _repository(self, repo: str) -> Repository | None:
        found = self.hub.repositories.get(repo)
        if found is None or (found.private and TOKEN not in self.headers.get("Authorization", "")):
            self._reply(404 if found is None else 401, {"error": "not found"}, X_Error_Code="RepoNotFound")
            return None
        return found

    # ------------------------------------------------------------------------------------------------ uploads

    def create(self, body: bytes) -> None:
        if self._may_write():
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'user'}/{asked['name']}"
            answer = {"url": f"{self.hub.address}/{repo}", "name": repo}
            if repo in self.hub.repositories:
                self._reply(409, {**answer, "error": "You already created this model repo"})
                return
            self.hub.repositories[repo] = Repository(private=asked.get("visibility") == "private")
            self._reply(200, answer)

    def branch(self, body: bytes, repo: str, branch: str) -> None:
        if self._may_write() and (found := self._repository(repo)):
            is_new = branch not in found.branches
            found.branches.setdefault(branch, [dict(found.files())])
            self._reply(200 if is_new else 409, {"error": "Reference already exists"})

    def validate(self, body: bytes) -> None:
        errors = card_errors(json.loads(body)["content"])
        told = {"errors": [{"message": error} for error in errors], "warnings": []}
        self._reply(400 if errors else 200, told)

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        if self._may_write() and (found := self._repository(repo)):
            have, answers = found.files(revision), []
            for file in json.loads(body)["files"]:
                path, mode = file["path"], "lfs" if is_large(file["path"]) else "regular"
                entry = {"path": path, "uploadMode": mode, "shouldIgnore": False}
                if path in have:
                    entry["oid"] = hashlib.sha256(have[path]).hexdigest() if is_large(path) else git_oid(have[path])
                answers.append(entry)
            self._reply(200, {"files": answers})

    def batch(self, body: bytes, repo: str) -> None:
        if self._may_write():
            objects = []
            for entry in json.loads(body)["objects"]:
                oid, size = entry["oid"], entry["size"]
                header = {}
                if size > PART:
                    numbers = range(1, -(-size // PART) + 1)
                    header = {f"{n:05}": f"{self.hub.address}/storage/{oid}/{n}" for n in numbers}
                    header["chunk_size"] = str(PART)
                kind = "complete" if header else "storage"
                upload = {"href": f"{self.hub.address}/{kind}/{oid}", "header": header}
                verify = {"href": f"{self.hub.address}/verify"}
                actions = {} if oid in self.hub.stored else {"actions": {"upload": upload, "verify": verify}}
                objects.append({"oid": oid, "size": size, **actions})
            self._reply(200, {"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str, part: str | None = None) -> None:
        if part:
            self.hub.parts[oid, int(part)] = body
        elif hashlib.sha256(body).hexdigest() == oid:
            self.hub.stored[oid] = body
        self._reply(200, ETag=f'"{hashlib.md5(body).hexdigest()}"')

    def complete(self, body: bytes, oid: str) -> None:
        numbers = [part["partNumber"] for part in json.loads(body)["parts"]]
        content = b"".join(self.hub.parts.pop((oid, number)) for number in numbers)
        if hashlib.sha256(content).hexdigest() != oid:
            self._reply(422, {"error": "the parts are not the file"})
            return
        self.hub.stored[oid] = content
        self._reply(200, {"success": True})

    def verify(self, body: bytes) -> None:
        asked = json.loads(body)
        self._reply(200 if len(self.hub.stored.get(asked["oid"], b"")) == asked["size"] else 404, {})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        if not self._may_write() or not (found := self._repository(repo)):
            return
        lines = [json.loads(line) for line in body.splitlines()]
        files = dict(found.files(revision))
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        found.branches[revision].append(files)
        found.messages.append(lines[0]["value"]["summary"])
        oid = _oid(revision, found.branches[revision], files)
        self._reply(200, {"commitUrl": f"{self.hub.address}/{repo}/commit/{oid}", "commitOid": oid})

    # ------------------------------------------------------------------------------------------------ downloads

    def info(self, body: bytes, repo: str, revision: str | None = None) -> None:
        if found := self._repository(repo):
            names = [{"rfilename": name} for name in found.files(revision or "main")]
            commits = found.branches["main"]
            self._reply(200, {"id": repo, "sha": _oid("main", commits, commits[-1]), "siblings": names})

    def tree(self, body: bytes, repo: str, revision: str) -> None:
        if found := self._repository(repo):
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": git_oid(content)}
                for name, content in found.files(revision).items()
            ]
            self._reply(200, entries)

    def resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        found = self._repository(repo)
        if found is None:
            return
        files = found.files(revision)
        commit = next(
            _oid(branch, commits, c) for branch, commits in found.branches.items() for c in commits if c is files
        )
        if path not in files:
            self._reply(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        elif is_large(path):
            oid = hashlib.sha256(files[path]).hexdigest()
            self.hub.stored.setdefault(oid, files[path])
            linked = {"X_Linked_ETag": f'"{oid}"', "X_Linked_Size": str(len(files[path])), "X_Repo_Commit": commit}
            elsewhere = self.hub.address.replace("127.0.0.1", "localhost")  # the client treats another host differently
            self._reply(302, b"", Location=f"{elsewhere}/cdn/{oid}", **linked)
        else:
            self._reply(200, files[path], ETag=f'"{git_oid(files[path])}"', X_Repo_Commit=commit)

    def cdn(self, body: bytes, oid: str) -> None:
        self._reply(200, self.hub.stored[oid], ETag=f'"{oid}"')

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


_REPO, _REV = r"(?P<repo>[\w.-]+/[\w.-]+)", r"(?P<revision>[^/]+)"
_ROUTES: list[tuple[tuple[str, ...], str, Callable[..., None]]] = [
    (("POST",), r"/api/repos/create", _Handler.create),
    (("POST",), r"/api/validate-yaml", _Handler.validate),
    (("POST",), rf"/api/models/{_REPO}/branch/(?P<branch>.+)", _Handler.branch),
    (("POST",), rf"/api/models/{_REPO}/preupload/{_REV}", _Handler.preupload),
    (("POST",), rf"/api/models/{_REPO}/commit/{_REV}", _Handler.commit),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    (("PUT",), r"/storage/(?P<oid>\w+)(/(?P<part>\d+))?", _Handler.store),
    (("POST",), r"/complete/(?P<oid>\w+)", _Handler.complete),
    (("POST",), r"/verify", _Handler.verify),
    (("GET",), rf"/api/models/{_REPO}(/revision/{_REV})?", _Handler.info),
    (("GET",), rf"/api/models/{_REPO}/tree/{_REV}.*", _Handler.tree),
    (("GET", "HEAD"), rf"/{_REPO}/resolve/{_REV}/(?P<path>.+)", _Handler.resolve),
    (("GET", "HEAD"), r"/cdn/(?P<oid>\w+)", _Handler.cdn),
]


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A Hub without repositories; `address` is what `HF_ENDPOINT` should be."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True, kwargs={"poll_interval": 0.02}).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
