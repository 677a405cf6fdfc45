"""As much of the Hub as `from_pretrained` asks for, served from a folder of repositories on the loopback interface."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c" * 40


class _Handler(BaseHTTPRequestHandler):
    root: Path

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        repository = path.partition("/user/")[2].partition("/")[0]
        folder = self.root / (repository or "none")
        files = sorted(folder.glob("*"))
        if "/tree/" in path:
            tree = [{"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0"} for file in files]
            self._answer(200, json.dumps(tree).encode())
        elif path.startswith("/api/models/"):
            names = [{"rfilename": file.name} for file in files]
            self._answer(200, json.dumps({"id": f"user/{repository}", "sha": COMMIT, "siblings": names}).encode())
        elif (file := folder / path.rpartition("/")[2]).is_file():
            body = file.read_bytes()
            self._answer(200, body, ETag=hashlib.sha256(body).hexdigest())
        else:
            self._answer(404, b"", X_Error_Code="EntryNotFound")

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def fake_hub(root: Path) -> Iterator[str]:
    """Serve each folder in `root` as a repository ``user/<folder>``; gives the address for `HF_ENDPOINT`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"root": root}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
