"""Several engines for one deployment: rows alone, with what a worker would say of each."""

import pytest
from fastapi.testclient import TestClient

from app.db import Database
from app.deployments import replicas
from app.errors import Unavailable
from app.models import Deployment, Job
from app.reconciler import reap
from app.states import DeploymentState
from tests.app.deployments.stage import Stage

QUEUED, STARTING, READY, UNHEALTHY, SLEEPING, STOPPED, FAILED = DeploymentState


def test_requests_go_to_all_that_answer(stage: Stage, model: str) -> None:
    shown = stage.create(model, replicas=3)
    assert len(shown["replicas"]) == 3
    with pytest.raises(Unavailable):
        stage.route()
    one, two = stage.start(2)
    assert stage.shown()["status"] == "ready"
    assert stage.route() == {one, two}
    (third,) = stage.start()
    assert stage.route() == {one, two, third}
    stage.say(one, UNHEALTHY)
    assert stage.route() == {two, third}, "it missed a probe"
    stage.say(two, QUEUED, restarts=1, socket=None, last_error={"code": "engine_died", "message": "m"})
    assert stage.route() == {third}
    stage.say(third, UNHEALTHY)
    assert stage.route() == {one, third}, "while none is well, those that may answer are asked"
    stage.say(third, READY)
    shown = stage.shown()
    assert (shown["status"], shown["restarts"], shown["last_error"]["code"]) == ("ready", 1, "engine_died")


def test_one_that_gives_up_leaves_the_others(stage: Stage, model: str) -> None:
    stage.create(model, replicas=2)
    one, two = stage.start(2)
    detail = {"code": "engine_crash_loop", "message": "it died 5 times", "hint": None}
    stage.say(one, FAILED, last_error=detail)
    assert (stage.shown()["status"], stage.route()) == ("ready", {two})
    stage.say(two, FAILED, last_error=detail)
    assert (stage.shown()["status"], stage.shown()["last_error"]) == ("failed", detail)


def test_a_worker_that_falls_silent_takes_its_own_one_along(stage: Stage, model: str, database: Database) -> None:
    stage.create(model, replicas=2)
    one, two = stage.start(2)
    with database.write() as session:
        assert reap(session, session.get_one(Job, one))
    assert (stage.shown()["status"], stage.route()) == ("ready", {two})
    assert stage.states()[one] == "queued"


def test_all_are_stopped_together(stage: Stage, model: str, api: TestClient) -> None:
    stage.create(model, replicas=3)
    one, two = stage.start(2)
    assert api.delete(f"/deployments/{stage.id}").status_code == 200
    assert sorted(stage.states().values()) == ["ready", "ready", "stopped"]
    stage.end(one)
    assert stage.shown()["status"] == "ready"
    stage.end(two)
    assert stage.shown()["status"] == "stopped"


def test_each_sleeps_by_itself_and_all_wake(stage: Stage, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.create(model, replicas=2, idle_timeout=60)
    one, two = stage.start(2)
    stage.sleep(one)
    assert (stage.shown()["status"], stage.route()) == ("ready", {two})
    assert stage.states()[one] == "queued", "a use wakes the other one too"
    stage.sleep(two)
    assert stage.shown()["status"] == "queued"
    with pytest.raises(Unavailable):
        stage.route()
    assert set(stage.states().values()) == {"queued"}


def test_a_use_that_was_noted_meanwhile_keeps_it_awake(stage: Stage, model: str, database: Database) -> None:
    stage.create(model, idle_timeout=60)
    (one,) = stage.start()
    stage.route()
    with database.write() as session:
        assert not replicas.move(session, one, SLEEPING, only_from=[READY], unused_since=None)
        used = session.get_one(Deployment, stage.id).used_at
        assert replicas.move(session, one, SLEEPING, only_from=[READY], unused_since=used)


def test_gpus_of_one_replica(stage: Stage, model: str) -> None:
    stage.create(model, tensor_parallel_size=2)
    assert [stage.job(one).gpus for one in stage.engines(1)] == [2]


def test_more_and_fewer(stage: Stage, model: str) -> None:
    stage.create(model)
    (one,) = stage.start()
    shown = stage.patch(replicas=3)
    assert (len(shown["replicas"]), shown["coming"], shown["options"]["replicas"]) == (3, None, 3)
    (two,) = stage.start()
    assert stage.route() == {one, two}
    stage.patch(replicas=1)
    assert stage.route() == {one}, "the youngest go first"
    assert sorted(stage.states().values()) == ["ready", "ready", "stopped"], "the one that waited went at once"
    assert stage.job(two).cancel_requested_at is None, "its own worker ends it when it has answered what it was asked"
    assert stage.patch(replicas=1) == stage.shown(), "nothing is to be done"
