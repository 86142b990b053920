"""Folders of the caller: what is the service's own goes by its id, nothing of the caller's is overwritten."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from fastapi.testclient import TestClient

from app.artifacts import repository as artifacts
from app.client import Client
from app.commands import folders
from app.db import Database
from app.models import Job
from app.settings import Settings
from app.storage import Storage
from tests.support import make_model_folder


@pytest.fixture
def backend() -> str:
    return "sqlite"


@pytest.fixture
def client(api: TestClient, key: str, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Client:
    monkeypatch.setenv("TUNESMITH_DATA_DIR", str(settings.data_dir))
    client = Client("http://testserver", key)
    client._http.close()
    client._http = api
    return client


@pytest.fixture
def artifact(client: Client, database: Database, storage: Storage, tmp_path: Path) -> str:
    """The id of a published model."""
    job_id = client.submit({"type": "sleepy"})["id"]
    folder = make_model_folder(tmp_path / "source")
    (folder / "deep").mkdir()
    (folder / "deep" / "notes.txt").write_text("as published")
    published = storage.publish(folder, "art-1", {"job_id": job_id})
    with database.write() as session:
        job = session.get_one(Job, job_id)
        columns = {"id": "art-1", "name": "m", "kind": "model", "bytes": published.bytes, "sha256": published.sha256}
        artifacts.add(session, job, **columns)
    return "art-1"


@pytest.fixture
def copy(artifact: str, tmp_path: Path) -> Path:
    target = tmp_path / "out" / "copy"
    folders.copy_out(artifact, target)
    return target


def refused(call: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(typer.Exit) as ended:
        call()
    assert ended.value.exit_code == 1
    return capsys.readouterr().err


def test_what_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "run").mkdir(parents=True)
    for name in ("org/name", "hub:org/name", "support:v3", "artifact:art-1", "tiny", "", None):
        assert folders.as_path(name) is None
    for path in ("./gone", "../x", "/abs", "~/x", ".", "outputs/run"):
        assert folders.as_path(path) is not None
    assert folders.as_path("./here", tmp_path) == tmp_path / "here"


def test_an_artifact_and_its_copy_go_by_its_id(client: Client, artifact: str, copy: Path, settings: Settings) -> None:
    link = copy.with_name("link")
    link.symlink_to(settings.data_dir / "artifacts" / artifact)
    for folder in (link, copy, settings.data_dir / "artifacts" / artifact):
        assert folders.reference(client, str(folder)) == "artifact:art-1"
    assert folders.reference(client, "org/name") == "org/name"


@pytest.mark.parametrize("change", ["bytes", "more", "less", "manifest", "nonsense", "stranger"])
def test_a_copy_that_was_changed_is_a_folder_like_any_other(client: Client, copy: Path, change: str) -> None:
    manifest = copy / "MANIFEST.json"
    if change == "bytes":
        (copy / "deep" / "notes.txt").write_text("as rewritten")
    elif change == "more":
        (copy / "extra.safetensors").touch()
    elif change == "less":
        (copy / "config.json").unlink()
    elif change == "manifest":
        manifest.write_text(manifest.read_text() + " ")
    elif change == "nonsense":
        manifest.write_text("[]")
    else:
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "job_id": "job-unknown"}))
    assert folders.copy_of(client, copy) is None
    assert folders.reference(client, str(copy)) == str(copy), "for the service to judge"


def test_only_an_untouched_copy_is_replaced(
    client: Client, artifact: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders.check_free(client, copy)
    folders.copy_out(artifact, copy)
    assert folders.copy_of(client, copy) == artifact
    assert [path.name for path in copy.parent.iterdir()] == ["copy"], "nothing is left beside it"
    (copy / "mine.txt").write_text("mine")
    assert "exists already" in refused(lambda: folders.check_free(client, copy), capsys)
    empty = copy.with_name("empty")
    empty.mkdir()
    folders.check_free(client, empty)
    folders.check_free(client, copy.with_name("new"))
    link = copy.with_name("link")
    os.symlink(empty, link)
    assert "exists already" in refused(lambda: folders.check_free(client, link), capsys)


def test_the_data_directory_is_no_place_for_copies(
    client: Client, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    target = settings.data_dir / "outputs" / "x"
    assert "the service's own" in refused(lambda: folders.check_free(client, target), capsys)


def test_what_a_service_of_ours_may_read(
    client: Client, artifact: str, settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inside = settings.data_dir / "artifacts" / artifact
    assert folders.readable([inside, tmp_path, None]) == [tmp_path]
    assert "there is nothing at" in refused(lambda: folders.readable([tmp_path / "gone"]), capsys)


def test_outputs_becomes_a_link_unless_it_is_something_else(
    client: Client, settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        folders.link_outputs(tmp_path)
        assert (tmp_path / "outputs").resolve() == settings.data_dir / "outputs"
    assert capsys.readouterr().err == ""
    other = tmp_path / "other"
    (other / "outputs").mkdir(parents=True)
    folders.link_outputs(other)
    assert not (other / "outputs").is_symlink()
    assert "is something else" in capsys.readouterr().err


def test_a_name_for_the_registry(tmp_path: Path) -> None:
    for folder, name in (("my model!", "my-model-"), ("._x", "x"), ("m" * 80, "m" * 63), ("模型", "imported")):
        assert folders.name_of(tmp_path / folder) == name
