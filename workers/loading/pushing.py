"""An artifact on its way to a repository of the hub: what may be written where, what is there already, what is sent.

Nothing here changes the artifact. A push that broke off goes on where it stopped: the hub keeps every file that came
whole, and a commit is made of all of them at once, so that nobody ever sees half of one.
"""

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from app.catalog import Interrupted, RunContext
from app.errors import Code, RunError
from app.storage import MANIFEST, sha256_of
from workers import hub

CARD = "README.md"
THEIR_CARD = "README.original.md"
"""Under this name goes a README that an imported model brought along."""
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.gguf", "*.bin", "*.pt", "*.pth")
_AT_ONCE = 4
_SAFE = "The artifact is safe here: once that is mended, POST /jobs/{id}/retry goes on with what is not there yet."


class Sent(NamedTuple):
    """A file as it goes into the repository: where it lies, its size in bytes and its sha256."""

    path: Path
    bytes: int
    sha256: str


class Pushed(NamedTuple):
    """What came of it: the commit that holds the files (40 hex digits), and what was sent for it."""

    commit: str
    uploaded: list[str]
    uploaded_bytes: int


def files_of(folder: Path, card: str, work: Path, ctx: RunContext) -> dict[str, Sent]:
    """What an artifact's manifest lists, read and compared with it, and the card. Raises RunError storage_error.

    The manifest itself stays here: it names folders of this machine.
    """
    entries: dict[str, dict[str, Any]] = json.loads((folder / MANIFEST).read_bytes())["files"]
    found: dict[str, Sent] = {}
    for name, entry in sorted(entries.items()):
        path = folder / name
        ctx.tick()
        try:
            whole = path.stat().st_size == entry["bytes"] and sha256_of(path) == entry["sha256"]
        except OSError:
            whole = False
        if not whole:
            raise RunError(
                Code.STORAGE_ERROR,
                f"{name} is not as it was published; nothing was sent",
                hint="Restore DATA_DIR/artifacts from a backup (docs/operate.md), or make the artifact again.",
            )
        found[THEIR_CARD if name == CARD else name] = Sent(path, int(entry["bytes"]), str(entry["sha256"]))
    text = card.encode()
    written = work / CARD
    written.write_bytes(text)
    found[CARD] = Sent(written, len(text), hashlib.sha256(text).hexdigest())
    return found


class Push:
    """One repository that is written to. Every method raises RunError that names the spec's field at fault."""

    def __init__(self, repo: str, branch: str | None, private: bool) -> None:
        self.repo, self.branch, self.private = repo, branch or "main", private
        self._secret = hub.token()
        if self._secret is None:
            raise RunError(
                Code.HUB_REFUSED,
                f"repo_id: there is no token to write to {hub.endpoint()} with",
                param="repo_id",
                hint=f"Set {hub.TOKEN}. {_SAFE}",
            )
        self._client = hub.client(self._secret)

    @property
    def address(self) -> str:
        """Of the repository, for people."""
        return f"{hub.endpoint()}/{self.repo}"

    def prepare(self) -> bool:
        """Whether this token may write there; makes the repository, private unless asked otherwise.

        Returns whether the repository is private.
        """
        self._ask(self._check_account)
        self._ask(lambda: self._client.create_repo(self.repo, private=self.private, exist_ok=True))
        private = bool(self._ask(lambda: self._client.model_info(self.repo).private))
        if self.private and not private:
            raise RunError(
                Code.HUB_REFUSED,
                f"private: {self.repo} exists and everybody can read it",
                param="private",
                hint="Say private: false if that is meant, or name another repo_id.",
            )
        if self.branch != "main":
            self._ask(
                lambda: self._client.create_branch(self.repo, branch=self.branch, exist_ok=True), field="revision"
            )
        return private

    def send(self, files: Mapping[str, Sent], message: str, ctx: RunContext) -> Pushed:
        """Uploads what is not there with the same hash, then commits it. No commit where nothing differs."""
        head = str(self._ask(lambda: self._client.model_info(self.repo, revision=self.branch).sha, field="revision"))
        there = self._listed(head)
        self._check_strangers(there, files)
        missing = [name for name, file in files.items() if not _same(file, there.get(name))]
        if not missing:
            return Pushed(head, [], 0)
        total = sum(files[name].bytes for name in missing)
        ctx.event("push_started", f"Sending {len(missing)} files to {self.repo}.", files=missing[:100], bytes=total)
        commit = self._upload({name: files[name] for name in missing}, message, head, ctx)
        # What the hub ignores, or cut short, would otherwise be found out by whoever loads it.
        there = self._listed(commit)
        lost = [name for name in missing if not _same(files[name], there.get(name))]
        if lost:
            raise RunError(
                Code.HUB_REFUSED,
                f"repo_id: {self.repo} has not kept {', '.join(lost[:5])}",
                param="repo_id",
                hint=f"Does its .gitignore name them? {_SAFE}",
            )
        return Pushed(commit, missing, total)

    def _check_account(self) -> None:
        account = self._client.whoami()
        namespace = self.repo.partition("/")[0]
        own = [str(account.get("name")), *(str(org.get("name")) for org in account.get("orgs") or [])]
        if namespace.lower() not in [name.lower() for name in own]:
            raise RunError(
                Code.HUB_REFUSED,
                f"repo_id: this token belongs to {own[0]}, who cannot write to {namespace}",
                param="repo_id",
                hint=f"It can write to: {', '.join(own)}. The token: {hub.TOKEN}. {_SAFE}",
            )
        if ((account.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
            raise RunError(
                Code.HUB_REFUSED,
                "repo_id: this token may only read",
                param="repo_id",
                hint=f"Make one that may write at {hub.endpoint()}/settings/tokens: {hub.TOKEN}. {_SAFE}",
            )

    def _listed(self, commit: str) -> dict[str, Any]:
        def listed() -> dict[str, Any]:
            tree = self._client.list_repo_tree(self.repo, recursive=True, revision=commit)
            return {file.path: file for file in tree if hasattr(file, "blob_id")}

        found: dict[str, Any] = self._ask(listed, field="revision")
        return found

    def _check_strangers(self, there: Mapping[str, Any], files: Mapping[str, Sent]) -> None:
        """Weights of something else beside ours would be loaded with them, or in their place."""
        strangers = [
            name
            for name in there
            if "/" not in name and name not in files and any(fnmatch(name, glob) for glob in WEIGHTS)
        ]
        if strangers:
            raise RunError(
                Code.HUB_REFUSED,
                f"repo_id: {self.repo} holds weights of something else: {', '.join(strangers[:5])}",
                param="repo_id",
                hint="Name another repo_id, or a revision: a branch of its own. Nothing is ever deleted there.",
            )

    def _upload(self, files: Mapping[str, Sent], message: str, head: str, ctx: RunContext) -> str:
        from huggingface_hub import CommitOperationAdd

        total = sum(file.bytes for file in files.values())
        positions = dict.fromkeys(files, 0)

        def told(name: str, position: int) -> None:
            if ctx.stop_requested():
                raise Interrupted
            positions[name] = position
            ctx.progress(sum(positions.values()), total)

        additions = []
        for name, file in files.items():
            addition = CommitOperationAdd(name, str(file.path))
            addition.upload_info.sha256 = bytes.fromhex(file.sha256)  # known, so it is not read once more for it
            addition.path_or_fileobj = _Counted(file.path, partial(told, name))
            additions.append(addition)
        where = {"repo_id": self.repo, "revision": self.branch}

        def upload() -> str:
            self._client.preupload_lfs_files(additions=additions, num_threads=_AT_ONCE, free_memory=False, **where)
            # On this parent alone: a commit that came in between is looked at by the next attempt.
            made = self._client.create_commit(operations=additions, commit_message=message, parent_commit=head, **where)
            return str(made.oid)

        try:
            commit = str(self._ask(upload))
        except RunError:
            if ctx.stop_requested():
                raise Interrupted from None
            raise
        finally:
            for addition in additions:
                addition.path_or_fileobj.close()
        ctx.progress(total, total)
        return commit

    def _ask(self, question: Callable[[], Any], field: str = "repo_id") -> Any:
        try:
            return question()
        except Exception as error:
            trouble = hub.trouble(error, self.repo, field, self._secret, writing=True)
            if trouble.code is Code.HUB_REFUSED and "The artifact is safe" not in (trouble.hint or ""):
                trouble.hint = f"{trouble.hint} {_SAFE}" if trouble.hint else _SAFE
            raise trouble from error


class _Counted(io.BufferedReader):
    """A file that says how far it has been read: the bytes that went out, as near as a client can know."""

    def __init__(self, path: Path, told: Callable[[int], None]) -> None:
        super().__init__(path.open("rb", buffering=0))
        self._told = told

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self._told(self.tell())
        return data


def _same(file: Sent, there: Any) -> bool:
    """Whether the hub has these bytes: by sha256 of a large file, by git's hash of a small one."""
    if there is None:
        return False
    if there.lfs is not None:
        return bool(there.lfs.sha256 == file.sha256)
    if there.size != file.bytes:
        return False
    data = file.path.read_bytes()
    return bool(there.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest())
