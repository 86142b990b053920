"""Publishing: whole or not there, with a manifest that finds every change."""

import hashlib
import json
import os
import stat
from pathlib import Path

import pytest

from app.artifacts import view
from app.db import Database, journal_mode
from app.errors import RunError
from app.models import Artifact, Checkpoint, Job
from app.storage import Storage, write_private


@pytest.fixture
def backend() -> str:
    return "sqlite"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "out.tmp"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_bytes(b"hello")
    (folder / "deep" / "b.txt").write_bytes(b"world!")
    return folder


def test_a_published_folder(source: Path, tmp_path: Path) -> None:
    storage = Storage(tmp_path / "data")
    published = storage.publish(source, "art-1", {"job_id": "j"})
    folder = storage.artifact_dir("art-1")
    manifest = (folder / "MANIFEST.json").read_bytes()
    assert not source.exists()
    assert (published.bytes, published.sha256) == (11, hashlib.sha256(manifest).hexdigest())
    about = json.loads(manifest)
    assert about["job_id"] == "j"
    assert about["files"]["deep/b.txt"] == {"bytes": 6, "sha256": hashlib.sha256(b"world!").hexdigest()}
    assert storage.verify("art-1") == []
    (folder / "a.txt").write_bytes(b"hellO")
    (folder / "deep" / "b.txt").unlink()
    assert storage.verify("art-1") == ["a.txt", "deep/b.txt"]


def test_what_was_added_or_put_in_a_files_place_is_named(source: Path, tmp_path: Path) -> None:
    storage = Storage(tmp_path / "data")
    published = storage.publish(source, "art-1", {})
    folder = storage.artifact_dir("art-1")
    (folder / ".DS_Store").touch()
    (folder / "deep" / ".nfs01").touch()
    assert storage.verify("art-1", sha256=published.sha256) == [], "no library reads those"
    (folder / "deep" / "more.py").touch()
    (folder / "outside").symlink_to("/etc")
    os.rename(folder / "a.txt", tmp_path / "a.txt")
    (folder / "a.txt").symlink_to(tmp_path / "a.txt")
    for read in (True, False):
        assert storage.verify("art-1", read=read) == ["a.txt", "deep/more.py", "outside"]


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"files": 1}', '{"files": {"a.txt": {}}}'])
def test_a_manifest_that_is_not_whole(source: Path, tmp_path: Path, text: str | None) -> None:
    storage = Storage(tmp_path / "data")
    storage.publish(source, "art-1", {})
    manifest = storage.artifact_dir("art-1") / "MANIFEST.json"
    manifest.unlink() if text is None else manifest.write_text(text)
    assert storage.verify("art-1") == ["MANIFEST.json"]


def test_a_manifest_that_was_altered_with_its_files(source: Path, tmp_path: Path) -> None:
    """Only its own hash, which the artifact's row has, tells."""
    storage = Storage(tmp_path / "data")
    published = storage.publish(source, "art-1", {})
    folder = storage.artifact_dir("art-1")
    about = json.loads((folder / "MANIFEST.json").read_text())
    (folder / "a.txt").write_bytes(b"hellO")
    about["files"]["a.txt"]["sha256"] = hashlib.sha256(b"hellO").hexdigest()
    (folder / "MANIFEST.json").write_text(json.dumps(about))
    assert storage.verify("art-1") == []
    assert storage.verify("art-1", sha256=published.sha256) == ["MANIFEST.json"]


def test_a_copy_of_an_artifact_is_published_whole(source: Path, tmp_path: Path) -> None:
    (source / "MANIFEST.json").write_text("of another artifact")
    (source / "COMPLETE.json").write_text("of a checkpoint")
    (source / "deep" / "MANIFEST.json").write_text("a file like any other")
    storage = Storage(tmp_path / "data")
    storage.publish(source, "art-1", {})
    listed = json.loads((storage.artifact_dir("art-1") / "MANIFEST.json").read_bytes())["files"]
    assert set(listed) == {"a.txt", "deep/b.txt", "deep/MANIFEST.json"}
    assert storage.verify("art-1") == []


def test_what_is_not_published(source: Path, tmp_path: Path) -> None:
    storage = Storage(tmp_path / "data")
    (source / "link").symlink_to("/etc/passwd")
    with pytest.raises(RunError, match="neither a file nor a folder"):
        storage.publish(source, "art-1", {})
    (source / "link").unlink()
    os.mkfifo(source / "pipe")
    with pytest.raises(RunError, match="neither a file nor a folder"):
        storage.publish(source, "art-1", {})
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="left nothing"):
        storage.publish(tmp_path / "empty", "art-1", {})
    assert not storage.artifact_dir("art-1").exists()


def test_nothing_is_ever_published_over(source: Path, tmp_path: Path) -> None:
    storage = Storage(tmp_path / "data")
    storage.publish(source, "art-1", {})
    source.mkdir()
    (source / "a.txt").write_bytes(b"other")
    with pytest.raises(OSError, match="not empty"):
        storage.publish(source, "art-1", {})
    assert storage.verify("art-1") == []


def test_a_private_file(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    old = os.umask(0)
    try:
        write_private(path, b"one")
        write_private(path, b"two")
    finally:
        os.umask(old)
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("version", "mode"),
    [((3, 40, 1), "TRUNCATE"), ((3, 51, 2), "TRUNCATE"), ((3, 51, 3), "WAL"), ((3, 50, 7), "WAL"), ((4, 0, 0), "WAL")],
)
def test_wal_only_where_it_loses_no_commit(version: tuple[int, ...], mode: str) -> None:
    assert journal_mode(version) == mode


def test_what_people_find_of_a_training_run(database: Database, storage: Storage, tmp_path: Path, key: str) -> None:
    """Weights and config of each checkpoint, the final model, the config; by relative links that can be made again."""
    assert key
    for number, job_id in enumerate(("ftjob-1", "ftjob-2"), 1):
        checkpoint = storage.attempt_dir(job_id, 1) / "ckpt" / "checkpoint-5"
        checkpoint.mkdir(parents=True)
        for name in ("adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "COMPLETE.json"):
            (checkpoint / name).write_text(name)
        (storage.attempt_dir(job_id, 1) / "trainer_log.jsonl").write_text("{}\n")
        artifact = storage.artifact_dir(f"art-{number}")
        artifact.mkdir(parents=True)
        with database.write() as session:
            job = Job(
                id=job_id,
                project_id="proj-default",
                type="train",
                experiment_name="run",
                spec={"a": 1},
                spec_sha256="",
                resolved_spec={"a": 1, "b": 2},
                slot_class="train",
                fence=1,
            )
            session.add(job)
            session.flush()
            path = str(checkpoint.relative_to(storage.root))
            session.add(Checkpoint(id=f"c{number}", job_id=job_id, fence=1, step=5, path=path, bytes=1))
            columns = {"name": "run", "version": number, "kind": "adapter", "bytes": 1, "sha256": ""}
            session.add(Artifact(id=f"art-{number}", project_id="proj-default", job_id=job_id, **columns))
        for _ in range(2):
            view.refresh_job(database, storage, job_id)
    for name, number in (("run", 1), ("run_v2", 2)):
        folder = storage.root / "outputs" / name
        assert sorted(path.name for path in folder.iterdir()) == [
            "checkpoint-5",
            "config_submitted.yaml",
            "config_used.yaml",
            "final_model",
            "trainer_log.jsonl",
        ]
        assert [path.name for path in (folder / "checkpoint-5").iterdir()] == ["adapter_model.safetensors"]
        assert (folder / "checkpoint-5" / "adapter_model.safetensors").read_text() == "adapter_model.safetensors"
        assert (folder / "final_model").resolve() == storage.artifact_dir(f"art-{number}").resolve()
        assert (folder / "config_used.yaml").read_text() == "a: 1\nb: 2\n"
        link = storage.root / "models" / "adapters" / f"run_v{number}"
        assert not os.readlink(link).startswith("/")
        assert link.resolve() == storage.artifact_dir(f"art-{number}").resolve()
