"""A server that speaks the two endpoints of the Hugging Face hub that mixkv asks, on this machine alone.

``GET /api/models/org/name[/revision/rev]?blobs=true`` lists a commit, ``GET /org/name/resolve/commit/file`` is a file,
with ranges. What is wrong is set on the object: names of files that are cut short, tampered with or forbidden.
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

LARGE = 1_000  # bytes from which a file counts as a large one, with a SHA-256


class FakeHub:
    """Repositories "org/name" with commits; made by ``with FakeHub() as hub``."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}  # repository -> commit -> file -> content
        self.branches: dict[tuple[str, str], str] = {}
        self.requests: list[str] = []
        self.ranges: list[str] = []  # of requests for files, "" for the whole
        self.cut: dict[str, list[int]] = {}  # file -> after so many bytes of each answer the connection breaks
        self.tampered: set[str] = set()
        self.status: dict[str, tuple[int, str]] = {}  # "listing" or file -> an HTTP status and its X-Error-Code
        self.no_ranges = self.longer = False
        self.sha: str | None = None  # what the listing says instead of the commit

    def publish(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """A new commit of a branch."""
        content = json.dumps({name: data.hex() for name, data in files.items()}).encode()
        commit = hashlib.sha1(content).hexdigest()
        self.commits.setdefault(repo, {})[commit] = files
        self.branches[repo, branch] = commit
        return commit

    def __enter__(self) -> "FakeHub":
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.requests.append(self.path)
                hub.answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        parts = [unquote(part) for part in urlparse(handler.path).path.strip("/").split("/")]
        if parts[:2] == ["api", "models"]:
            self._listing(handler, "/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
        else:
            self._file(handler, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    def _listing(self, handler: BaseHTTPRequestHandler, repo: str, revision: str) -> None:
        if "listing" in self.status:
            return self._refuse(handler, *self.status["listing"])
        if repo not in self.commits:
            return self._refuse(handler, 404, "RepoNotFound")
        commit = self.branches.get((repo, revision), revision)
        if commit not in self.commits[repo]:
            return self._refuse(handler, 404, "RevisionNotFound")
        siblings = []
        for name, data in self.commits[repo][commit].items():
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": blob}
            if len(data) >= LARGE:
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            siblings.append(entry)
        found = {"id": repo, "sha": self.sha or commit, "siblings": siblings, "cardData": {"license": "mit"}}
        found |= {"private": False, "gated": False, "tags": [], "downloads": 0, "likes": 0}
        self._send(handler, 200, json.dumps(found).encode())

    def _file(self, handler: BaseHTTPRequestHandler, repo: str, commit: str, name: str) -> None:
        if name in self.status:
            return self._refuse(handler, *self.status[name])
        data = self.commits[repo][commit][name]
        if name in self.tampered:
            data = bytes([data[0] ^ 1]) + data[1:]
        if self.longer:
            data += b"and more"
        start = 0
        wanted = handler.headers.get("Range")
        self.ranges.append(wanted or "")
        if wanted and not self.no_ranges:
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
        cuts = self.cut.get(name)
        after = cuts.pop(0) if cuts else None
        self._send(handler, 206 if start else 200, data[start:], after, f"bytes {start}-{len(data) - 1}/{len(data)}")

    def _send(
        self, handler: BaseHTTPRequestHandler, status: int, body: bytes, after: int | None = None, span: str = ""
    ) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        if status == 206:
            handler.send_header("Content-Range", span)
        handler.end_headers()
        handler.wfile.write(body if after is None else body[:after])

    def _refuse(self, handler: BaseHTTPRequestHandler, status: int, code: str) -> None:
        handler.send_response(status)
        if code:
            handler.send_header("X-Error-Code", code)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
