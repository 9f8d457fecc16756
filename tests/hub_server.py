"""A Hugging Face hub on this machine, as far as the hub's own library asks for it when it sends and
fetches models: repositories with branches and commits in memory, large files over LFS, one user."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import yaml

TOKEN = "hf_secretsecretsecretsecretsecret"
USER = "me"
Files = dict[str, bytes]


@dataclass
class Repo:
    private: bool
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: Files, message: str) -> str:
        text = repr((branch, len(self.commits), sorted(files)))
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        self.messages.append(message)
        return sha

    def files(self, branch: str = "main") -> Files:
        return self.commits[self.branches[branch]]


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.objects: Files = {}
        self.asked: list[tuple[str, str]] = []
        self.failing = ""
        """Requests whose method and path have this in them are answered by an error 500."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def create(self, name: str, private: bool = False, **files: bytes) -> Repo:
        repo = self.repos[name] = Repo(private)
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n", **files}, "initial")
        return repo

    @property
    def written(self) -> list[str]:
        """What changed, or would have changed, something."""
        reads = re.compile(r"/preupload/|/validate-yaml|/objects/batch")
        return [path for method, path in self.asked if method != "GET" and not reads.search(path)]


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


class _Refused(Exception):
    pass


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _serve(self) -> None:
        path = unquote(self.path.split("?")[0])
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b"".join(self._chunks())
        method = "GET" if self.command == "HEAD" else self.command
        self.server.asked.append((method, path))
        try:
            if self.server.failing and self.server.failing in f"{method} {path}":
                raise _Refused(500, "InternalError", "out of order")
            for pattern, (verb, answer) in _ANSWERS.items():
                if verb == method and (found := re.fullmatch(pattern, path)):
                    return answer(self, *found.groups())
            raise _Refused(404, "NotFound", f"no such page: {method} {path}")
        except _Refused as refused:
            status, code, text = refused.args
            self._answer(
                json.dumps({"error": text}).encode(),
                status=status,
                **{"X-Error-Code": code, "X-Error-Message": text},
            )

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _answer(self, data: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value: Any) -> None:
        self._answer(json.dumps(value).encode(), **{"Content-Type": "application/json"})

    @property
    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repo(self, name: str, writing: bool = False) -> Repo:
        repo = self.server.repos.get(name)
        if not self._known and (writing or repo is None or repo.private):
            raise _Refused(401, "RepoNotFound", "Repository not found")
        if repo is None:
            raise _Refused(404, "RepoNotFound", "Repository not found")
        if writing and not name.startswith(f"{USER}/"):
            raise _Refused(403, "Forbidden", "You may not write there")
        return repo

    def _commit(self, repo: Repo, revision: str) -> str:
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def whoami(self) -> None:
        if not self._known:
            raise _Refused(401, "", "Invalid credentials in Authorization header")
        self._json({"name": USER, "type": "user", "orgs": []})

    def info(self, name: str, revision: str | None = None) -> None:
        repo = self._repo(name)
        sha = self._commit(repo, revision or "main")
        files = [{"rfilename": path} for path in sorted(repo.commits[sha])]
        self._json({"id": name, "sha": sha, "private": repo.private, "siblings": files})

    def tree(self, name: str, revision: str) -> None:
        repo = self._repo(name)
        files = repo.commits[self._commit(repo, revision)]
        self._json(
            [
                {"type": "file", "path": path, "size": len(data), "oid": _git(data)}
                for path, data in sorted(files.items())
            ]
        )

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo = self._repo(name)
        sha = self._commit(repo, revision)
        if (data := repo.commits[sha].get(path)) is None:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        self._answer(data, **{"ETag": etag, "X-Repo-Commit": sha})

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization'] or USER}/{asked['name']}"
        if not self._known:
            raise _Refused(401, "", "Invalid credentials")
        if not name.startswith(f"{USER}/"):
            text = f"You don't have the rights to create a model under {asked['organization']}"
            raise _Refused(403, "Forbidden", text)
        if name in self.server.repos:
            raise _Refused(409, "", "You already created this model repo")
        self.server.create(name, asked.get("visibility") == "private")
        self._json({"url": f"{self.server.address}/{name}"})

    def branch(self, name: str, branch: str) -> None:
        repo = self._repo(name, writing=True)
        if branch in repo.branches:
            raise _Refused(409, "", "Reference already exists")
        start = json.loads(self.body).get("startingPoint", "main")
        repo.branches[branch] = self._commit(repo, start)
        self._json({})

    def validate(self) -> None:
        """The hub itself knows more, but this much it asks for."""
        card = re.fullmatch(r"---\n(.*?)\n---\n.*", json.loads(self.body)["content"], re.DOTALL)
        header = yaml.safe_load(card[1]) if card else {}
        warnings = [] if header else [{"message": "empty or missing yaml metadata"}]
        for key in ("license", "base_model", "library_name"):
            if not isinstance(header.get(key, ""), str):
                raise _Refused(400, "BadRequest", f'"{key}" must be a string')
        self._json({"warnings": warnings, "errors": []})

    def preupload(self, name: str, revision: str) -> None:
        files = self._repo(name, writing=True).commits[
            self._commit(self.server.repos[name], revision)
        ]
        modes, ignored = [], files.get(".gitignore", b"").decode().split()
        for file in json.loads(self.body)["files"]:
            path, there = file["path"], files.get(file["path"])
            large = path.endswith((".safetensors", ".png")) or file["size"] > 10_000_000
            oid = None
            if there is not None:
                oid = hashlib.sha256(there).hexdigest() if large else _git(there)
            mode = "lfs" if large else "regular"
            out = any(fnmatch(path, pattern) for pattern in ignored)
            modes.append({"path": path, "uploadMode": mode, "shouldIgnore": out, "oid": oid})
        self._json({"files": modes})

    def batch(self, name: str) -> None:
        self._repo(name, writing=True)
        objects = []
        for item in json.loads(self.body)["objects"]:
            if item["oid"] not in self.server.objects:
                href = f"{self.server.address}/lfs/{item['oid']}"
                item["actions"] = {"upload": {"href": href, "header": {}}}
            objects.append(item)
        self._json({"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        """Its address is secret: whoever has it may write."""
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refused(400, "", "these are other bytes")
        self.server.objects[oid] = self.body
        self._answer(b"")

    def commit(self, name: str, branch: str) -> None:
        repo = self._repo(name, writing=True)
        parent = repo.branches[branch]
        header, *operations = map(json.loads, self.body.splitlines())
        if header["value"].get("parentCommit", parent) != parent:
            raise _Refused(412, "", "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[parent])
        for operation in operations:
            value = operation["value"]
            match operation["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.server.objects[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        sha = repo.commit(branch, files, header["value"]["summary"])
        self._json({"commitUrl": f"{self.server.address}/{name}/commit/{sha}", "commitOid": sha})


def _git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


_NAME = r"([\w.-]+/[\w.-]+)"
_ANSWERS = {
    r"/api/whoami-v2": ("GET", _Handler.whoami),
    rf"/api/models/{_NAME}": ("GET", _Handler.info),
    rf"/api/models/{_NAME}/revision/(.+)": ("GET", _Handler.info),
    rf"/api/models/{_NAME}/tree/([^/]+)": ("GET", _Handler.tree),
    rf"/{_NAME}/resolve/([^/]+)/(.+)": ("GET", _Handler.resolve),
    r"/api/repos/create": ("POST", _Handler.create),
    rf"/api/models/{_NAME}/branch/(.+)": ("POST", _Handler.branch),
    r"/api/validate-yaml": ("POST", _Handler.validate),
    rf"/api/models/{_NAME}/preupload/(.+)": ("POST", _Handler.preupload),
    rf"/{_NAME}\.git/info/lfs/objects/batch": ("POST", _Handler.batch),
    r"/lfs/([0-9a-f]{64})": ("PUT", _Handler.put),
    rf"/api/models/{_NAME}/commit/(.+)": ("POST", _Handler.commit),
}
"""What may be asked for, and who answers."""
