"""Artifacts in the registry: files, tags, deletion, lineage, card, and the order to make one again."""

import json
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.artifacts import repository as artifacts
from app.db import Database
from app.models import Artifact, Deployment, Job, new_id
from app.settings import Settings
from app.storage import Storage
from tests.app.artifacts.conftest import Left
from tests.support import on_sqlite


def error_of(answer: Any) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


@on_sqlite
def test_files_are_those_of_the_manifest_and_no_others(api: TestClient, left: Left, storage: Storage) -> None:
    artifact = left("support")
    listed = {entry["path"]: entry for entry in api.get(f"/artifacts/{artifact}/files").json()["data"]}
    assert set(listed) == {"adapter_config.json", "adapter_model.safetensors"}
    answer = api.get(f"/artifacts/{artifact}/files/adapter_config.json")
    assert answer.content == (storage.artifact_dir(artifact) / "adapter_config.json").read_bytes()
    assert len(answer.content) == listed["adapter_config.json"]["bytes"]
    part = api.get(f"/artifacts/{artifact}/files/adapter_config.json", headers={"range": "bytes=0-3"})
    assert (part.status_code, part.content) == (206, answer.content[:4])
    assert json.loads(api.get(f"/artifacts/{artifact}/files/MANIFEST.json").content)["files"].keys() == listed.keys()
    (storage.artifact_dir(artifact) / "unlisted.txt").write_text("secret")
    for path in ("unlisted.txt", "../../api_key", "%2e%2e/%2e%2e/api_key", "adapter_config.json/", ""):
        assert api.get(f"/artifacts/{artifact}/files/{path}").status_code == 404, path


@on_sqlite
def test_the_certificate_of_a_merge(api: TestClient, left: Left, storage: Storage) -> None:
    artifact = left("support", "model")
    none = api.get(f"/artifacts/{artifact}/certificate")
    assert error_of(none) == (404, "not_found")
    assert "merge" in none.json()["error"]["hint"]
    (storage.artifact_dir(artifact) / "certificate.json").write_text('{"verdict": "passed", "retained": 0.99}')
    assert api.get(f"/artifacts/{artifact}/certificate").json() == {"verdict": "passed", "retained": 0.99}
    assert api.get("/artifacts/art-000000000000000000000000/certificate").status_code == 404


@on_sqlite
def test_files_that_were_lost_are_said_so(api: TestClient, left: Left, storage: Storage) -> None:
    artifact = left("support")
    (storage.artifact_dir(artifact) / "MANIFEST.json").unlink()
    answer = api.get(f"/artifacts/{artifact}/files")
    assert answer.status_code == 404
    assert "backup" in answer.json()["error"]["hint"]


def test_tags_are_set_as_a_whole_and_found(api: TestClient, left: Left) -> None:
    first, second = left("support"), left("sales")
    answer = api.patch(f"/artifacts/{first}", json={"tags": ["reviewed", "german", "reviewed"]})
    assert answer.json()["tags"] == ["german", "reviewed"]
    assert [row["id"] for row in api.get("/artifacts", params={"tag": "german"}).json()["data"]] == [first]
    api.patch(f"/artifacts/{first}", json={"tags": []})
    assert api.get("/artifacts", params={"tag": "german"}).json()["data"] == []
    assert error_of(api.patch(f"/artifacts/{second}", json={"tags": ["-x"]})) == (400, "invalid_value")
    assert error_of(api.patch(f"/artifacts/{second}", json={"name": "other"}))[0] == 400


def test_a_deleted_artifact_is_gone_with_its_bytes_and_its_version_is_never_given_again(
    api: TestClient, left: Left, storage: Storage, settings: Settings
) -> None:
    artifact = left("support")
    link = settings.data_dir / "models" / "adapters" / "support_v1"
    assert link.is_symlink()
    api.patch(f"/artifacts/{artifact}", json={"tags": ["reviewed"]})
    assert api.delete(f"/artifacts/{artifact}").json() == {"id": artifact, "object": "artifact", "deleted": True}
    assert not storage.artifact_dir(artifact).exists()
    assert not link.is_symlink()
    answer = api.get(f"/artifacts/{artifact}")
    assert answer.status_code == 404
    assert "was deleted on" in answer.json()["error"]["message"]
    assert api.delete(f"/artifacts/{artifact}").status_code == 404
    assert api.get(f"/artifacts/{left('support')}").json()["version"] == 2


@pytest.mark.parametrize("user", ["alias", "adapter", "job", "follow_up", "deployment", "reproduction"])
def test_what_is_in_use_is_not_deleted(
    api: TestClient,
    left: Left,
    spec: dict[str, Any],
    database: Database,
    storage: Storage,
    user: str,
) -> None:
    base = left("base", "model")
    artifact = left("support")
    started = {**spec, "model": {"model_name_or_path": f"artifact:{base}"}}
    wanted, needed = artifact, ""
    if user == "alias":
        api.put("/aliases/prod", json={"artifact": "support"})
        needed = "alias prod"
    elif user == "adapter":
        wanted, needed = base, left("on_top", "adapter", started)
    elif user == "job":
        wanted, needed = base, api.post("/jobs", json=started).json()["id"]
    elif user == "follow_up":
        with database.read() as session:
            parent = session.query(Job).filter(Job.type == "train").order_by(Job.created_at.desc()).first()
            assert parent is not None
        needed = api.post("/jobs", json={"type": "check_adapter", "adapter": f"job:{parent.id}"}).json()["id"]
    elif user == "reproduction":
        needed = api.post(f"/artifacts/{artifact}/reproduce").json()["id"]
    else:
        wanted, needed = base, "deployment chat"
        with database.write() as session:
            session.add(
                Deployment(
                    id=new_id("dep"),
                    project_id="proj-default",
                    name="chat",
                    model="base",
                    artifact_id=base,
                    status="ready",
                )
            )
    answer = api.delete(f"/artifacts/{wanted}")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (409, "in_use"), answer.text
    assert needed in error["message"]
    assert answer.headers["x-should-retry"] == "false"
    assert storage.verify(wanted) == []


@on_sqlite
def test_bytes_that_cannot_be_deleted_now_are_left_to_the_collector(
    api: TestClient, left: Left, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = left("support")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("the disk is read-only")

    monkeypatch.setattr(os, "unlink", refuse)
    assert api.delete(f"/artifacts/{artifact}").status_code == 200
    monkeypatch.undo()
    assert api.get(f"/artifacts/{artifact}").status_code == 404
    assert storage.artifact_dir(artifact).exists()


def test_lineage_goes_back_to_the_data_and_on_to_what_was_made(
    api: TestClient, left: Left, spec: dict[str, Any], models: Path, file_id: str
) -> None:
    base = left("base", "model")
    started = {**spec, "model": {"model_name_or_path": f"artifact:{base}"}}
    adapter = left("support", "adapter", started)
    merged = left("support_merged", "model", {"type": "merge", "adapter": f"artifact:{adapter}", "output_name": "m"})
    graph = api.get(f"/artifacts/{adapter}/lineage").json()
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert graph["complete"]
    assert {base, adapter, merged, file_id, str(models / "tiny")} <= nodes.keys()
    assert nodes[file_id]["facts"]["rows"] == 1
    assert len(nodes[file_id]["facts"]["sha256"]) == 64
    jobs = {node["facts"]["type"]: node for node in graph["nodes"] if node["type"] == "job"}
    assert jobs.keys() == {"train", "merge"}
    assert jobs["train"]["facts"]["seed"] == 42
    assert jobs["train"]["facts"]["versions"] == {"torch": "2.13.0"}
    edges = {(edge["source"], edge["target"]): edge["role"] for edge in graph["edges"]}
    [made_by] = [source for source, target in edges if target == adapter]
    assert edges[base, made_by] == "model.model_name_or_path"
    assert edges[file_id, made_by] == "dataset.file"
    assert edges[adapter, jobs["merge"]["id"]] == "adapter"
    assert edges[jobs["merge"]["id"], merged] == "output"
    up = {node["id"] for node in api.get(f"/artifacts/{adapter}/lineage", params={"direction": "up"}).json()["nodes"]}
    assert base in up
    assert merged not in up
    down = {n["id"] for n in api.get(f"/artifacts/{adapter}/lineage", params={"direction": "down"}).json()["nodes"]}
    assert merged in down
    assert base not in down


@pytest.mark.parametrize("by", ["artifact", "job"])
def test_what_was_deleted_stays_in_the_lineage(
    api: TestClient, left: Left, spec: dict[str, Any], models: Path, file_id: str, by: str
) -> None:
    """A chain that was queued in one go names its links as ``job:``, and that is what its specs keep."""
    base = left("base", "model")
    train = api.post("/jobs", json={**spec, "model": {"model_name_or_path": f"artifact:{base}"}}).json()["id"]
    adapter = left.finish(train, "support", "adapter") if by == "artifact" else None
    wanted = f"artifact:{adapter}" if adapter else f"job:{train}"
    merge = api.post("/jobs", json={"type": "merge", "adapter": wanted, "output_name": "m"}).json()
    assert merge["resolved_spec"]["adapter"] == wanted
    adapter = adapter or left.finish(train, "support", "adapter")
    merged = left.finish(merge["id"], "support_merged", "model")
    assert api.delete(f"/artifacts/{adapter}").status_code == 200

    graph = api.get(f"/artifacts/{merged}/lineage", params={"direction": "up"}).json()
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert {merged, merge["id"], adapter, train, base, file_id, str(models / "tiny")} <= nodes.keys()
    assert nodes[adapter]["deleted"]
    assert (nodes[adapter]["name"], nodes[adapter]["facts"]["kind"]) == ("support:v1", "adapter")
    edges = {(edge["source"], edge["target"]) for edge in graph["edges"]}
    assert {(base, train), (train, adapter), (adapter, merge["id"]), (merge["id"], merged)} <= edges
    for above in (adapter, base):
        graph = api.get(f"/artifacts/{above}/lineage", params={"direction": "down"}).json()
        assert {adapter, merge["id"], merged} <= {node["id"] for node in graph["nodes"]}
        assert (adapter, merge["id"]) in {(edge["source"], edge["target"]) for edge in graph["edges"]}
    assert api.get("/artifacts/art-0/lineage").status_code == 404


@on_sqlite
def test_what_a_job_left_is_the_last_thing_also_when_that_is_gone(
    api: TestClient, left: Left, spec: dict[str, Any], database: Database
) -> None:
    """A job that left two, of which the one that was used is deleted: the other does not take its place."""
    train = api.post("/jobs", json=spec).json()["id"]
    merge = api.post("/jobs", json={"type": "merge", "adapter": f"job:{train}", "output_name": "m"}).json()["id"]
    used = left.finish(train, "support", "adapter")
    with database.write() as session:
        made = session.get_one(Artifact, used).created_at
        more = {"bytes": 1, "sha256": "0" * 64, "created_at": made - timedelta(seconds=1)}
        first = artifacts.add(
            session, session.get_one(Job, train), id=new_id("art"), name="first", kind="adapter", **more
        ).id
    merged = left.finish(merge, "support_merged", "model")
    assert api.delete(f"/artifacts/{used}").status_code == 200
    edges = {(e["source"], e["target"]) for e in api.get(f"/artifacts/{merged}/lineage").json()["edges"]}
    assert (used, merge) in edges
    assert (first, merge) not in edges


@on_sqlite
def test_a_card_says_what_it_is_made_of(api: TestClient, left: Left, models: Path) -> None:
    answer = api.get(f"/artifacts/{left('support')}/card")
    assert answer.headers["content-type"].startswith("text/markdown")
    assert answer.text.startswith("---\nlibrary_name: peft\n")
    for said in (
        "# support",
        "Made from `tiny`, then",
        "| algorithm | sft |",
        "| r | 16 |",
        "1 rows",
        "| verdict | learnt |",
    ):
        assert said in answer.text
    assert str(models) not in answer.text, "a card is read elsewhere"
    assert api.get("/artifacts/art-0/card").status_code == 404


@on_sqlite
@pytest.mark.parametrize(
    ("found", "said", "unsaid"),
    [
        (
            {
                "base": {"name": "org/other", "mismatch_allowed": True, "merged_into": "unquantised"},
                "adapter": {"name": "support", "base": {"name": "org/tiny", "weights": "other"}},
            },
            [
                "| base | org/other |",
                "| another base was allowed | yes: `allow_base_mismatch` |",
                "| adapter was trained on | org/tiny: other weights than the base's |",
            ],
            ["base rounded"],
        ),
        (
            {
                "base": {"name": "org/tiny", "mismatch_allowed": False, "merged_into": "nf4"},
                "adapter": {
                    "combined": [
                        {"name": "tone", "base": {"name": None, "weights": "unknown"}},
                        {"name": "words", "base": {"name": "org/tiny", "weights": "same"}},
                    ]
                },
            },
            [
                "| adapter tone was trained on | not proved: only shapes were compared |",
                "| base rounded first | nf4 |",
            ],
            ["another base", "words"],
        ),
        ({"models": [{}, {}], "base": None}, [], ["another base", "trained on"]),
    ],
)
def test_a_card_of_a_merge_says_which_base_it_took_and_what_was_kept(
    api: TestClient, left: Left, database: Database, found: dict[str, Any], said: list[str], unsaid: list[str]
) -> None:
    adapter = left("support")
    merged = left("m", "model", {"type": "merge", "adapter": f"artifact:{adapter}", "output_name": "m"})
    certificate = {"dtype": "bfloat16", "verdict": "reduced", "retained": 0.8712, **found}
    with database.write() as session:
        job = session.get_one(Job, session.get_one(Artifact, merged).job_id)
        job.result = {**(job.result or {}), "certificate": certificate}
    text = api.get(f"/artifacts/{merged}/card").text
    for line in (
        "| method | lora |",
        "| dtype | bfloat16 |",
        "| verdict | reduced |",
        "| share of the effect that was kept | 87.1% |",
        *said,
    ):
        assert line in text
    assert not [words for words in unsaid if words in text]


def test_making_it_again_asks_for_the_same_run(api: TestClient, left: Left, database: Database) -> None:
    artifact = left("support")
    first = api.get(f"/jobs/{api.get(f'/artifacts/{artifact}').json()['job_id']}").json()
    answer = api.post(f"/artifacts/{artifact}/reproduce")
    assert answer.status_code == 201, answer.text
    job = answer.json()
    assert job["reproduces"] == artifact
    assert job["resolved_spec"] == first["resolved_spec"]
    assert job["id"] != first["id"]
    with database.read() as session:
        shas = {session.get_one(Job, one["id"]).spec_sha256 for one in (first, job)}
    assert len(shas) == 1


@on_sqlite
def test_what_was_not_computed_here_cannot_be_made_again(api: TestClient, left: Left, models: Path) -> None:
    imported = left("base", "model", {"type": "import", "path": str(models / "tiny"), "name": "base"})
    assert error_of(api.post(f"/artifacts/{imported}/reproduce")) == (409, "wrong_state")
    assert api.post("/artifacts/art-0/reproduce").status_code == 404


def test_everything_belongs_to_a_project(api: TestClient, left: Left, make_key: Callable[..., str]) -> None:
    artifact = left("support")
    other = {"authorization": f"Bearer {make_key(project='other')}"}
    for method, path in (
        ("GET", "/files"),
        ("GET", "/files/adapter_config.json"),
        ("GET", "/lineage"),
        ("GET", "/card"),
        ("POST", "/reproduce"),
        ("DELETE", ""),
    ):
        assert api.request(method, f"/artifacts/{artifact}{path}", headers=other).status_code == 404, path
    assert api.patch(f"/artifacts/{artifact}", headers=other, json={"tags": []}).status_code == 404
    reader = {"authorization": f"Bearer {make_key('proj-default', 'read')}"}
    assert api.delete(f"/artifacts/{artifact}", headers=reader).status_code == 403


@on_sqlite
def test_an_import_is_a_job(api: TestClient, models: Path) -> None:
    answer = api.post("/artifacts/import", json={"path": str(models / "tiny"), "name": "base"})
    assert (answer.status_code, answer.json()["type"]) == (201, "import"), answer.text
    assert error_of(api.post("/artifacts/import", json={"path": "/etc", "name": "base"})) == (
        400,
        "model_outside_roots",
    )
    assert error_of(api.post("/artifacts/import", json={"path": str(models / "tiny")})) == (400, "missing_field")
