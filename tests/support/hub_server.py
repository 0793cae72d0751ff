"""A hub on the loopback address: the endpoints that huggingface_hub needs to download a repository, and its refusals."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c" * 40
OTHER_COMMIT = "d" * 40


class Hub:
    """Repositories by id; `gated` ones need the token `hf_letmein`. `requests` records method and path of each request."""

    def __init__(
        self, repositories: dict[str, Path], gated: tuple[str, ...] = (), cut_after: int | None = None
    ) -> None:
        self.repositories = repositories
        self.gated = gated
        self.cut_after = cut_after
        """Break the connection after this many bytes of the first big file, once."""
        self.requests: list[tuple[str, str]] = []
        self.ranges: list[str] = []


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path))
            api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(?:revision|tree)/([^/]+))?", path)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            match = api or file
            if not match or match[1] not in hub.repositories:
                return self.refuse(401, "RepoNotFound", "Repository not found")
            if match[1] in hub.gated and self.headers.get("Authorization") != "Bearer hf_letmein":
                return self.refuse(401, "GatedRepo", "Access to this repository is restricted")
            revision = match[2] or "main"
            if revision not in ("main", "v2", COMMIT, OTHER_COMMIT):
                return self.refuse(404, "RevisionNotFound", "Revision not found")
            commit = OTHER_COMMIT if revision in ("v2", OTHER_COMMIT) else COMMIT
            folder = hub.repositories[match[1]]
            if api:
                return self.api(match[1], commit, folder, body, "/tree/" in path)
            target = folder / file[3]
            if not target.is_file():
                return self.refuse(404, "EntryNotFound", "Entry not found")
            return self.file(target, commit, body)

        def api(self, repo: str, commit: str, folder: Path, body: bool, tree: bool) -> None:
            files = sorted(p for p in folder.rglob("*") if p.is_file())
            if tree:
                content: object = [
                    {"type": "file", "path": p.relative_to(folder).as_posix(), "size": p.stat().st_size, "oid": etag(p)}
                    for p in files
                ]
            else:
                siblings = [{"rfilename": p.relative_to(folder).as_posix()} for p in files]
                content = {
                    "id": repo,
                    "modelId": repo,
                    "sha": commit,
                    "siblings": siblings,
                    "private": False,
                    "tags": [],
                }
            self.send(200, json.dumps(content).encode() if body else b"", {"Content-Type": "application/json"})

        def file(self, target: Path, commit: str, body: bool) -> None:
            data = target.read_bytes()
            headers = {"X-Repo-Commit": commit, "ETag": f'"{etag(target)}"', "Accept-Ranges": "bytes"}
            start = 0
            if "Range" in self.headers and body:
                hub.ranges.append(self.headers["Range"])
                start = int(re.match(r"bytes=(\d+)-", self.headers["Range"])[1])
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            if not body:
                self.send_response(200)
                for key, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(key, value)
                self.end_headers()
                return
            if hub.cut_after is not None and start == 0 and len(data) > hub.cut_after:
                cut, hub.cut_after = hub.cut_after, None
                self.send_response(200)
                for key, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(data[:cut])
                self.wfile.flush()
                self.connection.close()
                return
            self.send(206 if start else 200, data[start:], headers)

        def refuse(self, status: int, code: str, message: str) -> None:
            self.send(status, b"", {"X-Error-Code": code, "X-Error-Message": message})

        def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(data)

    return Handler


def etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextmanager
def serve(hub: Hub):
    """The address of the hub, while the block runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
