"""An alias with two targets: who is on which side, and what becomes of it when it is promoted or rolled back."""

import asyncio
import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from app.aliases.traffic import Split, Traffic
from app.db import Database
from app.deployments.service import Route, Router
from app.errors import Code, NotFound, Unavailable
from app.gateway.waking import awake
from app.models import DEFAULT_PROJECT, Deployment, now
from app.settings import Settings
from app.states import DeploymentState
from tests.app.artifacts.conftest import Left
from tests.deployed import add_deployment, engine_of, said
from tests.support import on_sqlite

Serve = Callable[..., str]


@pytest.fixture
def serve(database: Database) -> Serve:
    """``serve(name, artifact_id)``: a deployment that is ready, or of another status."""

    def make(name: str, artifact_id: str, status: str = "ready", project: str = DEFAULT_PROJECT) -> str:
        with database.write() as session:
            row = add_deployment(
                session,
                name,
                status=DeploymentState(status),
                project=project,
                artifact_id=artifact_id,
                socket=f"/run/{name}.sock",
            )
            if status == "sleeping":
                row.options, row.ready_at = {"idle_timeout": 60}, now()
        return name

    return make


@pytest.fixture
def traffic(database: Database, settings: Settings) -> Traffic:
    return Traffic(database, Router(database, settings=settings).route_for)


def put(api: TestClient, artifact: str, canary: str | None = None, percent: float = 10, **more: Any) -> Any:
    body: dict[str, Any] = {"artifact": artifact, **more}
    if canary:
        body["canary"] = {"artifact": canary, "percent": percent}
    return api.put("/aliases/prod", json=body)


def found(traffic: Traffic, alias: str = "prod") -> Split:
    split = traffic.find(alias, DEFAULT_PROJECT)
    assert isinstance(split, Split)
    return split


def names(split: Split, sender: str = "x") -> list[str]:
    return [route.served_name for route in split.routes_for(sender)]


@pytest.mark.parametrize(
    ("canary", "param"),
    [
        ({"artifact": "support:v2", "percent": 0}, "canary.percent"),
        ({"artifact": "support:v2", "percent": 100}, "canary.percent"),
        ({"artifact": "support:v2", "percent": "NaN"}, "canary.percent"),
        ({"artifact": "support:v2"}, "canary.percent"),
        ({"artifact": "nothing:v9", "percent": 10}, "canary.artifact"),
        ({"artifact": "support:v1", "percent": 10}, "canary.artifact"),
        ({"artifact": "support:v2", "percent": 10, "percentage": 3}, "canary.percentage"),
    ],
)
@on_sqlite
def test_what_a_canary_cannot_be(api: TestClient, left: Left, canary: dict[str, Any], param: str) -> None:
    left("support"), left("support")
    answer = api.put("/aliases/prod", json={"artifact": "support:v1", "canary": canary})
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param
    assert api.get("/aliases/prod").status_code == 404


def test_a_canary_is_shown_promoted_and_rolled_back(api: TestClient, left: Left) -> None:
    first, second = left("support"), left("support")
    put(api, "support:v1")
    shown = put(api, "support:v1", "support:v2", note="try it").json()
    assert shown["canary"] == {"artifact_id": second, "version": "support:v2", "percent": 10}
    assert api.get("/aliases").json()["data"][0]["canary"]["percent"] == 10
    assert put(api, "support:v1", "support:v2", 25).json()["canary"]["percent"] == 25
    ended = api.post("/aliases/prod/rollback").json()
    assert (ended["artifact_id"], ended["canary"]) == (first, None)
    put(api, "support:v1", "support:v2", 50)
    promoted = put(api, "support:v2").json()
    assert (promoted["artifact_id"], promoted["canary"]) == (second, None)
    history = [(entry["version"], (entry["canary"] or {}).get("percent")) for entry in promoted["history"]]
    one, two = "support:v1", "support:v2"
    assert history == [(two, None), (one, 50), (one, None), (one, 25), (one, 10), (one, None)]
    assert api.post("/aliases/prod/rollback").json()["artifact_id"] == first
    assert api.post("/aliases/prod/rollback").status_code == 409


@on_sqlite
def test_an_artifact_that_is_a_canary_is_not_deleted(api: TestClient, left: Left) -> None:
    left("support")
    second = left("support")
    put(api, "support:v1", "support:v2")
    answer = api.delete(f"/artifacts/{second}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "in_use")
    put(api, "support:v1")
    assert api.delete(f"/artifacts/{second}").status_code == 200


@on_sqlite
def test_senders_stay_on_their_side_and_the_share_is_right(
    api: TestClient, left: Left, serve: Serve, traffic: Traffic
) -> None:
    serve("v1", left("support")), serve("v2", left("support"))
    put(api, "support:v1", "support:v2", 10)
    ten = found(traffic)
    sides = {f"user-{number}": names(ten, f"user-{number}")[0] for number in range(4000)}
    share = Counter(sides.values())["v2"] / len(sides)
    assert 0.08 < share < 0.12
    assert all(names(ten, user)[0] == side for user, side in sides.items())
    put(api, "support:v1", "support:v2", 30)
    thirty = found(traffic)
    assert all(names(thirty, user)[0] == "v2" for user, side in sides.items() if side == "v2")
    assert names(thirty)[::-1] == names(Split("prod", thirty.canary, thirty.main, 30)) or len(names(thirty)) == 2


@on_sqlite
def test_without_a_canary_that_is_up_all_go_to_the_other(
    api: TestClient, left: Left, serve: Serve, traffic: Traffic
) -> None:
    first, second = left("support"), left("support")
    serve("v1", first), serve("v2", second, "starting")
    put(api, "support:v1", "support:v2", 99)
    assert {tuple(names(found(traffic), str(number))) for number in range(50)} == {("v1",)}


@on_sqlite
def test_until_what_it_was_moved_to_is_up_the_one_before_answers(
    api: TestClient, left: Left, serve: Serve, traffic: Traffic, database: Database
) -> None:
    first, second = left("support"), left("support")
    serve("v1", first)
    put(api, "support:v1")
    put(api, "support:v2")
    assert names(found(traffic)) == ["v1"]
    serve("v2", second, "starting")
    assert names(found(traffic)) == ["v1"]
    with database.write() as session:
        said(session, "dep-v2", DeploymentState.READY, socket="/run/v2.sock")
    assert names(found(traffic)) == ["v2"]


@on_sqlite
def test_after_a_way_back_what_was_left_answers_no_more(
    api: TestClient, left: Left, serve: Serve, traffic: Traffic, database: Database
) -> None:
    first, second = left("support"), left("support")
    serve("v1", first, "starting"), serve("v2", second)
    put(api, "support:v1")
    put(api, "support:v2")
    api.post("/aliases/prod/rollback")
    with pytest.raises(Unavailable, match="not ready"):
        traffic.find("prod", DEFAULT_PROJECT)


def statuses(database: Database) -> dict[str, str]:
    with database.read() as session:
        return {row.name: row.status for row in session.scalars(select(Deployment))}


def becomes(database: Database, name: str, status: str) -> None:
    with database.write() as session:
        session.get_one(Deployment, f"dep-{name}").status = engine_of(session, f"dep-{name}").status = status


def test_where_all_sleep_both_sides_are_woken_and_the_first_answers(
    api: TestClient, left: Left, serve: Serve, traffic: Traffic, database: Database
) -> None:
    for name in ("v1", "v2", "v3"):
        serve(name, left("support"), "sleeping")
    put(api, "support:v1")
    put(api, "support:v2", "support:v3", 50)
    with pytest.raises(Unavailable) as caught:
        traffic.find("prod", DEFAULT_PROJECT)
    assert caught.value.code is Code.MODEL_WAKING
    assert statuses(database) == {"v1": "sleeping", "v2": "queued", "v3": "queued"}, "the one before is not needed"
    for name in ("v2", "v3"):
        becomes(database, name, "starting")
    with pytest.raises(Unavailable) as caught:
        traffic.find("prod", DEFAULT_PROJECT)
    assert caught.value.code is Code.MODEL_WAKING
    becomes(database, "v3", "ready")
    assert {tuple(names(found(traffic), str(number))) for number in range(50)} == {("v3",)}, "whoever asks"
    becomes(database, "v2", "ready")
    both = {tuple(names(found(traffic), str(number))) for number in range(50)}
    assert both == {("v2", "v3"), ("v3", "v2")}, "and as soon as both are there, each sender his side"
    assert statuses(database)["v1"] == "sleeping"


@on_sqlite
def test_a_request_that_waits_is_answered_by_whichever_side_is_there_first(
    api: TestClient, left: Left, serve: Serve, traffic: Traffic, database: Database
) -> None:
    serve("v1", left("support"), "sleeping"), serve("v2", left("support"), "sleeping")
    put(api, "support:v1", "support:v2", 1)
    threading.Timer(0.3, becomes, (database, "v2", "ready")).start()
    began = time.monotonic()
    find = partial(asyncio.to_thread, traffic.find, "prod", DEFAULT_PROJECT)
    split = asyncio.run(awake(find, 20, time.monotonic))
    assert time.monotonic() - began < 10
    assert isinstance(split, Split)
    assert names(split, "anybody") == ["v2"]


@on_sqlite
def test_one_side_that_sleeps_is_woken_while_the_other_answers(
    api: TestClient, left: Left, serve: Serve, traffic: Traffic, database: Database
) -> None:
    serve("v1", left("support")), serve("v2", left("support"), "sleeping")
    put(api, "support:v1", "support:v2", 50)
    assert {tuple(names(found(traffic), str(number))) for number in range(20)} == {("v1",)}
    assert statuses(database) == {"v1": "ready", "v2": "queued"}


@on_sqlite
def test_of_several_of_one_artifact_one_is_enough(
    api: TestClient, left: Left, serve: Serve, traffic: Traffic, database: Database
) -> None:
    artifact = left("support")
    serve("a", artifact, "sleeping"), serve("b", artifact), serve("c", artifact, "sleeping")
    put(api, "support:v1")
    assert names(found(traffic)) == ["b"]
    assert statuses(database) == {"a": "sleeping", "b": "ready", "c": "sleeping"}
    becomes(database, "b", "sleeping")
    with pytest.raises(Unavailable):
        traffic.find("prod", DEFAULT_PROJECT)
    assert Counter(statuses(database).values()) == {"sleeping": 2, "queued": 1}


@on_sqlite
@pytest.mark.parametrize(
    ("newest", "woken"), [("ready", "sleeping"), ("sleeping", "sleeping"), ("starting", "queued"), (None, "queued")]
)
def test_what_it_pointed_to_before_is_woken_only_where_nothing_newer_comes(
    api: TestClient,
    left: Left,
    serve: Serve,
    traffic: Traffic,
    database: Database,
    newest: str | None,
    woken: str,
) -> None:
    serve("v1", left("support"), "sleeping")
    second = left("support")
    if newest is not None:
        serve("v2", second, newest)
    put(api, "support:v1")
    put(api, "support:v2")
    with contextlib.suppress(Unavailable):
        traffic.find("prod", DEFAULT_PROJECT)
    assert statuses(database)["v1"] == woken
    with database.read() as session:
        used = session.get_one(Deployment, "dep-v1").used_at
    assert (used is None) == (woken == "sleeping"), "what is not asked does not count as used"


@on_sqlite
def test_what_leads_nowhere_is_not_found(api: TestClient, left: Left, serve: Serve, traffic: Traffic) -> None:
    first = left("support")
    put(api, "support:v1")
    for name in ("prod", "nobody"):
        with pytest.raises(NotFound, match="not being served"):
            traffic.find(name, DEFAULT_PROJECT)
    serve("v1", first)
    with pytest.raises(NotFound):
        traffic.find("prod", "another-project")
    assert isinstance(traffic.find("v1", DEFAULT_PROJECT), Route)


@on_sqlite
def test_models_lists_aliases_that_lead_somewhere(api: TestClient, left: Left, serve: Serve) -> None:
    first = left("support")
    put(api, "support:v1")
    assert api.get("/v1/models").json()["data"] == []
    serve("v1", first)
    listed = {entry["id"]: entry for entry in api.get("/v1/models").json()["data"]}
    assert set(listed) == {"v1", "prod"}
    assert (listed["prod"]["root"], listed["prod"]["object"], listed["prod"]["status"]) == ("v1", "model", "ready")
    assert api.get("/v1/models/prod").json()["id"] == "prod"
