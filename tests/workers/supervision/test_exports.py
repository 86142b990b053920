"""An export from the request to the artifact, by a real runner; one that cannot be held leaves nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from safetensors.torch import load_file, save_file

from app.discovery import discover
from app.settings import Settings
from tests.workers.conftest import make_model
from tests.workers.supervision.conftest import claim
from workers.supervisor import House

Export = Callable[..., dict[str, Any]]


@pytest.fixture
def export(house: House, settings: Settings, api: TestClient) -> Export:
    """``export(folder, **fields)``: the job, once its attempt is over."""
    object.__setattr__(house, "settings", settings)
    object.__setattr__(house, "catalog", discover(settings.packages))

    def export(folder: Path, **fields: Any) -> dict[str, Any]:
        answer = api.post("/jobs", json={"type": "export", "model": str(folder), **fields})
        assert answer.status_code == 201, answer.text
        claim(house).end(120)
        job: dict[str, Any] = api.get(f"/jobs/{answer.json()['id']}").json()
        return job

    return export


def test_the_file_is_an_artifact_with_a_history(export: Export, api: TestClient, house: House, models: Path) -> None:
    base = make_model(models / "small")
    job = export(base, output_name="small_q8", outtype="q8_0")
    assert job["status"] == "succeeded", job["error"]
    (artifact,) = api.get("/artifacts?kind=gguf").json()["data"]
    assert (artifact["name"], artifact["version"], artifact["id"]) == ("small_q8", 1, job["artifact_ids"][0])
    files = {row["path"]: row["sha256"] for row in api.get(f"/artifacts/{artifact['id']}/files").json()["data"]}
    certificate = api.get(f"/artifacts/{artifact['id']}/certificate").json()
    assert files["small_q8-q8_0.gguf"] == certificate["sha256"] == job["result"]["certificate"]["sha256"]
    link = house.storage.root / "models" / "gguf" / "small_q8_v1"
    assert link.resolve() == house.storage.artifact_dir(artifact["id"]).resolve()
    edges = {
        (edge["source"], edge["target"]) for edge in api.get(f"/artifacts/{artifact['id']}/lineage").json()["edges"]
    }
    assert edges == {(str(base), job["id"]), (job["id"], artifact["id"])}
    assert "| matrices | q8_0 |" in api.get(f"/artifacts/{artifact['id']}/card").text


def test_what_cannot_be_held_is_a_failed_job_without_an_artifact(
    export: Export, api: TestClient, house: House, models: Path
) -> None:
    base = make_model(models / "large-numbers")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = 1e6
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    job = export(base)
    assert (job["status"], job["error"]["code"], job["error"]["param"]) == ("failed", "non_finite_weights", "outtype")
    assert "bf16" in job["error"]["hint"]
    assert api.get("/artifacts").json()["data"] == []
    assert not list((house.storage.root / "artifacts").glob("*"))
