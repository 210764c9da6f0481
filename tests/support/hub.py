"""A Hub on loopback: the few routes of the Hugging Face Hub that publishing and loading a decomposition call."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_of_the_owner"


def sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@dataclass
class Repo:
    """Commits by their name, each with all its files; branches by the commits that they are at."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        self.messages.append(message)
        oid = sha1(repr((branch, message, len(self.commits))).encode())
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid


class FakeHub(ThreadingHTTPServer):
    """Whoever sends `TOKEN` may do all; others may read what is not private. `asked` has every request."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.uploaded: dict[str, bytes] = {}
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def served() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        thread = Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


def use(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub talks to this address, in its old way of uploading, and knows no account of this machine."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)


@dataclass
class Refused(Exception):
    status: int
    code: str = ""
    message: str = ""


class Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            self._send(*self._answer(path.strip("/").split("/"), body))
        except Refused as refused:
            self._send(refused.status, b"{}", {"X-Error-Code": refused.code, "X-Error-Message": refused.message})

    do_GET = do_POST = do_PUT = do_HEAD

    def _answer(self, path: list[str], body: bytes) -> tuple[int, Any, dict[str, str]]:
        match self.command, *path:
            case "POST", "api", "validate-yaml":
                return 200, {"errors": [], "warnings": []}, {}
            case "POST", "api", "repos", "create":
                return self._create(json.loads(body))
            case _, "api", "models", owner, name, *rest:
                what, *revision = rest or ["revision"]
                return 200, self._of_repo(f"{owner}/{name}", what, "/".join(revision) or "main", body), {}
            case "POST", owner, git, "info", "lfs", "objects", "batch":
                self._repo(f"{owner}/{git.removesuffix('.git')}", to_write=True)
                place = f"{self.server.address}/upload/"
                objects = [
                    {**item, "actions": {"upload": {"href": place + item["oid"]}}}
                    for item in json.loads(body)["objects"]
                ]
                return 200, {"transfer": "basic", "objects": objects}, {}
            case "PUT", "upload", oid:
                self.server.uploaded[oid] = body
                return 200, {}, {}
            case _, owner, name, "resolve", revision, *rest:
                repo = self._repo(f"{owner}/{name}")
                oid = repo.branches.get(revision, revision)
                content = repo.commits[oid]["/".join(rest)]
                return 200, content, {"ETag": f'"{sha1(content)}"', "X-Repo-Commit": oid}
        raise Refused(404)

    def _is_owner(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repo(self, name: str, to_write: bool = False) -> Repo:
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and not self._is_owner()):
            raise Refused(401, "RepoNotFound", "Repository not found")
        if to_write and not self._is_owner():
            raise Refused(403, "", "Forbidden")
        return repo

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        if not self._is_owner():
            raise Refused(401, "", "Invalid username or password.")
        name = f"{asked['organization'] or 'me'}/{asked['name']}"
        known = name in self.server.repos
        if not known:
            is_private = asked.get("visibility") == "private" or asked.get("private", False)
            repo = self.server.repos[name] = Repo(private=is_private)
            repo.commit("main", {".gitattributes": b""}, "initial commit")
        return 409 if known else 200, {"url": f"{self.server.address}/{name}"}, {}

    def _of_repo(self, name: str, what: str, revision: str, body: bytes) -> Any:
        repo = self._repo(name, to_write=self.command == "POST")
        if what == "branch":
            if revision in repo.branches:
                raise Refused(409, "", "Reference already exists")
            repo.branches[revision] = repo.branches["main"]
            return {}
        oid = repo.branches.get(revision, revision)
        if oid not in repo.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repo.commits[oid]
        match what:
            case "revision":
                siblings = [{"rfilename": path} for path in files]
                return {"id": name, "sha": oid, "private": repo.private, "siblings": siblings}
            case "tree":
                return [
                    {"type": "file", "path": path, "size": len(content), "oid": sha1(content)}
                    for path, content in files.items()
                ]
            case "preupload":
                paths = [file["path"] for file in json.loads(body)["files"]]
                modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
                return {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]}
            case "commit":
                oid = self._commit(repo, revision, dict(files), [json.loads(line) for line in body.splitlines()])
                return {"commitUrl": f"{self.server.address}/{name}/commit/{oid}", "commitOid": oid}
        raise Refused(404)

    def _commit(self, repo: Repo, branch: str, files: dict[str, bytes], changes: list[dict[str, Any]]) -> str:
        message = ""
        for change in changes:
            value = change["value"]
            match change["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.server.uploaded[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        return repo.commit(branch, files, message)

    def _send(self, status: int, answer: Any, headers: dict[str, str]) -> None:
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None: ...
