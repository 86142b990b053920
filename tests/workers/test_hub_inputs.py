"""A model of the hub is fetched once, and the job says which commit it got."""

import json
from pathlib import Path
from typing import Any

import pytest

from app.catalog import Catalog
from workers.context import EVENTS, JobContext
from workers.loading import base_label
from workers.told import patched

FIELD = "model.model_name_or_path"
COMMIT = "8f3c0f2b5c7d4e1a9b6f0d2c3e4a5b6c7d8e9f00"


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """What was asked of the hub, which is on another machine."""
    asked: list[tuple[str, str | None]] = []

    def snapshot_download(repo: str, *, revision: str | None, **_: Any) -> str:
        asked.append((repo, revision))
        folder = tmp_path / "cache" / "models--org--name" / "snapshots" / COMMIT
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return asked


def context(folder: Path, spec: dict[str, Any], field: str) -> JobContext:
    inputs = {field: {"hub": "org/name", "revision": None, "pinned": "hub:org/name"}}
    folder.mkdir()
    return JobContext(folder, {"job_id": "ftjob-1", "spec": spec, "inputs": inputs}, Catalog())


def told(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / EVENTS).read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_the_commit_is_pinned_in_the_resolved_spec(tmp_path: Path, fetched: list[Any]) -> None:
    spec = {"model": {"model_name_or_path": "hub:org/name", "revision": None}}
    ctx = context(tmp_path / "a1", spec, FIELD)
    assert ctx.input(FIELD).name == COMMIT
    assert ctx.input(FIELD).name == COMMIT
    assert fetched == [("org/name", None)]
    (line,) = told(tmp_path / "a1", "resolved")
    assert patched(spec, line)["model"]["model_name_or_path"] == f"hub:org/name@{COMMIT}"


def test_what_the_spec_does_not_name_is_not_added_to_it(tmp_path: Path, fetched: list[Any]) -> None:
    """The base of an adapter is an input too."""
    for number, (spec, field) in enumerate(
        [
            ({"type": "merge", "adapter": "artifact:a", "base_model": None}, "base_model"),
            ({"type": "validate", "model": "artifact:a"}, "base_model"),
            ({"model": {"model_name_or_path": "artifact:a"}}, f"{FIELD}.base"),
        ]
    ):
        folder = tmp_path / f"a{number}"
        context(folder, spec, field).input(field)
        assert told(folder, "resolved") == []


def test_a_commit_is_no_part_of_a_models_name() -> None:
    assert base_label({}, f"hub:org/name@{COMMIT}") == "org/name"
    assert base_label({}, "org/name") == "org/name"
