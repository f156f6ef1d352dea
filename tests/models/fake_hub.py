# SPDX-License-Identifier: Apache-2.0
"""A hub of one folder, for huggingface_hub's own client: what it asks for over HTTP, and how it can fail."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0" * 39 + "1"


class Hub(ThreadingHTTPServer):
    """refuse: (status, error code) for every file; size: told instead of the files' own."""

    daemon_threads = True

    def __init__(self, folder: Path, refuse: tuple[int, str] | None = None, size: int | None = None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.refuse = refuse
        self.size = size
        self.downloads: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self) -> list[Path]:
        return sorted(self.folder.iterdir())

    def size_of(self, file: Path) -> int:
        return self.size or file.stat().st_size


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def _answer(self, body: bool) -> None:
        if self.server.refuse:
            status, code = self.server.refuse
            self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code}, body)
        elif self.path.startswith("/api/"):
            self._send(200, json.dumps(self._listing()).encode(), {"Content-Type": "application/json"}, body)
        else:
            self._file(body)

    def _listing(self) -> Any:
        hub = self.server
        if "/tree/" in self.path:
            return [
                {"type": "file", "path": file.name, "size": hub.size_of(file), "oid": _etag(file)}
                for file in hub.files()
            ]
        files = [{"rfilename": file.name, "size": hub.size_of(file)} for file in hub.files()]
        return {"id": "some/model", "sha": COMMIT, "siblings": files, "private": False}

    def _file(self, body: bool) -> None:
        file = self.server.folder / self.path.rpartition("/")[2]
        if body:
            self.server.downloads.append(file.name)
        self._send(200, file.read_bytes(), {"X-Repo-Commit": COMMIT, "ETag": f'"{_etag(file)}"'}, body)

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()


@contextmanager
def serving(folder: Path, **how: Any) -> Iterator[Hub]:
    """The hub, answering until the block ends."""
    with Hub(folder, **how) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


@contextmanager
def silence() -> Iterator[str]:
    """The URL of a hub that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
