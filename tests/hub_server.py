"""A Hub on the loopback interface: what huggingface_hub asks of huggingface.co, in memory, with faults on demand.

Models only. Large files travel by LFS (transfer `basic`) and are served from a second origin, as by a CDN, or by xet
where the hub has a `store` (see `hub_repos`); without one, clients need HF_HUB_DISABLE_XET.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from hub_repos import Blob, Commit, Repo, User, find_in_store

LFS_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
WRONG_TOKEN = "Invalid credentials in Authorization header"


@dataclasses.dataclass
class Fault:
    """What happens to the next `times` requests whose "METHOD /path?query" matches `pattern`, from its start."""

    pattern: str
    times: int
    status: int | None = None  # answer this, and do nothing
    drop: bool = False  # close the connection, and do nothing
    lose: bool = False  # do it, but close the connection before the answer
    cut: int | None = None  # close the connection after this many bytes of the body
    corrupt: int | None = None  # flip the bits of this byte of the file: what a PUT brings, or the answer
    no_range: bool = False  # answer a Range with the whole file
    strip: tuple[str, ...] = ()  # leave out these headers
    headers: dict[str, str] = dataclasses.field(default_factory=dict)  # add these to a `status`
    delay: float = 0  # seconds before anything is done
    hook: Callable[[], object] | None = None  # call this before anything is done


@dataclasses.dataclass
class Request:
    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    origin: str  # "hub" or "cdn"
    status: int | None = None

    @property
    def line(self) -> str:
        return f"{self.method} {self.target}"

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.target).query)

    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["false"])[0].lower() in ("true", "1")


@dataclasses.dataclass
class Reply:
    status: int
    body: bytes = b""
    headers: dict[str, str] = dataclasses.field(default_factory=dict)


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers

    def reply(self) -> Reply:
        headers = {"X-Error-Message": self.message} | {key.replace("_", "-"): v for key, v in self.headers.items()}
        if self.code:
            headers["X-Error-Code"] = self.code
        return answer({"error": self.message}, self.status, headers)


def answer(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Reply:
    return Reply(status, json.dumps(content).encode(), {"Content-Type": "application/json"} | (headers or {}))


Action = Callable[..., Reply]
_ROUTES: list[tuple[str, re.Pattern[str], Action]] = []
_REPO = "(?P<name>[^/]+/[^/]+)"
_API = f"/api/models/{_REPO}"


def route(method: str, path: str) -> Callable[[Action], Action]:
    """Register an action for paths as they are sent: a group holds one segment, decoded only afterwards."""

    def register(action: Action) -> Action:
        _ROUTES.append((method, re.compile(path), action))
        return action

    return register


class Hub:
    """The server, as a context manager: `url`, the `repos`, the `log` of requests, and `fail` to break things.

    Args:
        users: by token.
    """

    def __init__(self, users: dict[str, User]) -> None:
        self.users = users
        self.repos: dict[str, Repo] = {}
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        self.store: Path | None = None  # of xet
        self._lock = threading.RLock()
        self._servers = [_Server(self, origin) for origin in ("hub", "cdn")]
        self.url, self.cdn = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def __enter__(self) -> Hub:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def fail(self, pattern: str, times: int = 1, **what: Any) -> Fault:
        """Add a `Fault`; it is used up once its `times` is 0."""
        self.faults.append(Fault(pattern, times, **what))
        return self.faults[-1]

    def calls(self, pattern: str) -> list[Request]:
        """The logged requests whose "METHOD /path?query" matches `pattern` from its start."""
        return [request for request in self.log if re.match(pattern, request.line)]

    def add(self, name: str, files: dict[str, bytes], branch: str = "main") -> Commit:
        """Commit behind the client's back: `files` beside those that are there; the repository is made if missing."""
        with self._lock:
            repo = self.repos.setdefault(name, Repo(name))
            old = repo.commits[repo.branches[branch]].files if branch in repo.branches else {}
            new = {path: Blob(data, path.endswith(LFS_SUFFIXES)) for path, data in files.items()}
            return repo.commit(branch, "Behind your back", old | new)

    def take_fault(self, request: Request) -> Fault:
        with self._lock:
            for fault in self.faults:
                if fault.times and re.match(fault.pattern, request.line):
                    fault.times -= 1
                    return fault
        return Fault("", 0)

    def answer(self, request: Request) -> Reply:
        path = urlsplit(request.target).path.rstrip("/")
        method = "GET" if request.method == "HEAD" else request.method
        try:
            for wanted, pattern, action in _ROUTES:
                if wanted == method and (match := pattern.fullmatch(path)):
                    with self._lock:
                        return action(self, request, **{k: unquote(v) for k, v in match.groupdict().items() if v})
            raise HubError(404, f"no such route: {request.line}")
        except HubError as error:
            return error.reply()

    # Who may do what

    def user(self, request: Request) -> User | None:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if not scheme:
            return None
        if token not in self.users:
            raise HubError(401, WRONG_TOKEN)
        return self.users[token]

    def writer(self, request: Request, namespace: str) -> User:
        user = self.user(request)
        if user is None:
            raise HubError(401, "Log in first")
        if namespace not in (user.name, *user.orgs) or not user.can_write:
            raise HubError(403, f"{user.name} may not write to {namespace} with this token")
        return user

    def repo(self, request: Request, name: str, write: bool = False) -> Repo:
        user, repo = self.user(request), self.repos.get(name)
        namespace = name.partition("/")[0]
        member = user is not None and namespace in (user.name, *user.orgs)
        if repo is None or (repo.private and not member):
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        if write:
            self.writer(request, namespace)
        return repo

    def commit(self, repo: Repo, revision: str) -> Commit:
        revision = revision.removeprefix("refs/heads/")
        oid = repo.branches.get(revision) or repo.tags.get(revision) or revision
        if oid not in repo.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo.commits[oid]

    # Account and repositories

    @route("GET", "/api/agent-harnesses")
    def harnesses(self, request: Request) -> Reply:
        return answer({"standardEnvVars": [], "harnesses": {}})

    @route("GET", "/api/whoami-v2")
    def whoami(self, request: Request) -> Reply:
        user = self.user(request)
        if user is None:
            raise HubError(401, WRONG_TOKEN)
        token = {"displayName": "test", "role": "write" if user.can_write else "read"}
        orgs = [{"type": "org", "name": org} for org in user.orgs]
        auth = {"type": "access_token", "accessToken": token}
        return answer({"type": "user", "id": user.name, "name": user.name, "orgs": orgs, "auth": auth})

    @route("POST", "/api/repos/create")
    def create(self, request: Request) -> Reply:
        asked = request.json()
        user = self.user(request)
        namespace = asked.get("organization") or (user.name if user else "")
        self.writer(request, namespace)
        name = f"{namespace}/{asked['name']}"
        content = {"url": f"{self.url}/{name}", "name": name, "id": name}
        if name in self.repos:
            return answer({"error": "You already created this model repo", **content}, 409)
        private = bool(asked.get("private")) or asked.get("visibility") == "private"  # old and new clients
        repo = self.repos[name] = Repo(name, private=private)
        repo.commit("main", "initial commit", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)})
        return answer(content)

    @route("DELETE", "/api/repos/delete")
    def delete(self, request: Request) -> Reply:
        asked = request.json()
        name = f"{asked['organization']}/{asked['name']}"
        self.repo(request, name, write=True)
        del self.repos[name]
        return Reply(200)

    @route("GET", f"{_API}(?:/revision/(?P<revision>[^/]+))?")
    def info(self, request: Request, name: str, revision: str = "main") -> Reply:
        repo = self.repo(request, name)
        commit = self.commit(repo, revision)
        siblings: list[dict[str, Any]] = []
        for path, blob in sorted(commit.files.items()):
            sizes = {"size": blob.size, "blobId": blob.git_oid, **_lfs(blob, "sha256")}
            siblings.append({"rfilename": path, **(sizes if request.flag("blobs") else {})})
        date = "2026-01-01T00:00:00.000Z"
        content = {
            **{"_id": name, "id": name, "modelId": name, "author": name.partition("/")[0], "sha": commit.oid},
            **{"private": repo.private, "gated": "manual" if repo.gated else False, "disabled": False},
            **{"downloads": 0, "likes": 0, "tags": [], "createdAt": date, "lastModified": date},
        }
        return answer({**content, "siblings": siblings})

    @route("GET", f"{_API}/tree/(?P<revision>[^/]+)(?:/(?P<folder>[^/]+))?")
    def tree(self, request: Request, name: str, revision: str, folder: str = "") -> Reply:
        files = self.commit(self.repo(request, name), revision).files
        prefix = f"{folder}/" if folder else ""
        below = {path: blob for path, blob in files.items() if path.startswith(prefix)}
        if folder and not below:
            raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        folders = {str(parent) for path in below for parent in PurePosixPath(path).parents} - {".", folder}
        items = [_entry(path, blob) for path, blob in sorted(below.items())]
        items += [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
        if not request.flag("recursive"):
            items = [item for item in items if "/" not in item["path"].removeprefix(prefix)]
        return answer(items)

    @route("POST", f"{_API}/paths-info/(?P<revision>[^/]+)")
    def paths_info(self, request: Request, name: str, revision: str) -> Reply:
        files = self.commit(self.repo(request, name), revision).files
        wanted = parse_qs(request.body.decode()).get("paths", [])
        return answer([_entry(path, files[path]) for path in wanted if path in files])

    @route("GET", f"{_API}/refs")
    def refs(self, request: Request, name: str) -> Reply:
        repo = self.repo(request, name)

        def listed(refs: dict[str, str], kind: str) -> list[dict[str, str]]:
            return [{"name": ref, "ref": f"refs/{kind}/{ref}", "targetCommit": oid} for ref, oid in refs.items()]

        return answer({"branches": listed(repo.branches, "heads"), "tags": listed(repo.tags, "tags"), "converts": []})

    @route("GET", f"{_API}/commits/(?P<revision>[^/]+)")
    def commits(self, request: Request, name: str, revision: str) -> Reply:
        repo = self.repo(request, name)
        fixed = {"message": "", "date": "2026-01-01T00:00:00.000Z", "authors": []}
        history = repo.history(self.commit(repo, revision).oid)
        return answer([{"id": commit.oid, "title": commit.title, **fixed} for commit in history])

    @route("POST", f"{_API}/branch/(?P<branch>[^/]+)")
    def create_branch(self, request: Request, name: str, branch: str) -> Reply:
        repo = self.repo(request, name, write=True)
        if branch in repo.branches:
            raise HubError(409, f"Reference already exists: refs/heads/{branch}")
        repo.branches[branch] = self.commit(repo, request.json().get("startingPoint") or "main").oid
        return answer({})

    @route("POST", f"{_API}/tag/(?P<revision>[^/]+)")
    def create_tag(self, request: Request, name: str, revision: str) -> Reply:
        repo, tag = self.repo(request, name, write=True), request.json()["tag"]
        if tag in repo.tags:
            raise HubError(409, f"Tag reference exists already: {tag}")
        repo.tags[tag] = self.commit(repo, revision).oid
        return answer({})

    @route("DELETE", f"{_API}/(?P<kind>branch|tag)/(?P<ref>[^/]+)")
    def delete_ref(self, request: Request, name: str, kind: str, ref: str) -> Reply:
        repo = self.repo(request, name, write=True)
        if (repo.tags if kind == "tag" else repo.branches).pop(ref, None) is None:
            raise HubError(404, f"no such {kind}: {ref}", "RevisionNotFound")
        return answer({})

    # Uploads

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self, request: Request) -> Reply:
        content = request.json()["content"]
        if not content.startswith("---"):
            return answer({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
        closed = re.search(r"^---\r?$", content[3:], re.MULTILINE)
        errors = [] if closed else [{"message": "the front matter has no closing ---"}]
        return answer({"errors": errors, "warnings": []}, 200 if closed else 400)

    @route("POST", f"{_API}/preupload/(?P<revision>[^/]+)")
    def preupload(self, request: Request, name: str, revision: str) -> Reply:
        stored = self.commit(self.repo(request, name, write=True), revision).files
        files = []
        for file in request.json()["files"]:
            path = file["path"]
            lfs = bool(file["size"]) and (path.endswith(LFS_SUFFIXES) or file["size"] > 10_000_000)
            known = {"oid": stored[path].oid} if path in stored else {}
            files.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, **known})
        return answer({"files": files})

    @route("POST", rf"/{_REPO}\.git/info/lfs/objects/batch")
    def lfs_batch(self, request: Request, name: str) -> Reply:
        repo = self.repo(request, name, write=True)
        objects: list[dict[str, Any]] = []
        for wanted in request.json()["objects"]:
            oid = wanted["oid"]
            upload = {"upload": {"href": f"{self.cdn}/{name}/lfs/{oid}"}}
            upload |= {"verify": {"href": f"{self.url}/{name}/lfs/verify"}}
            objects.append(wanted if oid in repo.objects else {**wanted, "actions": upload})
        return answer({"transfer": "basic", "objects": objects})

    @route("PUT", f"/{_REPO}/lfs/(?P<oid>[0-9a-f]+)")
    def lfs_put(self, request: Request, name: str, oid: str) -> Reply:
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise HubError(422, f"the body's sha256 is not {oid}")
        self.repos[name].objects[oid] = request.body
        return Reply(200)

    @route("POST", f"/{_REPO}/lfs/verify")
    def lfs_verify(self, request: Request, name: str) -> Reply:
        wanted = request.json()
        found = self.repo(request, name, write=True).objects.get(wanted["oid"])
        if found is None or len(found) != wanted["size"]:
            raise HubError(422, f"{wanted['oid']} was not uploaded with {wanted['size']} bytes")
        return Reply(200)

    @route("POST", f"{_API}/commit/(?P<branch>[^/]+)")
    def create_commit(self, request: Request, name: str, branch: str) -> Reply:
        repo = self.repo(request, name, write=True)
        if branch not in repo.branches:
            raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        header, *operations = (json.loads(line) for line in request.body.splitlines())
        parent = header["value"].get("parentCommit")
        if parent not in (None, repo.branches[branch]):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[repo.branches[branch]].files)
        for operation in operations:
            self.apply(repo, files, operation["key"], operation["value"])
        oid = repo.commit(branch, header["value"]["summary"], files).oid
        return answer({"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{name}/commit/{oid}"})

    def apply(self, repo: Repo, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            files[path] = Blob(base64.b64decode(value["content"]), False)
        elif key == "lfsFile":
            oid = value["oid"]
            xet = find_in_store(self.store, oid, value["size"]) if self.store and oid not in repo.objects else None
            if xet is None and oid not in repo.objects:
                raise HubError(400, f"{path}: its content {oid} was never uploaded")
            files[path] = Blob(b"" if xet else repo.objects[oid], True, xet)
        elif key in ("deletedFile", "deletedFolder"):
            gone = [file for file in files if file == path or file.startswith(path.rstrip("/") + "/")]
            if not gone:
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            for file in gone:
                del files[file]
        else:
            raise HubError(400, f"unknown operation {key}")

    @route("GET", f"{_API}/xet-(?P<right>read|write)-token/(?P<revision>[^/]+)")
    def xet_token(self, request: Request, name: str, right: str, revision: str) -> Reply:
        self.repo(request, name, write=right == "write")
        url, expires = f"local://{self.store}", 4_000_000_000
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expires)}
        return answer({"casUrl": url, "accessToken": "xet", "exp": expires}, headers=headers)

    # Downloads

    @route("GET", f"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, request: Request, name: str, revision: str, path: str) -> Reply:
        repo = self.repo(request, name)
        if repo.gated and self.user(request) is None:
            raise HubError(401, f"Access to model {name} is restricted", "GatedRepo")
        commit = self.commit(repo, revision)
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.oid)
        blob = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.git_oid}"'}
        if not blob.lfs:
            return _content(request, blob.data, headers)
        if blob.xet:
            link = f'<{self.url}/api/models/{name}/xet-read-token/{commit.oid}>; rel="xet-auth"'
            headers |= {"X-Xet-Hash": blob.xet.hash, "Link": link}
        linked = {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
        location = f"{self.cdn}/{name}/lfs/{blob.sha256}?file={quote(path)}"
        repo.objects[blob.sha256] = blob.data
        return Reply(302, b"", {**headers, **linked, "Location": location})

    @route("GET", f"/{_REPO}/lfs/(?P<oid>[0-9a-f]+)")
    def download(self, request: Request, name: str, oid: str) -> Reply:
        if oid not in self.repos[name].objects:
            raise HubError(404, f"no object {oid}")
        return _content(request, self.repos[name].objects[oid], {"ETag": f'"{oid}"'})


def _lfs(blob: Blob, key: str) -> dict[str, Any]:
    return {"lfs": {key: blob.sha256, "size": blob.size, "pointerSize": 130}} if blob.lfs else {}


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": blob.size, "oid": blob.git_oid, **_lfs(blob, "oid")}


def _content(request: Request, data: bytes, headers: dict[str, str]) -> Reply:
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if asked is None:
        return Reply(200, data, {**headers, "Accept-Ranges": "bytes"})
    first, last = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
    if first >= len(data):
        return Reply(416, b"", {"Content-Range": f"bytes */{len(data)}"})
    return Reply(206, data[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"})


def _flipped(data: bytes, index: int) -> bytes:
    changed = bytearray(data)
    if data:
        changed[index] ^= 0xFF
    return bytes(changed)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, hub: Hub, origin: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.origin = hub, origin

    def handle_error(self, *_: object) -> None:
        """Clients that hang up are no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 65536
    server: _Server

    def log_message(self, *_: object) -> None:
        """The log is `Hub.log`."""

    def _serve(self) -> None:
        hub = self.server.hub
        headers = {key.lower(): value for key, value in self.headers.items()}
        request = Request(self.command, self.path, headers, self._body(), self.server.origin)
        hub.log.append(request)
        fault = hub.take_fault(request)
        time.sleep(fault.delay)
        if fault.hook:
            fault.hook()
        if fault.corrupt is not None and request.body:
            request.body = _flipped(request.body, fault.corrupt)
        if fault.no_range:
            headers.pop("range", None)
        if fault.drop:
            return self._hang_up()
        reply = HubError(fault.status, "broken on demand").reply() if fault.status else hub.answer(request)
        if fault.status:
            reply.headers.pop("X-Error-Message")
            reply.headers |= fault.headers
        request.status = reply.status
        if fault.lose:
            return self._hang_up()
        if fault.corrupt is not None and not request.body:
            reply.body = _flipped(reply.body, fault.corrupt)
        self._send(reply, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, reply: Reply, fault: Fault) -> None:
        self.send_response(reply.status)
        stripped = {name.lower() for name in fault.strip}
        for key, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
            if key.lower() not in stripped:
                self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body[: fault.cut])
        self.wfile.flush()
        if fault.cut is not None or "content-length" in stripped:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)
