"""Keys: seen once, stored as a hash, refused when revoked, expired or not quite right."""

import logging
import re
from datetime import timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from app.db import Database
from app.errors import Unauthorized
from app.models import ApiKey, now
from app.projects.service import KeyRing, create_key, first_key
from tests.support import on_sqlite


def test_a_key_is_stored_as_a_hash(database: Database, key: str) -> None:
    assert re.fullmatch(r"ts_[0-9a-f]{12}_[\w-]{43}", key)
    with database.read() as session:
        row = session.scalars(select(ApiKey)).one()
    assert key.split("_", 2)[2] not in repr(vars(row))
    caller = KeyRing(database).check(f"Bearer {key}")
    assert (caller.project_id, caller.key_id) == ("proj-default", row.id)
    assert KeyRing(database).check(f"bearer  {key} ").key_id == row.id


def test_the_first_key_is_made_once(database: Database) -> None:
    with database.write() as session:
        assert first_key(session) is not None
    with database.write() as session:
        assert first_key(session) is None


@pytest.mark.parametrize(
    "change",
    [{"revoked_at": now()}, {"expires_at": now() - timedelta(seconds=1)}],
    ids=["revoked", "expired"],
)
def test_a_key_that_is_no_longer_good(database: Database, key: str, change: dict[str, Any]) -> None:
    with database.write() as session:
        row = session.scalars(select(ApiKey)).one()
        for name, value in change.items():
            setattr(row, name, value)
    with pytest.raises(Unauthorized):
        KeyRing(database).check(f"Bearer {key}")


def test_a_key_that_is_good_for_a_while(database: Database, key: str) -> None:
    with database.write() as session:
        session.scalars(select(ApiKey)).one().expires_at = now() + timedelta(hours=1)
    KeyRing(database).check(f"Bearer {key}")


def test_what_is_no_key(database: Database, key: str) -> None:
    _, key_id, secret = key.split("_", 2)
    with database.write() as session:
        other = create_key(session, "other")
    mixed = f"ts_{key_id}_{other.split('_', 2)[2]}"
    for text in (
        "",
        "ts_",
        "ts__",
        f"ts_{key_id}",
        f"ts_{key_id}_",
        f"tx_{key_id}_{secret}",
        mixed,
        key.upper(),
        "ts_é_é",
    ):
        with pytest.raises(Unauthorized):
            KeyRing(database).check(f"Bearer {text}")
    for header in (None, "", key, f"Token {key}", f"Bearer{key}", f"Bearer {key} {key}"):
        with pytest.raises(Unauthorized):
            KeyRing(database).check(header)


@on_sqlite
def test_a_busy_key_is_looked_up_by_one_request_while_the_others_go_on(
    database: Database, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("app.projects.service.time.monotonic", lambda: clock[0])
    ring, header = KeyRing(database), f"Bearer {key}"
    assert ring.remembered(header) == (None, False)
    caller = ring.check(header)
    assert ring.remembered(header) == (caller, False)
    clock[0] += 4
    assert [ring.remembered(header) for _ in range(3)] == [(caller, True), (caller, False), (caller, False)]
    ring.refresh(header)
    clock[0] += 2.5
    assert ring.remembered(header) == (caller, False)
    with database.write() as session:
        session.scalars(select(ApiKey)).one().revoked_at = now()
    clock[0] += 1
    assert ring.remembered(header) == (caller, True)
    ring.refresh(header)
    assert ring.remembered(header) == (None, False)
    for wrong in (None, "", "Basic x", "Bearer ", f"Bearer {key}x"):
        assert ring.remembered(wrong) == (None, False)


@pytest.fixture
def bare(api: TestClient) -> TestClient:
    """Sends no key by itself."""
    del api.headers["authorization"]
    return api


@on_sqlite
@pytest.mark.parametrize(
    ("method", "path", "let_in"),
    [
        ("POST", "/v1/messages", (400, "invalid_json")),
        ("POST", "/v1/chat/completions", (400, "invalid_json")),
        ("GET", "/v1/models", (200, None)),
        ("GET", "/jobs", (200, None)),
        ("GET", "/openapi.json", (200, None)),
    ],
)
def test_a_key_may_come_as_anthropics_clients_send_it(
    bare: TestClient, key: str, method: str, path: str, let_in: tuple[int, str | None]
) -> None:
    def asked(*headers: tuple[str, str]) -> tuple[int, str | None]:
        raw = [(name.encode(), value.encode()) for name, value in headers]
        answer = bare.request(method, path, headers=raw, content=b"{" if method == "POST" else None)
        return answer.status_code, (answer.json().get("error") or {}).get("code")

    good, bad = ("x-api-key", key), ("x-api-key", "ts_x_y")
    assert asked(good, ("anthropic-version", "2023-06-01")) == let_in
    assert asked(good, ("authorization", f"Bearer {key}")) == let_in
    assert asked(bad, ("authorization", f"Bearer {key}")) == let_in, "Authorization counts"
    assert asked(good, ("authorization", "Bearer ts_x_y"))[0] == 401
    for wrong in (key[:-1], f"Bearer {key}", f"{key} ü", "ts_x_y"):
        assert asked(("x-api-key", wrong))[0] == 401, wrong
    assert asked(good, good) == asked() == (401, "missing_api_key")


@on_sqlite
def test_a_key_is_in_no_log_and_no_answer(bare: TestClient, key: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    said = []
    for sent, status in ((key, 400), (key + "x", 401)):
        for body in (b"{", b'{"model": "m"}'):
            answer = bare.post("/v1/messages", headers={"x-api-key": sent}, content=body)
            assert answer.status_code == status
            said.append(answer.text)
    secret = key.split("_", 2)[2]
    assert secret not in caplog.text
    assert secret not in "".join(said)
