"""A hub of one repository on this machine, speaking as much of the real one's language as a download needs."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "c" * 40
LARGE = 1000
"""Files from this size on are kept outside of Git, as weights are."""


def blob_id(content: bytes) -> str:
    """Git's name of a content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class StubHub:
    """The server; its attributes may be changed while it runs.

    Attributes:
        files: Name -> content.
        shown: Name -> what a request gets instead of the content.
        cut: Name -> bytes after which the connection is closed, once.
        status: Answer everything with this status and error code.
        token: The only accepted token; None asks for none.
        commit: What `main` stands for.
        ranges: Range headers that came, by name.
        tokens: Authorization headers that came.
    """

    def __init__(self, model: str, files: dict[str, bytes]) -> None:
        self.model, self.files = model, files
        self.shown: dict[str, bytes] = {}
        self.cut: dict[str, int] = {}
        self.status: tuple[int, str] | None = None
        self.token: str | None = None
        self.commit = COMMIT
        self.ranges: list[tuple[str, str | None]] = []
        self.tokens: list[str | None] = []
        self.ignore_ranges = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None: ...

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        """Answer one request."""
        sent = request.headers.get("Authorization")
        self.tokens.append(sent)
        path = request.path.split("?")[0]
        if self.status is not None:
            return _send(request, self.status[0], b"{}", body, {"X-Error-Code": self.status[1]})
        if self.token is not None and sent != f"Bearer {self.token}":
            return _send(request, 401, b"{}", body, {"X-Error-Code": "GatedRepo"})
        if match := re.fullmatch(rf"/api/models/{self.model}(?:/revision/([^/]+))?", path):
            if match[1] not in (None, "main", self.commit):
                return _send(request, 404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
            return _send(request, 200, json.dumps(self._info()).encode(), body, {"Content-Type": "application/json"})
        if match := re.fullmatch(rf"/{self.model}/resolve/([^/]+)/(.+)", path):
            return self._file(request, match[2], body)
        return _send(request, 404, b"{}", body, {"X-Error-Code": "RepoNotFound"})

    def _info(self) -> dict[str, Any]:
        siblings = []
        for name, content in self.files.items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": blob_id(content)}
            if len(content) >= LARGE:
                entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            siblings.append(entry)
        return {"id": self.model, "sha": self.commit, "siblings": siblings, "tags": [], "downloads": 0}

    def _file(self, request: BaseHTTPRequestHandler, name: str, body: bool) -> None:
        right = self.files[name]
        content = self.shown.get(name, right)
        large = len(right) >= LARGE
        etag = hashlib.sha256(right).hexdigest() if large else blob_id(right)
        headers = {"X-Repo-Commit": self.commit, "ETag": f'"{etag}"'}
        if large:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(right))}
        asked = request.headers.get("Range")
        if body:
            self.ranges.append((name, asked))
        status, start = 200, 0
        if asked and not self.ignore_ranges:
            status, start = 206, int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        limit = self.cut.pop(name, None) if body else None
        _send(request, status, content[start:], body, headers, limit)


def _send(
    request: BaseHTTPRequestHandler,
    status: int,
    content: bytes,
    body: bool,
    headers: dict[str, str],
    limit: int | None = None,
) -> None:
    request.send_response(status)
    for name, value in {**headers, "Content-Length": str(len(content))}.items():
        request.send_header(name, value)
    request.end_headers()
    if body:
        request.wfile.write(content[:limit])
        if limit is not None:
            request.wfile.flush()
            request.close_connection = True
