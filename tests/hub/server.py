"""A small Hub on 127.0.0.1 for tests: what huggingface_hub, transformers and `hf` ask of the real one, and faults.

Made from the requests that the clients send. It is evidence of what the client does, not of the real Hub's rules.
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
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "x" * 30
READ_ONLY = "hf_" + "r" * 30
LFS = (".safetensors", ".bin")  # all else travels inside the commit


def git_oid(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


@dataclass
class Repository:
    """Commits are whole trees: path -> content."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)  # of pull requests, by ref

    def commit(self, ref: str, tree: dict[str, bytes]) -> str:
        oid = hashlib.sha1(f"{len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = tree
        self.refs[ref] = oid
        return oid

    def tree(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        oid = self.refs.get(revision, revision)
        return (oid, self.commits[oid]) if oid in self.commits else None


@dataclass
class Hub:
    """State of the server; `fault` maps a request (its number, method and path) to what goes wrong with it."""

    url: str = ""
    owners: tuple[str, ...] = ("me",)
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    faults: dict[int, str] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)  # repositories whose weights change on their way
    retry_after: int | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        found = self.repositories[repo_id].tree(revision)
        assert found is not None
        return found[1]


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two packets, and the client would wait 40 ms for the second

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve()

    do_GET = do_POST = do_PUT = do_HEAD

    def _serve(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self._chunks()
        with self.hub.lock:
            number = len(self.hub.requests)
            self.hub.requests.append(f"{self.command} {urlsplit(self.path).path}")
        fault = self.hub.faults.get(number, "")
        if fault == "drop":
            self.close_connection = True
            return
        if fault == "drop after":  # the work is done, the answer gets lost
            self._answer = lambda *args, **kwargs: None  # type: ignore[method-assign]
            self._route()
            self.close_connection = True
            return
        if fault == "slow":
            threading.Event().wait(0.2)  # not time.sleep, which tests replace
        if fault.isdigit():
            headers = {} if self.hub.retry_after is None else {"Retry-After": str(self.hub.retry_after)}
            self._answer(int(fault), {"error": "planted", "url": f"{self.hub.url}/me/streets"}, headers)
            return
        if fault == "damaged":
            self.body = bytes(len(self.body))
        self._route()

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(
        self, status: int, content: Any = None, headers: dict[str, str] | None = None, length: int | None = None
    ) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _no(self, status: int, code: str) -> None:
        self._answer(status, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    def _route(self) -> None:
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), parse_qs(parts.query)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
            return
        if match := re.fullmatch(r"/blobs/(\w+)", path):
            if hashlib.sha256(self.body).hexdigest() != match[1]:
                self._answer(400, {"error": "sha256 differs"})
                return
            self.hub.blobs[match[1]] = self.body
            self._answer(200, {})
            return
        if token not in (TOKEN, READ_ONLY, ""):
            self._no(401, "InvalidToken")
            return
        if path == "/api/whoami-v2":
            if token:
                self._answer(200, {"name": "me", "type": "user", "auth": {}, "orgs": []})
            else:
                self._no(401, "NoToken")
            return
        if self.command == "POST" and "paths-info" not in path and token != TOKEN:
            self._answer(403 if token else 401, {"error": "no right to write"})
            return
        if path == "/api/repos/create":
            self._create()
            return
        match = re.fullmatch(r"/(?:api/)?(?:(models|datasets|spaces)/)?(\w[\w.-]*/[\w.-]+?)(?:\.git)?(/.*)?", path)
        if match is None or match[2] not in self.hub.repositories:
            self._no(404 if token else 401, "RepoNotFound")
            return
        self._repository(match[2], self.hub.repositories[match[2]], match[3] or "", query)

    def _create(self) -> None:
        wanted = json.loads(self.body)
        repo_id = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id.split("/")[0] not in self.hub.owners:
            self._no(404, "NamespaceNotFound")
        elif repo_id in self.hub.repositories:
            self._answer(409, answer)
        else:
            self.hub.repositories[repo_id] = Repository()
            self.hub.repositories[repo_id].commit("main", {})
            self._answer(200, answer)

    def _repository(self, repo_id: str, repository: Repository, rest: str, query: dict[str, list[str]]) -> None:
        if rest.startswith("/preupload/"):
            _, tree = repository.tree(rest.removeprefix("/preupload/")) or ("", {})
            self._answer(200, {"files": [self._mode(one["path"], tree) for one in json.loads(self.body)["files"]]})
        elif rest == "/info/lfs/objects/batch":
            objects = [
                {"oid": one["oid"], "size": one["size"]}
                | ({} if one["oid"] in self.hub.blobs else {"actions": {"upload": self._blob(one["oid"])}})
                for one in json.loads(self.body)["objects"]
            ]
            self._answer(200, {"transfer": "basic", "objects": objects})
        elif rest.startswith("/commit/"):
            self._commit(repo_id, repository, rest.removeprefix("/commit/"), "create_pr" in query)
        elif rest == "/discussions":
            requests = [
                {
                    "title": title,
                    "num": int(ref.split("/")[-1]),
                    "status": "open",
                    "author": {"name": "me"},
                    "isPullRequest": True,
                    "createdAt": "2026-01-01T00:00:00.000Z",
                    "repo": {"name": repo_id, "type": "model"},
                }
                for ref, title in repository.titles.items()
            ]
            self._answer(200, {"discussions": requests, "count": len(requests), "start": 0})
        elif match := re.fullmatch(r"/resolve/(refs/pr/\d+|[^/]+)/(.+)", rest):
            bad = match[2].endswith(LFS) and repo_id in self.hub.damaged
            self._resolve(repository, match[1], match[2], bad)
        elif match := re.fullmatch(r"/tree/(refs/pr/\d+|[^/]+)(?:/(.*))?", rest):
            found = repository.tree(match[1])
            below = f"{match[2]}/" if match[2] else ""
            names = [name for name in (found or ("", {}))[1] if name.startswith(below)]
            if found is None or (below and not names):
                self._no(404, "RevisionNotFound" if found is None else "EntryNotFound")
            else:
                self._answer(200, [self._entry(name, found[1][name]) for name in names])
        elif rest.startswith("/paths-info/"):
            found = repository.tree(rest.removeprefix("/paths-info/"))
            wanted = parse_qs(self.body.decode()).get("paths", [])
            if not wanted and self.body.startswith(b"{"):
                wanted = json.loads(self.body)["paths"]
            tree = (found or ("", {}))[1]
            self._answer(200, [self._entry(name, tree[name]) for name in wanted if name in tree])
        elif match := re.fullmatch(r"(?:/revision/(.+))?", rest):
            found = repository.tree(match[1] or "main")
            if found is None:
                self._no(404, "RevisionNotFound")
            else:
                siblings = [{"rfilename": name} for name in found[1]]
                answer = {"id": repo_id, "sha": found[0], "siblings": siblings, "private": False, "tags": []}
                self._answer(200, answer | {"downloads": 0, "likes": 0})
        else:
            self._no(404, "EntryNotFound")

    def _mode(self, path: str, tree: dict[str, bytes]) -> dict[str, Any]:
        lfs = path.endswith(LFS)
        content = tree.get(path)
        oid = None
        if content is not None:
            oid = hashlib.sha256(content).hexdigest() if lfs else git_oid(content)
        return {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid}

    def _blob(self, oid: str) -> dict[str, Any]:
        return {"href": f"{self.hub.url}/blobs/{oid}", "header": {}}

    def _entry(self, name: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": git_oid(content)}
        if name.endswith(LFS):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry

    def _commit(self, repo_id: str, repository: Repository, revision: str, as_pull_request: bool) -> None:
        lines = [json.loads(line) for line in self.body.splitlines() if line]
        found = repository.tree(revision)
        if found is None:
            self._no(404, "RevisionNotFound")
            return
        tree, title = dict(found[1]), ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                title = value["summary"]
            elif line["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    self._answer(400, {"error": "unknown LFS object"})
                    return
                tree[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                tree.pop(value["path"], None)
        ref = f"refs/pr/{len(repository.titles) + 1}" if as_pull_request else revision
        if as_pull_request:
            repository.titles[ref] = title
        oid = repository.commit(ref, tree)
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}"}
        if as_pull_request:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{ref.split('/')[-1]}"
        self._answer(200, answer)

    def _resolve(self, repository: Repository, revision: str, name: str, damaged: bool) -> None:
        found = repository.tree(revision)
        if found is None or name not in found[1]:
            self._no(404, "RevisionNotFound" if found is None else "EntryNotFound")
            return
        content = found[1][name]
        etag = hashlib.sha256(content).hexdigest() if name.endswith(LFS) else git_oid(content)
        headers = {"X-Repo-Commit": found[0], "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if name.endswith(LFS):
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        if damaged:
            content = content[:-8] + bytes(8)
        begin = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if begin is None:
            self._answer(200, content, headers)
            return
        start, end = int(begin[1]), int(begin[2] or len(content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        self._answer(206, content[start : end + 1], headers)


@contextmanager
def serve() -> Iterator[Hub]:
    """A Hub on a free port of 127.0.0.1, until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
