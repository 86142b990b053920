"""How the engines of a deployment are replaced: rows alone, with what a worker would say of each."""

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from app.db import Database
from app.deployments import loaded, replicas
from app.errors import Unavailable
from app.models import Deployment, Job, JobEvent
from app.reconciler import reap
from app.states import AdapterState, DeploymentState
from tests.app.deployments.stage import PROJECT, Stage
from tests.support import on_sqlite

QUEUED, STARTING, READY, UNHEALTHY, SLEEPING, STOPPED, FAILED = DeploymentState


@pytest.fixture
def crowded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.deployments.rollout.CROWDED_SECONDS", 0.0)


# Replaced


def test_new_ones_take_over_in_one_step(stage: Stage, model: str, other: str) -> None:
    stage.create(model, replicas=2)
    old = stage.start(2)
    shown = stage.patch(model=other)
    assert (shown["model"], shown["generation"]) == (model, 1), "until then nothing changes"
    assert (shown["coming"]["model"], shown["coming"]["options"]["replicas"]) == (other, 2)
    stage.tick()
    (first,) = stage.start()
    stage.tick()
    assert stage.route() == set(old), "not before all of them answer"
    (second,) = stage.start()
    stage.tick()
    shown = stage.shown()
    assert (shown["status"], shown["model"], shown["generation"], shown["coming"]) == ("ready", other, 2, None)
    assert stage.route() == {first, second}
    assert {one["id"]: one["retiring"] for one in shown["replicas"]} == {
        **dict.fromkeys(old, True),
        **dict.fromkeys((first, second), False),
    }
    with stage.database.read() as session:
        events = session.scalars(select(JobEvent.code).where(JobEvent.job_id == first)).all()
    assert "took_over" in events


def test_a_new_one_that_fails_leaves_all_as_it_was(stage: Stage, model: str, other: str) -> None:
    stage.create(model)
    (old,) = stage.start()
    stage.patch(model=other, max_model_len=64)
    new = stage.claim()
    stage.say(new, FAILED, last_error={"code": "start_timeout", "message": "it was not ready", "hint": "Wait."})
    stage.tick()
    shown = stage.shown()
    assert (shown["status"], shown["model"], shown["generation"], shown["coming"]) == ("ready", model, 1, None)
    assert shown["options"]["max_model_len"] is None
    assert shown["last_error"]["code"] == "start_timeout"
    assert shown["last_error"]["message"].endswith("is still served: it was not ready")
    assert stage.route() == {old}
    stage.patch(model=other)
    assert stage.engines(1) == [old]
    assert len(stage.engines(3)) == 1, "the next try has a number of its own"
    (again,) = stage.start()
    stage.tick()
    assert stage.route() == {again}


def test_another_change_of_mind_replaces_what_was_coming(stage: Stage, model: str, other: str) -> None:
    stage.create(model)
    (old,) = stage.start()
    stage.patch(model=other)
    first = stage.claim()
    shown = stage.patch(max_model_len=64)
    assert (shown["coming"]["model"], shown["coming"]["options"]["max_model_len"]) == (other, 64), "both are wanted"
    assert stage.job(first).cancel_requested_at is not None
    stage.say(first, READY, socket="/run/first")
    stage.tick()
    assert stage.route() == {old}, "the one that was given up does not take over"
    (second,) = stage.start()
    stage.tick()
    assert stage.route() == {second}


def test_what_does_not_serve_is_replaced_at_once(stage: Stage, model: str, other: str) -> None:
    stage.create(model, idle_timeout=60)
    stage.patch(model=other)
    stage.tick()
    shown = stage.shown()
    assert (shown["status"], shown["model"], len(shown["replicas"])) == ("queued", other, 1)


@pytest.mark.parametrize("why", ["asleep", "restarting"])
def test_what_served_stays_until_the_new_one_can(stage: Stage, model: str, other: str, why: str) -> None:
    """One that sleeps, or has just died, comes back; a new one that fails must not end it."""
    stage.create(model, idle_timeout=60)
    (old,) = stage.start()
    if why == "asleep":
        stage.sleep(old)
    else:
        stage.say(old, QUEUED, socket=None, restarts=1)
    before = stage.shown()["status"]
    stage.patch(model=other)
    stage.tick()
    (new,) = stage.engines(2)
    stage.say(new, STARTING)
    stage.tick()
    stage.say(new, FAILED, last_error={"code": "engine_crash_loop", "message": "it died", "hint": None})
    stage.tick()
    shown = stage.shown()
    assert (shown["status"], shown["model"], shown["coming"]) == (before, model, None)
    assert shown["last_error"]["code"] == "engine_crash_loop"
    stage.patch(model=other)
    (again,) = stage.engines(3)
    stage.say(again, STARTING)
    stage.say(again, READY, socket="/run/again")
    stage.tick()
    assert stage.route() == {again}
    if why == "restarting":
        stage.end(old)
    assert (stage.shown()["model"], stage.states()[old]) == (other, "stopped")


def test_without_a_slot_beside_them_the_old_ones_make_room(
    stage: Stage, model: str, other: str, crowded: None, database: Database
) -> None:
    stage.create(model, replicas=2)
    one, two = stage.start(2)
    stage.patch(model=other)
    stage.tick()
    assert stage.route() == {one}, "one of two goes"
    stage.tick()
    assert stage.route() == {one}, "the last one stays"
    (first,) = stage.start()
    stage.tick()
    assert stage.route() == {first}
    assert {entry["id"] for entry in stage.shown()["replicas"] if entry["retiring"]} == {one, two}
    (second,) = stage.start()
    assert stage.route() == {first, second}


def test_old_ones_that_made_room_in_vain_get_successors(
    stage: Stage, model: str, other: str, crowded: None, database: Database
) -> None:
    stage.create(model, replicas=3)
    old = set(stage.start(3))
    stage.patch(model=other)
    stage.tick()
    left = stage.route()
    assert len(left & old) == 2, "one made room"
    new = stage.claim()
    stage.say(new, FAILED, last_error={"code": "engine_crash_loop", "message": "it died", "hint": None})
    stage.tick()
    shown = stage.shown()
    assert (shown["model"], shown["coming"], shown["last_error"]["code"]) == (model, None, "engine_crash_loop")
    (third,) = stage.start()
    assert stage.route() == left | {third}, "as many as before"


def test_the_same_number_again_replaces_one_that_gave_up(stage: Stage, model: str) -> None:
    stage.create(model, replicas=2)
    one, two = stage.start(2)
    stage.say(two, FAILED, last_error={"code": "engine_crash_loop", "message": "it died", "hint": None})
    stage.patch(max_model_len=None)
    assert len(stage.engines(1)) == 1, "nothing was asked for"
    stage.patch(replicas=2)
    (again,) = stage.start()
    assert stage.route() == {one, again}


def test_a_replacement_that_finds_no_slot_is_given_up(
    stage: Stage, model: str, other: str, crowded: None, database: Database
) -> None:
    stage.create(model, start_timeout=10)
    (old,) = stage.start()
    stage.patch(model=other)
    stage.tick()
    assert stage.shown()["coming"]
    with database.write() as session:
        row = session.get_one(Deployment, stage.id)
        assert row.coming is not None
        since = datetime.fromisoformat(row.coming["since"]) - timedelta(seconds=11)
        row.coming = {**row.coming, "since": since.isoformat()}
    stage.tick()
    shown = stage.shown()
    assert (shown["coming"], shown["last_error"]["code"]) == (None, "no_capacity")
    assert (stage.route(), shown["status"]) == ({old}, "ready")
    assert "stopped" in stage.states().values()


@pytest.mark.parametrize(("count", "ended"), [(1, 1), (2, 2), (2, 1)])
@pytest.mark.parametrize("claimed", [False, True])
def test_new_ones_that_somebody_ended_are_told_of_at_once(
    stage: Stage, model: str, other: str, count: int, ended: int, claimed: bool
) -> None:
    """Not after ``start_timeout``, and not as if there had been no slot."""
    stage.create(model, replicas=count)
    old = stage.start(count)
    stage.patch(model=other)
    new = stage.engines(2)
    for one in [stage.claim() for _ in range(ended)] if claimed else new[:ended]:
        stage.cancel(one)
    stage.tick()
    stage.tick()  # what was found to be over in the first
    shown = stage.shown()
    assert (shown["coming"], shown["status"], shown["model"], shown["generation"]) == (None, "ready", model, 1)
    error = shown["last_error"]
    assert error["code"] == "killed"
    assert f"{ended} of {count} new engines ended before they could take over" in error["message"]
    assert "PATCH the deployment again" in error["hint"]
    assert stage.route() == set(old)
    states = stage.states()
    assert {states[one] for one in new} == {"stopped"}, "none is left that would serve nobody"
    stage.patch(model=other)
    again = stage.start(count)
    stage.tick()
    assert stage.route() == set(again), "the next try goes through"


def test_new_ones_that_somebody_ended_do_not_take_over_from_one_that_is_down(
    stage: Stage, model: str, other: str
) -> None:
    stage.create(model)
    (old,) = stage.start()
    stage.patch(model=other)
    stage.cancel(*stage.engines(2))
    stage.say(old, QUEUED, socket=None, restarts=1)
    stage.tick()
    stage.tick()
    shown = stage.shown()
    assert (shown["coming"], shown["status"], shown["model"]) == (None, "queued", model)
    assert shown["last_error"]["code"] == "killed"


def test_what_retires_and_dies_is_not_started_again(stage: Stage, model: str, other: str, database: Database) -> None:
    stage.create(model)
    (old,) = stage.start()
    stage.patch(model=other)
    stage.start()
    stage.tick()
    with database.write() as session:
        assert reap(session, session.get_one(Job, old))
    stage.tick()
    assert (stage.states()[old], stage.job(old).state) == ("stopped", "cancelled")


def test_one_without_a_proof_does_not_take_over(stage: Stage, model: str, other: str, database: Database) -> None:
    stage.create(model)
    (old,) = stage.start()
    stage.patch(model=other, parity="required")
    (new,) = stage.start()
    stage.tick()
    assert stage.route() == {old}
    with database.write() as session:
        replicas.certify(session, new, {"verdict": "same"})
    stage.tick()
    assert stage.route() == {new}
    assert stage.shown()["parity"] == {"verdict": "same"}


def test_adapters_come_along(
    stage: Stage, base: str, adapter: Callable[..., str], ready: Any, database: Database, api: TestClient
) -> None:
    stage.create(base, adapters=[{"adapter": adapter("tone")}])
    ready(stage.id, "tone")
    (old,) = stage.engines(1)
    answer = stage.patch(409, hot_load=False)
    assert "tone" in answer["error"]["message"]
    stage.patch(max_model_len=64)
    (new,) = stage.start()
    stage.tick()
    assert stage.route() == {old}, "the new one has no adapter yet"
    with database.write() as session:
        replicas.has_loaded(session, new, "tone", stage.shown()["adapters"][0]["adapter"])
    stage.tick()
    assert stage.route() == {new}
    route = stage.router.route_for("tone", PROJECT)
    assert [target.id for target in route.targets] == [new]


def test_adapters_of_another_base_are_in_the_way(
    stage: Stage, base: str, adapter: Callable[..., str], other: str
) -> None:
    stage.create(base, adapters=[{"adapter": adapter("tone")}])
    error = stage.patch(409, model=other)["error"]
    assert (error["param"], "tone" in error["message"]) == ("model", True)
    assert f"/deployments/{stage.id}/adapters" in error["hint"]


def test_an_adapter_is_reached_where_it_is_loaded(
    stage: Stage, base: str, adapter: Callable[..., str], ready: Any, database: Database
) -> None:
    stage.create(base, replicas=2, adapters=[{"adapter": adapter("tone")}])
    one, two = stage.start(2)
    with pytest.raises(Unavailable):
        stage.router.route_for("tone", PROJECT)
    pinned = stage.shown()["adapters"][0]["adapter"]
    with database.write() as session:
        replicas.has_loaded(session, two, "tone", pinned)
        (row,) = loaded.of(session, [stage.id])[stage.id]
        assert loaded.move(session, row, AdapterState.READY)
    assert [target.id for target in stage.router.route_for("tone", PROJECT).targets] == [two]
    stage.say(two, QUEUED, socket=None)
    assert stage.shown()["adapters"][0]["status"] == "waiting", "nobody has it any more"


# Refused


@on_sqlite
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"replicas": 0}, "replicas"),
        ({"replicas": 17}, "replicas"),
        ({"replicas": None}, "replicas"),
        ({"name": "another"}, "name"),
        ({"model": "/nowhere"}, "model"),
        ({"engine": "unheard_of"}, "engine"),
        ({"tensor_parallel_size": 9}, "tensor_parallel_size"),
    ],
)
def test_what_cannot_be_changed(stage: Stage, model: str, body: dict[str, Any], param: str) -> None:
    stage.create(model)
    answer = stage.api.patch(f"/deployments/{stage.id}", json=body)
    assert answer.status_code in (400, 404, 422), answer.text
    assert answer.json()["error"]["param"] == param
    assert stage.shown()["coming"] is None


@on_sqlite
def test_one_that_is_over_is_not_changed(stage: Stage, model: str, api: TestClient) -> None:
    stage.create(model)
    api.delete(f"/deployments/{stage.id}")
    assert stage.patch(409, replicas=2)["error"]["code"] == "wrong_state"
    assert api.patch("/deployments/dep-unknown", json={"replicas": 2}).status_code == 404


def test_what_is_to_come_is_in_use(stage: Stage, base: str, model: str, api: TestClient, database: Database) -> None:
    stage.create(model)
    stage.start()
    stage.patch(model=base)
    answer = api.delete(f"/artifacts/{base.removeprefix('artifact:')}")
    assert answer.status_code == 409
    assert "support" in answer.json()["error"]["message"]
