"""A run made again from its record leaves the same bytes; if it does not, the job says which files differ."""

import json
from collections.abc import Callable

import pytest
from fastapi.testclient import TestClient

from app.models import Job
from app.storage import MANIFEST, Storage
from tests.workers.supervision.conftest import Attempt, claim
from workers.supervisor import House


@pytest.mark.timeout(300)
def test_an_artifact_is_made_again_byte_for_byte(
    run_all: Callable[..., list[Attempt]], api: TestClient, house: House, storage: Storage
) -> None:
    (first,) = run_all("sft", {"max_steps": 3, "learning_rate": 1e-2})
    [artifact] = first.row().result["artifact_ids"]

    def again() -> Job:
        answer = api.post(f"/artifacts/{artifact}/reproduce")
        assert answer.status_code == 201, answer.text
        with house.database.write() as session:
            session.execute(Job.__table__.update().values(slot_class="light", next_class=None))
        job = claim(house).end(120)
        assert job.state == "succeeded", job.error_detail
        return job

    job = again()
    assert job.result["reproduced"] == {"artifact_id": artifact, "same": True, "differing": []}
    assert job.result["versions"]["torch"]
    assert api.get(f"/artifacts/{job.result['artifact_ids'][0]}").json()["version"] == 2

    # Had the first one been made of other bytes, it would be said.
    path = storage.artifact_dir(artifact) / MANIFEST
    manifest = json.loads(path.read_bytes())
    manifest["files"]["adapter_model.safetensors"]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    found = again().result["reproduced"]
    assert (found["same"], found["differing"]) == (False, ["adapter_model.safetensors"])
