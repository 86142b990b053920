"""Usage: counted in memory, written in one transaction, shown by key, model and day."""

import threading
from collections.abc import Callable
from datetime import date
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import event, select
from sqlalchemy.exc import SQLAlchemyError

from app.db import Database
from app.main import create_app
from app.models import DEFAULT_PROJECT, Usage
from app.projects.caller import Caller
from app.settings import Settings
from app.usage.meter import Meter
from tests.support import on_sqlite

MONDAY, TUESDAY = date(2026, 11, 23), date(2026, 11, 24)


def add(meter: Meter, model: str = "m", key: str = "k1", project: str = DEFAULT_PROJECT, **count: Any) -> None:
    counted: dict[str, Any] = {"failed": False, "prompt_tokens": 3, "completion_tokens": 5, "seconds": 0.2}
    meter.add(Caller(project, key, frozenset()), model, **{**counted, "first_byte_seconds": 0.1, **count})


@pytest.fixture
def meter(database: Database, key: str) -> Meter:
    """On Monday."""
    return Meter(database, lambda: MONDAY)


def test_many_requests_are_one_row_and_one_transaction(meter: Meter, database: Database) -> None:
    begun: list[object] = []
    event.listen(database.engine, "commit", begun.append)
    for number in range(200):
        add(meter, f"m{number % 2}", failed=number < 3)
    assert begun == []
    assert meter.flush() == 2
    assert len(begun) == 1
    assert meter.flush() == 0
    with database.read() as session:
        rows = session.scalars(select(Usage).order_by(Usage.model)).all()
    assert [(row.requests, row.errors, row.prompt_tokens, row.completion_tokens) for row in rows] == [
        (100, 2, 300, 500),
        (100, 1, 300, 500),
    ]
    assert (rows[0].latency_ms, rows[0].first_byte_ms) == (20_000, 10_000)


def test_what_two_processes_count_is_added_up(meter: Meter, database: Database) -> None:
    other = Meter(database, lambda: MONDAY)
    for _ in range(2):
        add(meter), add(other)
        meter.flush(), other.flush()
    with database.read() as session:
        assert session.scalars(select(Usage)).one().requests == 4


def test_what_cannot_be_written_is_written_later(meter: Meter, database: Database) -> None:
    def refuse(*_: Any) -> None:
        raise SQLAlchemyError("away")

    add(meter)
    event.listen(database.engine, "begin", refuse)
    with pytest.raises(SQLAlchemyError):
        meter.flush()
    event.remove(database.engine, "begin", refuse)
    add(meter)
    assert meter.flush() == 1
    with database.read() as session:
        assert session.scalars(select(Usage)).one().requests == 2


@on_sqlite
def test_nothing_is_lost_between_threads(meter: Meter, database: Database) -> None:
    def work() -> None:
        for _ in range(200):
            add(meter)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        meter.flush()
    meter.flush()
    with database.read() as session:
        assert session.scalars(select(Usage)).one().requests == 800


@on_sqlite
def test_the_rest_is_written_when_the_service_stops(settings: Settings, database: Database, key: str) -> None:
    app = create_app(settings)
    with TestClient(app):
        add(app.state.desk.meter)
        with database.read() as session:
            assert session.scalars(select(Usage)).all() == []
    with database.read() as session:
        assert session.scalars(select(Usage)).one().requests == 1


@pytest.fixture
def used(database: Database, key: str) -> None:
    """Two days, two keys, two models."""
    for day, key_id, model, requests in (
        (MONDAY, "k1", "a", 1),
        (MONDAY, "k2", "a", 2),
        (TUESDAY, "k1", "a", 4),
        (TUESDAY, "k1", "b", 8),
    ):
        counting = Meter(database, lambda day=day: day)
        for _ in range(requests):
            add(counting, model, key_id)
        counting.flush()


WHEN = {"since": str(MONDAY), "until": str(TUESDAY)}


def shown(api: TestClient, **asked: Any) -> list[tuple[Any, ...]]:
    answer = api.get("/usage", params={**WHEN, **asked})
    assert answer.status_code == 200, answer.text
    return [(row["day"], row["key_id"], row["model"], row["requests"]) for row in answer.json()["data"]]


@pytest.mark.usefixtures("used")
def test_by_key_model_and_day(api: TestClient) -> None:
    monday, tuesday = str(MONDAY), str(TUESDAY)
    assert shown(api) == [
        (tuesday, "k1", "b", 8),
        (tuesday, "k1", "a", 4),
        (monday, "k2", "a", 2),
        (monday, "k1", "a", 1),
    ]
    assert shown(api, by="key") == [(None, "k1", None, 13), (None, "k2", None, 2)]
    assert shown(api, by="model") == [(None, None, "b", 8), (None, None, "a", 7)]
    assert shown(api, by=["day", "model"], key="k1")[0] == (tuesday, None, "b", 8)
    assert shown(api, by="day", model="a") == [(tuesday, None, None, 4), (monday, None, None, 3)]
    assert shown(api, by="key", until=monday) == [(None, "k2", None, 2), (None, "k1", None, 1)]
    row = api.get("/usage", params={**WHEN, "by": "key", "key": "k2"}).json()["data"][0]
    assert (row["prompt_tokens"], row["completion_tokens"], row["errors"]) == (6, 10, 0)
    assert (row["mean_latency_ms"], row["mean_first_byte_ms"]) == (200.0, 100.0)
    first = api.get("/usage", params={**WHEN, "limit": 3}).json()
    assert (len(first["data"]), first["has_more"]) == (3, True)


@on_sqlite
@pytest.mark.usefixtures("used")
def test_usage_is_a_projects_own(api: TestClient, make_key: Callable[..., str]) -> None:
    other = {"authorization": f"Bearer {make_key('proj-other', 'read')}"}
    assert api.get("/usage", params=WHEN, headers=other).json()["data"] == []


@on_sqlite
@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"by": "project"}, "by.0"),
        ({"since": "yesterday"}, "since"),
        ({"since": "2026-11-24", "until": "2026-11-23"}, "since"),
        ({"limit": 0}, "limit"),
    ],
)
def test_what_cannot_be_asked(api: TestClient, asked: dict[str, Any], param: str) -> None:
    answer = api.get("/usage", params=asked)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@on_sqlite
def test_without_days_the_last_thirty_and_the_first_day_of_all(api: TestClient) -> None:
    assert api.get("/usage").json() == {"object": "list", "data": [], "has_more": False}
    assert api.get("/usage", params={"until": "0001-01-02"}).status_code == 200
