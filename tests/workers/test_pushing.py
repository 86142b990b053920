"""An artifact is pushed by the real client to a stand-in for the hub: once, whole, to nobody who should not see it."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from app.errors import Code, RunError
from app.storage import MANIFEST, Storage
from tests.hub.server import HubServer
from tests.hub.store import Account
from tests.support import make_adapter_folder, make_model_folder
from tests.workers.conftest import TOKEN
from tests.workers.context import RecordingContext
from workers.operations.push_to_hub import PushSpec, run

# The library's own: it hands files to httpx2 by an older name.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
REPO = "acme/numbers"
CARD = "---\nlibrary_name: peft\n---\n\n# numbers\n"
WEIGHTS = "model.safetensors"


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A published model with a README of its own and a folder within."""
    source = make_model_folder(tmp_path / "source")
    (source / "README.md").write_text("by somebody else\n")
    (source / "extra").mkdir()
    (source / "extra" / "notes.txt").write_text("notes\n")
    storage = Storage(tmp_path / "data")
    storage.publish(source, "art-1", {"job_id": "job-1", "base": str(tmp_path / "secret-place")})
    return storage.artifact_dir("art-1")


def push(artifact: Path, root: Path, *, card: str = CARD, **fields: Any) -> RecordingContext:
    """One attempt."""
    info = {"model": {"card": card, "name": "numbers", "artifact_id": "art-1"}}
    ctx = RecordingContext(root, {"model": artifact}, info)
    run(PushSpec.model_validate({"model": "artifact:art-1", "repo_id": REPO, **fields}), ctx)
    return ctx


def refused(artifact: Path, root: Path, **fields: Any) -> RunError:
    with pytest.raises(RunError) as caught:
        push(artifact, root, **fields)
    assert TOKEN not in f"{caught.value.message} {caught.value.hint}"
    assert all(hashlib.sha256((artifact / name).read_bytes()).hexdigest() == digest for name, digest in kept(artifact))
    return caught.value


def kept(artifact: Path) -> list[tuple[str, str]]:
    """The artifact's files with their hashes."""
    files = json.loads((artifact / MANIFEST).read_bytes())["files"]
    return [(name, entry["sha256"]) for name, entry in files.items()]


# --- refusals: the field, what to do, and nothing sent ----------------------------------------------------------------


def sent(hub: HubServer) -> list[str]:
    return hub.store.asked("PUT") + hub.store.asked("POST", "commit")


def test_no_token_at_all(hub: HubServer, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    error = refused(artifact, tmp_path / "run")
    assert (error.code, error.param, error.transient) == (Code.HUB_REFUSED, "repo_id", False)
    assert "HF_TOKEN" in (error.hint or "")
    assert "artifact is safe" in (error.hint or "")
    assert hub.store.requests == []


@pytest.mark.parametrize(
    ("account", "repo", "says"),
    [
        (None, REPO, "does not let this token write"),
        (Account("alice", (), "read"), "alice/numbers", "may only read"),
        (Account("alice"), REPO, "belongs to alice, who cannot write to acme"),
    ],
    ids=["unknown", "reads", "stranger"],
)
def test_a_token_that_may_not_write_there(
    account: Account | None, repo: str, says: str, hub: HubServer, artifact: Path, tmp_path: Path
) -> None:
    hub.store.accounts.clear()
    if account is not None:
        hub.store.accounts[TOKEN] = account
    error = refused(artifact, tmp_path / "run", repo_id=repo)
    assert (error.code, error.param, error.transient) == (Code.HUB_REFUSED, "repo_id", False)
    assert says in error.message
    assert "HF_TOKEN" in (error.hint or "")
    assert "artifact is safe" in (error.hint or "")
    assert sent(hub) == []


def test_the_hub_itself_says_no(hub: HubServer, artifact: Path, tmp_path: Path) -> None:
    """A fine-grained token says of itself what it is for nobody but the hub."""
    hub.store.fail("POST", "/api/repos/create", 403)
    error = refused(artifact, tmp_path / "run")
    assert (error.code, error.param) == (Code.HUB_REFUSED, "repo_id")
    assert "injected" in error.message


def test_a_public_repository_is_not_written_to_by_default(hub: HubServer, artifact: Path, tmp_path: Path) -> None:
    hub.store.add(REPO, {"README.md": b"mine"})
    error = refused(artifact, tmp_path / "run")
    assert (error.code, error.param) == (Code.HUB_REFUSED, "private")
    assert sent(hub) == []
    assert push(artifact, tmp_path / "again", private=False).results["private"] is False


def test_weights_of_something_else_are_left_alone(hub: HubServer, artifact: Path, tmp_path: Path) -> None:
    hub.store.add(REPO, {"adapter_model.safetensors": b"another"}, private=True)
    error = refused(artifact, tmp_path / "run")
    assert (error.code, error.param) == (Code.HUB_REFUSED, "repo_id")
    assert "adapter_model.safetensors" in error.message
    assert sent(hub) == []
    assert push(artifact, tmp_path / "x", repo_id="acme/other").results["changed"] is True


def test_a_damaged_artifact_is_not_sent(hub: HubServer, artifact: Path, tmp_path: Path) -> None:
    damaged = artifact / WEIGHTS
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\1")
    with pytest.raises(RunError, match=f"{WEIGHTS} is not as it was published") as caught:
        push(artifact, tmp_path / "run")
    assert caught.value.code is Code.STORAGE_ERROR
    assert sent(hub) == []


def test_what_the_repository_ignores_is_missed(hub: HubServer, artifact: Path, tmp_path: Path) -> None:
    hub.store.add(REPO, {".gitignore": b"config.json"}, private=True)
    hub.store.repos[REPO].ignored = ("config.json",)
    error = refused(artifact, tmp_path / "run")
    assert (error.code, error.param) == (Code.HUB_REFUSED, "repo_id")
    assert "has not kept config.json" in error.message
    assert ".gitignore" in (error.hint or "")


# --- what goes wrong on the way ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "whoami"), ("POST", "repos/create"), ("GET", "/api/models/acme/numbers$"), ("POST", "/commit/")],
)
def test_a_hub_that_is_ill_is_asked_again_later(
    method: str, path: str, hub: HubServer, artifact: Path, tmp_path: Path
) -> None:
    hub.store.fail(method, path, 500)
    error = refused(artifact, tmp_path / "run")
    assert (error.code, error.param, error.transient) == (Code.MODEL_UNREACHABLE, "repo_id", True)
    assert "artifact is safe" in (error.hint or "")
    hub.store.forget()
    assert push(artifact, tmp_path / "again").results["changed"] is True
    if path == "/commit/":
        assert hub.store.asked("PUT") == [], "the large files had come already"


def test_a_hub_that_is_not_there(
    hub: HubServer, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    error = refused(artifact, tmp_path / "run")
    assert (error.code, error.param, error.transient) == (Code.MODEL_UNREACHABLE, "repo_id", True)
    assert "http://127.0.0.1:9" in error.message


def test_a_connection_that_breaks_in_the_middle_of_a_file(hub: HubServer, artifact: Path, tmp_path: Path) -> None:
    hub.store.drop("PUT", "/lfs/", after=100)
    ctx = push(artifact, tmp_path / "run")
    assert len(hub.store.asked("PUT")) == 2
    assert ctx.results["changed"] is True


def test_a_commit_whose_answer_got_lost_is_not_made_twice(hub: HubServer, artifact: Path, tmp_path: Path) -> None:
    hub.store.lose_answer("POST", "/commit/")
    error = refused(artifact, tmp_path / "run")
    assert error.transient
    commits = len(hub.store.repos[REPO].commits)
    results = push(artifact, tmp_path / "again").results
    assert len(hub.store.repos[REPO].commits) == commits == 2
    assert results["changed"] is False
    assert results["commit"] == hub.store.repos[REPO].branches["main"]


def test_a_commit_that_came_in_between_is_looked_at_first(
    hub: HubServer, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = HfApi.preupload_lfs_files

    def late(self: Any, *args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(HfApi, "preupload_lfs_files", real)
        hub.store.add(REPO, {"notes.md": b"meanwhile"})
        return real(self, *args, **kwargs)

    monkeypatch.setattr(HfApi, "preupload_lfs_files", late)
    error = refused(artifact, tmp_path / "run")
    assert (error.code, error.transient) == (Code.MODEL_UNREACHABLE, True)
    results = push(artifact, tmp_path / "again").results
    assert "notes.md" in hub.store.repos[REPO].commits[results["commit"]]


# --- what arrives -----------------------------------------------------------------------------------------------------


def test_all_files_and_the_card_in_one_commit_of_a_private_repository(
    hub: HubServer, artifact: Path, tmp_path: Path
) -> None:
    ctx = push(artifact, tmp_path / "run")
    repo = hub.store.repos[REPO]
    there = repo.commits[repo.branches["main"]]
    assert repo.private
    assert len(repo.commits) == 2, "the one that the repository begins with, and ours"
    assert repo.messages[repo.branches["main"]] == "numbers (art-1)"
    own = {name: (artifact / name).read_bytes() for name, _ in kept(artifact)}
    own["README.original.md"] = own.pop("README.md")
    own["README.md"] = CARD.encode()
    assert {name: blob.data for name, blob in there.items() if name != ".gitattributes"} == own
    assert not any(b"secret-place" in blob.data for blob in there.values()), "no folder of this machine"
    results = ctx.results
    assert results["commit"] == repo.branches["main"]
    assert results["url"] == f"{hub.url}/{REPO}"
    assert results["commit_url"] == f"{hub.url}/{REPO}/commit/{results['commit']}"
    assert (results["files"], results["bytes"]) == (len(own), sum(map(len, own.values())))
    assert results["uploaded_bytes"] == results["bytes"]
    assert ctx.phases == ["validating", "uploading"]
    assert ctx.steps[-1]["step"] == ctx.steps[-1]["total"] == results["bytes"]


def test_the_same_push_again_sends_nothing_and_commits_nothing(hub: HubServer, artifact: Path, tmp_path: Path) -> None:
    first = push(artifact, tmp_path / "run").results
    hub.store.forget()
    second = push(artifact, tmp_path / "again").results
    assert sent(hub) == []
    assert hub.store.asked("POST", "batch") == []
    assert second["commit"] == first["commit"]
    assert (second["changed"], second["uploaded"], second["uploaded_bytes"]) == (False, [], 0)


def test_only_what_differs_is_sent(hub: HubServer, artifact: Path, tmp_path: Path) -> None:
    push(artifact, tmp_path / "run")
    hub.store.forget()
    results = push(artifact, tmp_path / "again", card=CARD + "\nmore\n").results
    assert results["uploaded"] == ["README.md"]
    assert hub.store.asked("PUT") == []
    assert len(hub.store.repos[REPO].commits) == 3


def test_a_branch_of_its_own_and_a_message(hub: HubServer, artifact: Path, tmp_path: Path) -> None:
    hub.store.add(REPO, {"adapter_model.safetensors": b"another"}, private=True)
    hub.store.repos[REPO].branches["v2"] = hub.store.repos[REPO].commit({}, "v2")
    results = push(artifact, tmp_path / "run", revision="v2", commit_message="the second").results
    repo = hub.store.repos[REPO]
    assert repo.branches["v2"] == results["commit"] != repo.branches["main"]
    assert repo.messages[results["commit"]] == "the second"


def test_a_large_file_goes_in_parts(hub: HubServer, artifact: Path, tmp_path: Path) -> None:
    hub.store.part_size = 128
    ctx = push(artifact, tmp_path / "run")
    size = (artifact / WEIGHTS).stat().st_size
    assert len(hub.store.asked("PUT")) == -(-size // 128) > 2
    assert ctx.results["changed"] is True


def test_an_adapter_by_the_field_of_that_name(hub: HubServer, tmp_path: Path) -> None:
    storage = Storage(tmp_path / "data")
    storage.publish(make_adapter_folder(tmp_path / "source"), "art-2", {})
    info = {"adapter": {"card": CARD, "name": "numbers", "artifact_id": "art-2"}}
    ctx = RecordingContext(tmp_path / "run", {"adapter": storage.artifact_dir("art-2")}, info)
    run(PushSpec.model_validate({"adapter": "artifact:art-2", "repo_id": REPO}), ctx)
    assert "adapter_model.safetensors" in hub.store.repos[REPO].commits[ctx.results["commit"]]


def test_the_token_may_lie_in_a_file(
    hub: HubServer, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text(TOKEN + "\n")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    assert push(artifact, tmp_path / "run").results["changed"] is True
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "absent"))
    assert "HF_TOKEN_PATH" in refused(artifact, tmp_path / "again").message
