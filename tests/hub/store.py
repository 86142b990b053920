"""What the stand-in for the hub remembers: accounts, repositories, commits, large files; and what shall go wrong."""

import hashlib
import itertools
import re
import threading
from dataclasses import dataclass, field
from typing import Any

LARGE = (".safetensors", ".gguf", ".bin", ".model")


@dataclass(frozen=True)
class Blob:
    """A file's bytes; ``large`` ones lie in the large file storage."""

    data: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        """Git's hash: of a large file that of its pointer."""
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        data = text.encode() if self.large else self.data
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.oid

    def entry(self, path: str) -> dict[str, Any]:
        """As the tree lists it."""
        found: dict[str, Any] = {"type": "file", "path": path, "size": len(self.data), "oid": self.oid}
        if self.large:
            found["lfs"] = {"oid": self.sha256, "size": len(self.data), "pointerSize": 134}
        return found


@dataclass
class Repo:
    """Commits by id, each with all its files; branches point to them."""

    private: bool = False
    gated: bool = False
    ignored: tuple[str, ...] = ()
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    _numbers: Any = field(default_factory=itertools.count)

    def commit(self, files: dict[str, Blob], branch: str = "main", message: str = "") -> str:
        """Puts files on top of a branch; the new commit's id."""
        whole = {**self.commits.get(self.branches.get(branch, ""), {}), **files}
        seed = repr((next(self._numbers), sorted((path, blob.etag) for path, blob in whole.items())))
        commit = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[commit], self.messages[commit], self.branches[branch] = whole, message, commit
        return commit

    def at(self, revision: str) -> str | None:
        """The commit that a branch or a commit's id means."""
        commit = self.branches.get(revision, revision)
        return commit if commit in self.commits else None


@dataclass
class Account:
    """Who a token belongs to."""

    name: str
    orgs: tuple[str, ...] = ()
    role: str = "write"
    licences: tuple[str, ...] = ()
    """Gated repositories whose licence was accepted."""

    def owns(self, namespace: str) -> bool:
        return namespace in (self.name, *self.orgs)


@dataclass
class Fault:
    """What happens to requests that match: an answer with ``status``, or the connection ends after so many bytes."""

    method: str
    path: re.Pattern[str]
    times: int
    status: int | None = None
    drop_after: int | None = None
    lose_answer: bool = False
    stall: bool = False
    """Nothing comes until the faults are cleared."""


class Store:
    """Everything that a hub has, in memory."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.accounts: dict[str, Account] = {}
        self.large: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.part_size: int | None = None
        self.pretended: dict[str, int] = {}
        """Sizes that the list of a repository has in place of the true ones, in bytes."""
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()

    # what tests prepare

    def add(self, name: str, files: dict[str, bytes], *, private: bool = False, gated: bool = False) -> str:
        """A repository with one more commit; its id."""
        repo = self.repos.setdefault(name, Repo(private, gated))
        blobs = {path: Blob(data, path.endswith(LARGE)) for path, data in files.items()}
        self.large |= {blob.sha256: blob.data for blob in blobs.values() if blob.large}
        return repo.commit(blobs)

    def fail(self, method: str, path: str, status: int, times: int = 1) -> None:
        """The next so many matching requests are answered with an error."""
        self.faults.append(Fault(method, re.compile(path), times, status=status))

    def drop(self, method: str, path: str, after: int, times: int = 1) -> None:
        """Their connection ends after so many bytes of the body: of the answer's, or of what is sent."""
        self.faults.append(Fault(method, re.compile(path), times, drop_after=after))

    def lose_answer(self, method: str, path: str) -> None:
        """The next one is carried out, and whoever asked never hears of it."""
        self.faults.append(Fault(method, re.compile(path), 1, lose_answer=True))

    def stall(self, method: str, path: str) -> None:
        """The next one hangs until ``faults`` is cleared."""
        self.faults.append(Fault(method, re.compile(path), 1, stall=True))

    # what tests ask

    def asked(self, method: str, path: str = "") -> list[str]:
        """Paths of the requests of a method that match."""
        return [found for how, found, _ in self.requests if how == method and re.search(path, found)]

    def tokens(self) -> set[str]:
        """Every token that was sent."""
        return {headers["authorization"] for _, _, headers in self.requests if "authorization" in headers}

    def forget(self) -> None:
        """Requests up to now are not counted any more."""
        self.requests.clear()

    def fault(self, method: str, path: str) -> Fault | None:
        """What shall go wrong with this request; counted."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and fault.path.search(path):
                    fault.times -= 1
                    return fault
        return None
