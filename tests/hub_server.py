"""A stand-in of the Hugging Face Hub on this machine: as much of its interface as its client asks for.

It knows dataset repositories with branches, commits, large files (git LFS), private and gated ones, and
accounts that may read or write; models can only be read. Tests let the real `huggingface_hub` talk to it.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

OWNER, READER = "hf_owner", "hf_reader"  # tokens: of everything's owner; of somebody who may see nothing


@dataclass
class Repo:
    """A dataset repository. `branches` and tags: name → commit; `commits`: commit → path → content."""

    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes | None]) -> str:
        """Add (or, with None, remove) files."""
        content = dict(self.commits.get(self.branches.get(branch, ""), {}))
        content |= {path: data for path, data in files.items() if data is not None}
        for path in (path for path, data in files.items() if data is None):
            del content[path]
        sha = hashlib.sha1(f"{branch}{len(self.commits)}{sorted(content)}".encode()).hexdigest()
        self.commits[sha] = content
        self.branches[branch] = sha
        return sha

    @property
    def head(self) -> dict[str, bytes]:
        return self.commits[self.branches["main"]]


class HubServer(ThreadingHTTPServer):
    """Attributes:
    repos: `owner/name` → repository.
    fails: Status that every request is answered with, while it is set.
    log: Requests, `GET /api/…`.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.uploads: dict[str, bytes] = {}
        self.fails: int | None = None
        self.log: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, repo_id: str, files: dict[str, bytes], **options: bool) -> str:
        """A repository with these files on `main`; its commit."""
        return self.repos.setdefault(repo_id, Repo(**options)).commit("main", files)


@contextmanager
def serve() -> Iterator[HubServer]:
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def connect(monkeypatch: pytest.MonkeyPatch, url: str, cache: object, *, offline: bool = False) -> None:
    """Point this process's `huggingface_hub`, which reads its environment on import, to a server."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache) + "/no-token")  # not the developer's own
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)


class _RefusedError(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        self.server.log.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        try:
            if self.server.fails is not None:
                raise _RefusedError(self.server.fails, "", "out of order")
            for method, pattern, act in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method:
                    act(self, body, *(unquote(group) for group in match.groups()))
                    return
            raise _RefusedError(404, "RepoNotFound", f"no route {path}")
        except _RefusedError as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            self._send(refusal.status, json.dumps({"error": refusal.message}).encode(), headers)

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, document: object, status: int = 200) -> None:
        self._send(status, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _token(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if token not in (None, OWNER, READER):
            raise _RefusedError(401, "", "Invalid credentials in Authorization header")
        return token

    def _repo(self, repo_id: str) -> Repo:
        token = self._token()
        repo = self.server.repos.get(repo_id)
        if repo is None or (repo.private and token != OWNER):
            raise _RefusedError(404 if token else 401, "RepoNotFound", "Repository not found")
        return repo

    def _writable(self, repo_id: str) -> Repo:
        repo = self._repo(repo_id)
        self._owner()
        return repo

    def _owner(self) -> None:
        token = self._token()
        if token is None:
            raise _RefusedError(401, "", "Invalid username or password.")
        if token != OWNER:
            raise _RefusedError(403, "", "You don't have the rights to do this")

    def _commit(self, repo: Repo, revision: str) -> str:
        if revision in repo.commits:
            return revision
        if revision not in repo.branches:
            raise _RefusedError(404, "RevisionNotFound", "Invalid rev id")
        return repo.branches[revision]

    def info(self, body: bytes, repo_id: str, revision: str = "main") -> None:
        repo = self._repo(repo_id)
        sha = self._commit(repo, revision)
        siblings = [{"rfilename": path} for path in repo.commits[sha]]
        self._json({"id": repo_id, "sha": sha, "private": repo.private, "siblings": siblings, "tags": []})

    def tree(self, body: bytes, repo_id: str, revision: str) -> None:
        repo = self._repo(repo_id)
        files = repo.commits[self._commit(repo, revision)]
        self._json(
            [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in files.items()
            ]
        )

    def resolve(self, body: bytes, repo_id: str, revision: str, path: str) -> None:
        repo = self._repo(repo_id)
        if repo.gated and self._token() != OWNER:
            raise _RefusedError(403, "GatedRepo", "Access to this dataset is restricted")
        sha = self._commit(repo, revision)
        data = repo.commits[sha].get(path)
        if data is None:
            raise _RefusedError(404, "EntryNotFound", "Entry not found")
        self._send(200, data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": sha})

    def create(self, body: bytes) -> None:
        self._owner()
        asked = json.loads(body)
        assert asked["type"] == "dataset"
        repo_id = f"{asked.get('organization') or 'user'}/{asked['name']}"
        url = f"{self.server.url}/datasets/{repo_id}"
        if repo_id in self.server.repos:
            self._json({"url": url, "error": "You already created this dataset repo"}, 409)
            return
        repo = self.server.repos[repo_id] = Repo(private=asked.get("visibility", "public") == "private")
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self._json({"url": url})

    def branch(self, body: bytes, repo_id: str, name: str) -> None:
        repo = self._writable(repo_id)
        if name in repo.branches:
            raise _RefusedError(409, "", "Reference already exists")
        repo.branches[name] = repo.branches["main"]
        self._json({})

    def validate(self, body: bytes) -> None:
        assert json.loads(body)["content"].startswith("---\n")
        self._json({"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo_id: str, revision: str) -> None:
        repo = self._writable(repo_id)
        self._commit(repo, revision)
        large = (".safetensors", ".png")
        self._json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(large) else "regular",
                        "shouldIgnore": False,
                    }
                    for file in json.loads(body)["files"]
                ]
            }
        )

    def lfs(self, body: bytes, repo_id: str) -> None:
        self._writable(repo_id)
        objects = []
        for item in json.loads(body)["objects"]:
            upload = {"href": f"{self.server.url}/upload/{item['oid']}"}
            objects.append({**item, "actions": {"upload": upload}})
        self._json({"transfer": "basic", "objects": objects})

    def upload(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _RefusedError(400, "", "SHA-256 does not fit")
        self.server.uploads[oid] = body
        self._send(200)

    def commit(self, body: bytes, repo_id: str, revision: str) -> None:
        repo = self._writable(repo_id)
        files: dict[str, bytes | None] = {}
        for line in body.splitlines():
            told = json.loads(line)
            value = told["value"]
            if told["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif told["key"] == "lfsFile":
                files[value["path"]] = self.server.uploads[value["oid"]]
            elif told["key"] == "deletedFile":
                files[value["path"]] = None
        sha = repo.commit(revision, files)
        url = f"{self.server.url}/datasets/{repo_id}/commit/{sha}"
        self._json({"commitUrl": url, "commitOid": sha, "success": True})


_ID = r"([^/]+/[^/]+)"
_ROUTES = (
    ("GET", rf"/api/(?:datasets|models)/{_ID}", _Handler.info),
    ("GET", rf"/api/(?:datasets|models)/{_ID}/revision/([^/]+)", _Handler.info),
    ("GET", rf"/api/(?:datasets|models)/{_ID}/tree/([^/]+)", _Handler.tree),
    ("GET HEAD", rf"/(?:datasets/)?{_ID}/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("POST", rf"/api/datasets/{_ID}/branch/([^/]+)", _Handler.branch),
    ("POST", rf"/api/datasets/{_ID}/preupload/([^/]+)", _Handler.preupload),
    ("POST", rf"/datasets/{_ID}\.git/info/lfs/objects/batch", _Handler.lfs),
    ("PUT", r"/upload/([0-9a-f]+)", _Handler.upload),
    ("POST", rf"/api/datasets/{_ID}/commit/([^/]+)", _Handler.commit),
)
