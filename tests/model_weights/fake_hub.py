"""A hub on loopback: the three endpoints that huggingface_hub's snapshot_download uses (model info, tree, resolve), and what was asked."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "89abcdef0123456789abcdef0123456789abcdef"


@dataclass
class FakeHub:
    """repos: id → files.  gated: ids whose files need `token`, while their listing is open, as on the real hub.
    refused: status by method, for file requests.  down: status for every request.  ranges: whether a part of a file can be asked
    for.  asked: (method, path) of every request.  sent: file name → bytes."""

    repos: Mapping[str, Mapping[str, bytes]]
    gated: frozenset[str] = frozenset()
    token: str = "hf_right"
    refused: Mapping[str, int] = field(default_factory=dict)
    down: int = 0
    ranges: bool = True
    asked: list[tuple[str, str]] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    url: str = ""

    def fetched(self) -> set[str]:
        """Names of the files whose bytes were sent."""
        return {path.split(f"/{COMMIT}/")[-1] for method, path in self.asked if method == "GET" and "/resolve/" in path}


@contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    served: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: requests are in FakeHub.asked."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.served.asked.append((self.command, path))
        parts = path.strip("/").split("/")
        refused = self.served.down or (self.served.refused.get(self.command, 0) if "resolve" in parts else 0)
        if refused:
            return self._send(refused, b"")
        if parts[:2] == ["api", "models"]:
            return self._api("/".join(parts[2:4]), parts[4:])
        if len(parts) > 4 and parts[2] == "resolve":
            return self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        return self._send(404, b"")

    def _api(self, repo: str, rest: list[str]) -> None:
        files = self.served.repos.get(repo)
        if files is None:
            return self._send(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        revision = rest[1] if len(rest) > 1 else "main"
        commit = {"main": COMMIT, COMMIT: COMMIT, "v1": OLDER, OLDER: OLDER}.get(revision)
        if commit is None:
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev"})
        if rest[:1] == ["tree"]:
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            return self._send(200, json.dumps(entries).encode())
        info = {"id": repo, "modelId": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
        return self._send(200, json.dumps(info).encode())

    def _file(self, repo: str, revision: str, name: str) -> None:
        data = self.served.repos.get(repo, {}).get(name)
        if data is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        sent = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if repo in self.served.gated and sent != self.served.token:
            status = 403 if sent else 401
            return self._send(status, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        etag = hashlib.sha1(data).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": revision, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if asked is None or not self.served.ranges:
            self._count(name, len(data))
            return self._send(200, data, headers)
        first, last = int(asked[1]), min(int(asked[2]), len(data) - 1)
        self._count(name, last + 1 - first)
        return self._send(
            206, data[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"}
        )

    def _count(self, name: str, num_bytes: int) -> None:
        if self.command == "GET":
            self.served.sent[name] = self.served.sent.get(name, 0) + num_bytes

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
