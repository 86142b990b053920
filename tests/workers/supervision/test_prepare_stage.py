"""Inputs are made ready in a light slot, before the job takes its own: what is kept, checked, said and counted."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from app.db import Database
from app.discovery import discover
from app.jobs import claims
from app.models import Job, JobEvent, Slot, Worker
from app.processes import kill_holders_of_slot
from app.queue import SilentDoorbell
from app.settings import Settings
from app.storage import COMPLETE, Storage
from tests.hub.server import HubServer
from tests.support import train_spec, wait_for
from tests.workers.conftest import TOKEN
from tests.workers.test_hub_inputs import FILES, REPO
from workers.supervisor import House, Supervision


@pytest.fixture
def backend() -> str:
    """The moves themselves are tested on every database; here it is about processes."""
    return "sqlite"


@pytest.fixture
def house(settings: Settings, database: Database, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    monkeypatch.setattr("workers.supervisor._CANCEL_GRACE", 1.0)
    with database.write() as session:
        session.add(Worker(id="w1", host="h", pid=os.getpid()))
        session.flush()
        session.add_all(Slot(worker_id="w1", slot_id=f"{name}-0", slot_class=name) for name in ("light", "train"))
    house = House(
        Narrow.model_validate(settings.model_dump()),
        database,
        storage,
        discover(("tests.plugs",)),
        SilentDoorbell(),
        "w1",
        threading.Event(),
    )
    yield house
    house.stopping.set()
    for slot in ("light-0", "train-0"):
        kill_holders_of_slot(settings.instance, slot)


class Narrow(Settings):
    """Settings with the test plugs alone: the runner then starts in a moment."""

    @property
    def packages(self) -> tuple[str, ...]:
        return ("tests.plugs",)


@pytest.fixture
def submit(api: TestClient, house: House, models: Path, file_id: str) -> Callable[..., Job]:
    def submit(**fields: Any) -> Job:
        body = train_spec(str(models / "tiny"), file_id, algorithm="drill", **fields)
        answer = api.post("/jobs", json=body)
        assert answer.status_code == 201, answer.text
        return row(house, answer.json()["id"])

    return submit


def row(house: House, job_id: str) -> Job:
    with house.database.read() as session:
        return session.get_one(Job, job_id)


def codes(house: House, job_id: str) -> list[str]:
    with house.database.read() as session:
        return list(session.scalars(select(JobEvent.code).where(JobEvent.job_id == job_id).order_by(JobEvent.seq)))


def claim(house: House, slot: str) -> Job | None:
    with house.database.write() as session:
        session.execute(Job.__table__.update().values(not_before=None))
        return claims.claim(session, "w1", f"{slot}-0", [slot])


def work(house: House, slot: str) -> Job:
    """One attempt in a slot."""
    job = claim(house, slot)
    assert job is not None, f"nothing waits for {slot}"
    Supervision(house, job, f"{slot}-0").run()
    return row(house, job.id)


def test_ready_in_a_light_slot_then_run_in_its_own(submit: Callable[..., Job], house: House) -> None:
    job = submit()
    assert (job.slot_class, job.next_class) == ("light", "train")
    assert claim(house, "train") is None, "no slot of its own before the inputs are ready"
    job = work(house, "light")
    assert (job.state, job.slot_class, job.next_class, job.attempt) == ("queued", "train", None, 0)
    assert job.prepared_ref is not None
    folder = house.storage.root / job.prepared_ref
    assert house.storage.checkpoint_faults(folder) == []
    assert claim(house, "light") is None
    job = work(house, "train")
    assert (job.state, job.attempt) == ("succeeded", 1)
    assert job.result is not None
    assert job.result["rows"] == 1
    history = [code for code in codes(house, job.id) if code.startswith(("job_", "inputs"))]
    assert history == ["job_queued", "job_started", "inputs_ready", "job_started", "job_complete"]


@pytest.mark.parametrize("damage", ["changed", "gone", "uncommitted"])
def test_damaged_inputs_are_made_again(damage: str, submit: Callable[..., Job], house: House) -> None:
    submit()
    job = work(house, "light")
    assert job.prepared_ref is not None
    folder = house.storage.root / job.prepared_ref
    if damage == "changed":
        (folder / "rows.txt").write_text("7")
    else:
        (folder / ("rows.txt" if damage == "gone" else COMPLETE)).unlink()
    job = work(house, "train")
    assert (job.state, job.slot_class, job.next_class, job.prepared_ref) == ("queued", "light", "train", None)
    assert job.attempt == 0
    assert "prepared_rejected" in codes(house, job.id)
    assert work(house, "light").slot_class == "train"
    job = work(house, "train")
    assert job.state == "succeeded"
    assert job.result is not None
    assert job.result["rows"] == 1


def test_bad_data_fails_before_any_gpu(submit: Callable[..., Job], house: House) -> None:
    submit(mode="refuse")
    job = work(house, "light")
    assert (job.state, job.error_code) == ("failed", "bad_data")
    assert job.error_detail is not None
    assert job.error_detail["param"] == "dataset.file"


def test_a_crash_while_preparing_is_tried_again_and_counted(submit: Callable[..., Job], house: House) -> None:
    submit(mode="crash", retry={"max_attempts": 2})
    job = work(house, "light")
    assert (job.state, job.slot_class, job.attempt) == ("queued", "light", 1)
    job = work(house, "light")
    assert (job.state, job.error_code) == ("failed", "crashed")


@pytest.mark.parametrize("wish", ["pause", "cancel"])
def test_a_wish_while_it_prepares(
    wish: str, submit: Callable[..., Job], house: House, api: TestClient, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    submit(mode="hang", marker=str(marker))
    job = claim(house, "light")
    assert job is not None
    thread = threading.Thread(target=Supervision(house, job, "light-0").run)
    thread.start()
    wait_for(marker.exists)
    assert api.post(f"/jobs/{job.id}/{wish}").status_code == 202
    thread.join(20)
    assert not thread.is_alive()
    after = row(house, job.id)
    if wish == "cancel":
        assert after.state == "cancelled"
    else:
        assert (after.state, after.slot_class, after.attempt) == ("queued", "light", 0)
        assert after.paused_at is not None


def test_a_retry_makes_its_inputs_anew(submit: Callable[..., Job], house: House, api: TestClient) -> None:
    job = submit(mode="refuse")
    work(house, "light")
    again = row(house, api.post(f"/jobs/{job.id}/retry").json()["id"])
    assert (again.slot_class, again.next_class, again.prepared_ref) == ("light", "train", None)


# --- models of the hub ------------------------------------------------------------------------------------------------


@pytest.fixture
def fetch(api: TestClient, house: House, hub: HubServer, file_id: str) -> Callable[..., Job]:
    """``fetch(**fields)``: a run whose base is on the hub, in a private repository."""
    hub.store.add(REPO, FILES, private=True)

    def fetch(**fields: Any) -> Job:
        body = train_spec(REPO, file_id, algorithm="drill", mode="fetch", **fields)
        answer = api.post("/jobs", json=body)
        assert answer.status_code == 201, answer.text
        return row(house, answer.json()["id"])

    return fetch


def test_a_base_of_the_hub_is_fetched_before_the_run_which_never_sees_the_token(
    fetch: Callable[..., Job], house: House, hub: HubServer, api: TestClient, tmp_path: Path
) -> None:
    job = fetch()
    commit = hub.store.repos[REPO].branches["main"]
    prepared = work(house, "light")
    assert (prepared.state, prepared.slot_class) == ("queued", "train"), prepared.error_detail
    assert prepared.resolved_spec["model"]["model_name_or_path"] == f"hub:{REPO}@{commit}"
    assert {"model_downloading", "model_download_complete", "inputs_ready"} <= set(codes(house, job.id))
    assert prepared.progress is not None
    size = sum(map(len, FILES.values()))
    assert (prepared.progress["step"], prepared.progress["total_steps"]) == (size, size)

    hub.store.forget()
    done = work(house, "train")
    assert (done.state, hub.store.requests) == ("succeeded", []), done.error_detail
    assert done.result is not None
    assert done.result["has_token"] is False
    assert Path(done.result["base"]).parent.parent.parent == tmp_path / "hf" / "hub"
    assert Path(done.result["base"]).name == commit

    (artifact,) = api.get("/artifacts").json()["data"]
    assert artifact["base_chain"] == [f"hub:{REPO}@{commit}", f"drill:{job.id}"]
    nodes = api.get(f"/artifacts/{artifact['id']}/lineage").json()["nodes"]
    assert {"repository": REPO, "commit": commit} in [node["facts"] for node in nodes if node["type"] == "base"]
    kept = b"".join(path.read_bytes() for path in house.storage.root.rglob("*") if path.is_file())
    assert TOKEN.encode() not in kept
    assert FILES["model-00001-of-00002.safetensors"] not in kept, "used where it lies, not copied"

    second = fetch()
    hub.store.forget()
    work(house, "light")
    assert work(house, "train").state == "succeeded"
    assert hub.store.asked("GET", "/(resolve|cdn)/") == []
    assert "model_cached" in codes(house, second.id)


def test_a_hub_that_breaks_off_is_asked_again_by_the_policy(
    fetch: Callable[..., Job], house: House, hub: HubServer
) -> None:
    hub.store.fail("GET", "/cdn/", 500, times=1)
    job = fetch()
    first = work(house, "light")
    assert (first.state, first.slot_class, first.attempt, first.exit_code) == ("queued", "light", 1, 68)
    assert first.delay_seconds == 5
    assert work(house, "light").slot_class == "train"
    assert codes(house, job.id).count("model_unreachable") == 1
    assert work(house, "train").state == "succeeded"


def test_a_pause_ends_a_download_at_once_and_keeps_what_is_whole(
    fetch: Callable[..., Job], house: House, hub: HubServer, api: TestClient
) -> None:
    blobs = hub.store.repos[REPO].commits[hub.store.repos[REPO].branches["main"]]
    large = [blobs[name] for name in FILES if blobs[name].large]
    hub.store.stall("GET", f"/cdn/{large[1].sha256}")
    job = fetch()
    claimed = claim(house, "light")
    assert claimed is not None
    thread = threading.Thread(target=Supervision(house, claimed, "light-0").run)
    thread.start()
    wait_for(lambda: len(hub.store.asked("GET", "/cdn/")) == 2)
    assert api.post(f"/jobs/{job.id}/pause").status_code == 202
    thread.join(8)  # of the ten seconds that a run gets to save itself, which this one has no use for
    assert not thread.is_alive()
    paused = row(house, job.id)
    assert (paused.state, paused.attempt, paused.exit_code) == ("queued", 0, 75)
    hub.store.faults.clear()
    hub.store.forget()
    api.post(f"/jobs/{job.id}/resume")
    assert work(house, "light").slot_class == "train"
    assert hub.store.asked("GET", "/cdn/") == [f"/cdn/{large[1].sha256}"]


def test_what_the_hub_forbids_is_final(fetch: Callable[..., Job], house: House, hub: HubServer) -> None:
    fetch()
    hub.store.repos[REPO].private = False
    hub.store.repos[REPO].gated = True
    job = work(house, "light")
    assert (job.state, job.error_code, job.exit_code) == ("failed", "gated_model", 77)
    assert job.error_detail is not None
    assert job.error_detail["param"] == "model.model_name_or_path"
    assert "HF_TOKEN" in job.error_detail["hint"]


def test_a_base_that_does_not_fit_on_the_disk_waits_for_room(
    fetch: Callable[..., Job], house: House, hub: HubServer
) -> None:
    """A file of the hub that says that it is larger than any disk."""
    job = fetch()
    hub.store.pretended["model-00002-of-00002.safetensors"] = 1 << 60
    held = work(house, "light")
    assert (held.state, held.hold_reason, held.attempt) == ("queued", "disk_full", 0)
    assert hub.store.asked("GET", "/(resolve|cdn)/") == []
    with house.database.read() as session:
        told = session.scalars(select(JobEvent.message).where(JobEvent.job_id == job.id)).all()
    assert any("needs 1152921504.61 GB on the disk of HF_HOME" in message for message in told)
    hub.store.pretended.clear()
    assert work(house, "light").slot_class == "train"
