"""A stand-in for the hub, which is on another machine: as much of its HTTP API as the real client uses.

Accounts and visibility, repositories and branches, the large file storage in one or several parts, commits as NDJSON,
files with ETag, redirects and ranges. It keeps everything in memory and says what it was asked.
"""

import base64
import hashlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub.store import LARGE, Account, Blob, Fault, Repo, Store


class Refused(Exception):
    """An answer with an error."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "HubServer"

    def log_message(self, *_: Any) -> None:
        """Tests look at ``requests``."""

    # --- in and out ---------------------------------------------------------------------------------------------------

    def _handle(self) -> None:
        self.store = self.server.store
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        path = unquote(url.path)
        fault = self.store.fault(self.command, path)
        self._fault = fault
        with self.store.lock:
            self.store.requests.append((self.command, path, {k.lower(): v for k, v in self.headers.items()}))
        try:
            self._body = self._read(fault)
            while fault is not None and fault.stall and fault in self.store.faults:
                time.sleep(0.05)
            if fault is not None and fault.status is not None:
                raise Refused(fault.status, "injected")
            self._account = self._who()
            with self.store.lock:
                answer = self._route(path)
            if fault is not None and fault.lose_answer:
                self._cut()
            elif answer is not None:
                self._json(200, answer)
        except Refused as refused:
            self._json(refused.status, {"error": refused.message}, refused)
        except (ConnectionError, TimeoutError):
            self._cut()

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _read(self, fault: Fault | None) -> bytes:
        size = int(self.headers.get("Content-Length") or 0)
        if fault is not None and fault.drop_after is not None and self.command in ("POST", "PUT"):
            self.rfile.read(min(size, fault.drop_after))
            raise ConnectionError
        return self.rfile.read(size)

    def _cut(self) -> None:
        self.close_connection = True
        # Only a shutdown ends it for the other side: reader and writer still hold the socket.
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _json(self, status: int, value: Any, refused: Refused | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if refused is not None:
            self.send_header("X-Error-Message", refused.message)
            if refused.code:
                self.send_header("X-Error-Code", refused.code)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _bytes(self, data: bytes, headers: dict[str, str]) -> None:
        """A file, or the rest of it."""
        asked = self.headers.get("Range") if self.server.knows_ranges else None
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        for name, value in {**headers, "Content-Length": str(len(data) - start)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        rest = data[start:]
        after = self._fault.drop_after if self._fault is not None else None
        self.wfile.write(rest if after is None else rest[:after])
        if after is not None:
            self.wfile.flush()
            self._cut()

    # --- who may ------------------------------------------------------------------------------------------------------

    def _who(self) -> Account | None:
        sent = self.headers.get("Authorization")
        if sent is None:
            return None
        account = self.store.accounts.get(sent.removeprefix("Bearer "))
        if account is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        return account

    def _repo(self, name: str, *, write: bool = False) -> Repo:
        repo, account = self.store.repos.get(name), self._account
        owner = account is not None and account.owns(name.split("/")[0])
        if repo is None or (repo.private and not owner):
            raise Refused(404 if account else 401, "Repository not found", "RepoNotFound")
        if write and not (owner and account is not None and account.role == "write"):
            raise Refused(403, "You have no write access to this repository")
        return repo

    def _commit_of(self, repo: Repo, revision: str) -> str:
        commit = repo.at(revision)
        if commit is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # --- what there is ------------------------------------------------------------------------------------------------

    def _route(self, path: str) -> Any:
        parts = path.strip("/").split("/")
        if path == "/api/whoami-v2":
            return self._whoami()
        if path == "/api/repos/create":
            return self._create()
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            return self._model("/".join(parts[2:4]), parts[4:])
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(path.removesuffix(".git/info/lfs/objects/batch").strip("/"))
        if parts[0] == "lfs":
            return self._large(parts[1:])
        if parts[0] == "cdn":
            return self._bytes(self.store.large[parts[1]], {})
        if len(parts) > 4 and parts[2] == "resolve":
            return self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        raise Refused(404, f"no such place: {path}")

    def _whoami(self) -> Any:
        account = self._account
        if account is None:
            raise Refused(401, "Invalid username or password.")
        orgs = [{"name": org, "roleInOrg": "write"} for org in account.orgs]
        access = {"role": account.role, "displayName": "test"}
        return {"type": "user", "name": account.name, "orgs": orgs, "auth": {"accessToken": access}}

    def _create(self) -> Any:
        body = json.loads(self._body)
        account = self._account
        owner = body.get("organization") or (account.name if account else "")
        name = f"{owner}/{body['name']}"
        if account is None or not account.owns(owner) or account.role != "write":
            raise Refused(403, "You don't have the rights to create a model under this namespace")
        url = {"url": f"{self.server.url}/{name}"}
        if name in self.store.repos:
            self._json(409, {"error": "You already created this model repo", **url})
            return None
        repo = self.store.repos[name] = Repo(private=body.get("visibility") == "private")
        repo.commit({".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}, message="initial commit")
        return url

    def _model(self, name: str, rest: list[str]) -> Any:
        action = rest[0] if rest else "revision"
        repo = self._repo(name, write=action in ("preupload", "commit", "branch"))
        revision = "/".join(rest[1:]) or "main"
        if action == "branch":
            if revision in repo.branches:
                raise Refused(409, "Reference already exists")
            repo.branches[revision] = repo.branches["main"]
            return {}
        commit = self._commit_of(repo, revision)
        if action == "revision":
            siblings = [{"rfilename": path} for path in repo.commits[commit]]
            return {"id": name, "sha": commit, "private": repo.private, "gated": repo.gated, "siblings": siblings}
        if action == "tree":
            return self._tree(repo.commits[commit])
        if action == "preupload":
            return self._preupload(repo, repo.commits[commit])
        if action == "commit":
            return self._commit(repo, name, revision)
        raise Refused(404, action)

    def _tree(self, files: dict[str, Blob]) -> Any:
        everything = self.query.get("recursive") == ["true"] or self.query.get("recursive") == ["True"]
        folders = sorted({path.split("/")[0] for path in files if "/" in path})
        found = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders]
        entries = [blob.entry(path) for path, blob in files.items() if everything or "/" not in path]
        return found + [{**entry, "size": self.store.pretended.get(entry["path"], entry["size"])} for entry in entries]

    def _preupload(self, repo: Repo, there: dict[str, Blob]) -> Any:
        found = []
        for file in json.loads(self._body)["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith(LARGE) else "regular"
            ignore = path in repo.ignored
            oid = there[path].etag if path in there else None
            found.append({"path": path, "uploadMode": mode, "shouldIgnore": ignore, "oid": oid})
        return {"files": found}

    def _commit(self, repo: Repo, name: str, branch: str) -> Any:
        lines = [json.loads(line) for line in self._body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, repo.branches[branch]):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.store.large:
                    raise Refused(400, f"{value['path']}: its bytes were never uploaded")
                files[value["path"]] = Blob(self.store.large[value["oid"]], True)
        commit = repo.commit(files, branch, header["summary"])
        return {"commitUrl": f"{self.server.url}/{name}/commit/{commit}", "commitOid": commit, "success": True}

    # --- large files --------------------------------------------------------------------------------------------------

    def _batch(self, name: str) -> Any:
        self._repo(name, write=True)
        objects = []
        for wanted in json.loads(self._body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            if oid in self.store.large:
                objects.append({"oid": oid, "size": size})
                continue
            header: dict[str, str] = {}
            part = self.store.part_size
            if part is not None and size > part:
                numbers = range(1, -(-size // part) + 1)
                header = {f"{number:05d}": f"{self.server.url}/lfs/{oid}/{number}?sig=signed" for number in numbers}
                header["chunk_size"] = str(part)
            upload = {"href": f"{self.server.url}/lfs/{oid}?sig=signed", "header": header}
            verify = {"href": f"{self.server.url}/lfs/{oid}/verify"}
            objects.append({"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}})
        return {"transfer": "basic", "objects": objects}

    def _large(self, parts: list[str]) -> Any:
        oid = parts[0]
        if parts[1:] == ["verify"]:
            size = json.loads(self._body)["size"]
            if len(self.store.large.get(oid, b"")) != size:
                raise Refused(400, "it did not come whole")
            return {}
        if self.command == "PUT" and len(parts) > 1:
            self.store.parts[oid, int(parts[1])] = self._body
            self.send_response(200)
            self.send_header("ETag", hashlib.md5(self._body).hexdigest())
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        data = self._body
        if self.command == "POST":  # all parts are here
            numbers = sorted(part["partNumber"] for part in json.loads(self._body)["parts"])
            data = b"".join(self.store.parts[oid, number] for number in numbers)
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refused(400, "these are other bytes than were announced")
        self.store.large[oid] = data
        return {}

    def _resolve(self, name: str, revision: str, path: str) -> Any:
        repo = self._repo(name)
        commit = self._commit_of(repo, revision)
        if repo.gated and (self._account is None or name not in self._account.licences):
            raise Refused(403 if self._account else 401, f"Access to model {name} is restricted", "GatedRepo")
        blob = repo.commits[commit].get(path)
        if blob is None:
            raise Refused(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{blob.etag}"'}
        if not blob.large:
            return self._bytes(blob.data, headers)
        self.send_response(302)
        linked = {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data)), "Content-Length": "0"}
        for header, value in {**headers, **linked, "Location": f"{self.server.cdn}/{blob.sha256}"}.items():
            self.send_header(header, value)
        self.end_headers()
        return None


class HubServer(ThreadingHTTPServer):
    daemon_threads = True
    knows_ranges = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.store = Store()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        # By another name, because it is another machine: no token must go there.
        self.cdn = f"http://localhost:{self.server_address[1]}/cdn"


@contextmanager
def running() -> Iterator[HubServer]:
    """A hub of its own, until the block ends."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
