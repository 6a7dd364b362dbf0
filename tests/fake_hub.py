"""A model hub on a local port: what `huggingface_hub` asks of one, with faults on demand.

`GET /api/models/REPO/revision/REV` lists files with their hashes; `HEAD` and `GET
/REPO/resolve/REV/FILE` give them, in part where a range is asked for.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LARGE = (".safetensors", ".bin", ".gguf", ".onnx")
"""What a hub keeps by SHA-256; the rest it knows by git's hash."""


class FakeHub:
    """Repositories by name: branches, and the files of every commit."""

    def __init__(self) -> None:
        self.branches: dict[str, dict[str, str]] = {}
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.asked: list[str] = []
        self.ranges: list[str] = []
        self.cut_after: int | None = None
        """Break every download of a large file off after so many bytes."""
        self.gated: set[str] = set()
        self.swapped: dict[str, bytes] = {}
        """Served instead of a file that is listed: a hub, or a middleman, that lies."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                return

            def do_GET(self) -> None:
                hub.answer(self)

            def do_HEAD(self) -> None:
                hub.answer(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def push(self, repository: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Make a commit of files; return its hash."""
        text = repr(
            sorted((name, hashlib.sha256(data).hexdigest()) for name, data in files.items())
        )
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.branches.setdefault(repository, {})[branch] = commit
        self.files[repository, commit] = dict(files)
        return commit

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        self.asked.append(f"{request.command} {path}")
        found = re.match(r"^/api/models/(.+?)(?:/revision/(.+))?$", path)
        if found is not None:
            return self._list(request, found[1], found[2] or "main")
        found = re.match(r"^/(.+?)/resolve/([^/]+)/(.+)$", path)
        if found is not None:
            return self._file(request, found[1], found[2], found[3])
        return self._send(request, 404, b"")

    def _commit(self, repository: str, revision: str) -> str | None:
        known = self.branches.get(repository, {})
        if (repository, revision) in self.files:
            return revision
        return known.get(revision)

    def _list(self, request: BaseHTTPRequestHandler, repository: str, revision: str) -> None:
        if repository not in self.branches:
            return self._send(request, 404, b"", {"X-Error-Code": "RepoNotFound"})
        commit = self._commit(repository, revision)
        if commit is None:
            return self._send(request, 404, b"", {"X-Error-Code": "RevisionNotFound"})
        siblings = []
        for name, data in self.files[repository, commit].items():
            row = {"rfilename": name, "size": len(data), "blobId": git_hash(data)}
            if name.endswith(LARGE):
                sha256 = hashlib.sha256(data).hexdigest()
                row["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 130}
            siblings.append(row)
        body = {"id": repository, "sha": commit, "siblings": siblings, "private": False}
        return self._send(request, 200, json.dumps(body).encode())

    def _file(
        self, request: BaseHTTPRequestHandler, repository: str, revision: str, name: str
    ) -> None:
        if repository in self.gated:
            return self._send(request, 403, b"", {"X-Error-Code": "GatedRepo"})
        commit = self._commit(repository, revision)
        if commit is None or name not in self.files[repository, commit]:
            return self._send(request, 404, b"", {"X-Error-Code": "EntryNotFound"})
        data = self.files[repository, commit][name]
        is_large = name.endswith(LARGE)
        etag = hashlib.sha256(data).hexdigest() if is_large else git_hash(data)
        data = self.swapped.get(name, data)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        wanted = re.match(r"bytes=(\d+)-", request.headers.get("Range") or "")
        if wanted is not None and request.command == "GET":
            start = int(wanted[1])
            if start:
                self.ranges.append(f"{name} from {start}")
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            return self._send(request, 206, data[start:], headers, is_large=is_large)
        return self._send(request, 200, data, headers, is_large=is_large)

    def _send(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        *,
        is_large: bool = False,
    ) -> None:
        request.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "HEAD":
            return
        if is_large and self.cut_after is not None and len(body) > self.cut_after:
            request.wfile.write(body[: self.cut_after])
            request.wfile.flush()
            request.close_connection = True
            return
        request.wfile.write(body)


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
