"""An alias with two targets: who is on which side, and what becomes of it when it is promoted or rolled back."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.aliases.traffic import Split, Traffic
from app.db import Database
from app.deployments.service import Route, Router
from app.errors import NotFound, Unavailable
from app.models import DEFAULT_PROJECT, Deployment
from app.settings import Settings
from tests.app.artifacts.conftest import Left
from tests.support import on_sqlite

Serve = Callable[..., str]


@pytest.fixture
def serve(database: Database) -> Serve:
    """``serve(name, artifact_id)``: a deployment that is ready, or of another status."""

    def make(name: str, artifact_id: str, status: str = "ready", project: str = DEFAULT_PROJECT) -> str:
        with database.write() as session:
            row = Deployment(id=f"dep-{name}", project_id=project, name=name, model="m", status=status)
            row.artifact_id, row.socket = artifact_id, f"/run/{name}.sock"
            session.add(row)
        return name

    return make


@pytest.fixture
def traffic(database: Database, settings: Settings) -> Traffic:
    return Traffic(database, Router(database, settings).route_for)


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
        session.get_one(Deployment, "dep-v2").status = "ready"
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
