"""A stand-in for the Hugging Face hub, on the loopback, for tests without a network.

It answers what ``huggingface_hub.snapshot_download`` asks about models and datasets:
repository info, file listing, and HEAD or GET of a file. Anything else is a 404. It leaves
out tokens, gated repositories, LFS and Xet storage, redirects, byte ranges, listings of more
than one page, uploads, and history: a repository is one commit, ``COMMIT``, on ``main``.

``huggingface_hub`` reads ``HF_ENDPOINT`` and ``HF_HOME`` when it is imported, so set both in
the environment of a subprocess, not in a test that may have imported it already.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"

API_PATH = re.compile(r"/api/(models|datasets)/(.+)/(revision|tree)/([^/]+)")
FILE_PATH = re.compile(r"/(?:(datasets)/)?(.+?)/resolve/([^/]+)/(.+)")


@dataclass
class Hub:
    endpoint: str
    requests: list[str] = field(default_factory=list)  # "GET /path", the query left off


def _git_oid(content: bytes) -> str:
    # The client names its cached blobs by ETag, and the real hub's ETag is git's object id.
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serve(models: dict[str, Path], datasets: dict[str, Path]) -> Iterator[Hub]:
    """Serve each folder as the repository of its name, until the block is left."""

    # Left at HTTP/1.0: a kept-alive connection would still be answered after shutdown,
    # and a test of an unreachable hub would find it reachable.
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            if match := API_PATH.fullmatch(path):
                kind, repo, wanted, revision = match.groups()
            elif match := FILE_PATH.fullmatch(path):
                kind, repo, revision, wanted = match.groups()
            else:
                return self.answer(404)
            folder = (models if kind in (None, "models") else datasets).get(repo)
            if folder is None:
                return self.answer(404, x_error_code="RepoNotFound")
            if revision not in ("main", COMMIT):
                return self.answer(404, x_error_code="RevisionNotFound")
            files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
            if wanted == "revision" and match.re is API_PATH:
                return self.answer(200, json.dumps({"id": repo, "sha": COMMIT}).encode())
            if wanted == "tree" and match.re is API_PATH:
                contents = {name: p.read_bytes() for name, p in files.items()}
                tree = [
                    {"type": "file", "path": name, "size": len(body), "oid": _git_oid(body)}
                    for name, body in contents.items()
                ]
                return self.answer(200, json.dumps(tree).encode())
            if wanted not in files:  # not folder / wanted, which ".." would lead out of
                return self.answer(404, x_error_code="EntryNotFound")
            content = files[wanted].read_bytes()
            self.answer(200, content, etag=f'"{_git_oid(content)}"')

        do_HEAD = do_GET

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in {"x_repo_commit": COMMIT, **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub = Hub(f"http://127.0.0.1:{server.server_port}")
        # The default poll of half a second is what every test would wait for on leaving.
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield hub
        finally:
            server.shutdown()
