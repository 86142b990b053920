"""Keys over HTTP: made, listed, limited and revoked by admins of their project."""

from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.db import Database
from app.errors import Unauthorized
from app.models import ApiKey, now
from app.projects.caller import KeyLimits
from app.projects.service import KeyRing
from tests.support import on_sqlite


@on_sqlite
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "name"),
        ({"name": ""}, "name"),
        ({"name": "x", "scopes": ["root"]}, "scopes.0"),
        ({"name": "x", "scopes": []}, "scopes"),
        ({"name": "x", "requests_per_minute": -1}, "requests_per_minute"),
        ({"name": "x", "tokens_per_minute": 2**31}, "tokens_per_minute"),
        ({"name": "x", "concurrent_requests": 1.5}, "concurrent_requests"),
        ({"name": "x", "rpm": 1}, "rpm"),
        ({"name": "x", "expires_at": "tomorrow"}, "expires_at"),
        ({"name": "x", "expires_at": "2100-01-01T00:00:00"}, "expires_at"),
        ({"name": "x", "expires_at": "2001-01-01T00:00:00Z"}, "expires_at"),
        ({"name": "x", "expires_at": 4102444800}, "expires_at"),
    ],
)
def test_what_no_key_can_be(api: TestClient, body: dict[str, Any], param: str) -> None:
    answer = api.post("/keys", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_a_key_is_made_limited_and_revoked(api: TestClient, database: Database) -> None:
    body = {"name": "bot", "scopes": ["serve"], "requests_per_minute": 60, "concurrent_requests": 0}
    made = api.post("/keys", json=body)
    assert made.status_code == 201
    key, key_id = made.json()["key"], made.json()["id"]
    caller = KeyRing(database).check(f"Bearer {key}")
    assert (caller.scopes, caller.limits) == (frozenset({"serve"}), KeyLimits(60, None, 0))
    listed = api.get("/keys").json()["data"]
    assert {row["name"] for row in listed} == {"bot", "test"}
    assert key.split("_", 2)[2] not in api.get("/keys").text
    changed = api.patch(f"/keys/{key_id}", json={"tokens_per_minute": 5, "concurrent_requests": None}).json()
    assert (changed["requests_per_minute"], changed["tokens_per_minute"], changed["concurrent_requests"]) == (
        60,
        5,
        None,
    )
    assert api.delete(f"/keys/{key_id}").json() == {"id": key_id, "object": "key", "deleted": True}
    answer = api.post("/v1/chat/completions", headers={"authorization": f"Bearer {key}"}, json={})
    assert answer.status_code == 401


def test_a_key_that_ends_by_itself(api: TestClient, database: Database) -> None:
    made = api.post("/keys", json={"name": "guest", "expires_at": "2100-01-01T02:00:00+02:00"})
    assert made.status_code == 201, made.text
    key, key_id = made.json()["key"], made.json()["id"]
    assert made.json()["expires_at"] == "2100-01-01T00:00:00Z"
    assert KeyRing(database).check(f"Bearer {key}").key_id == key_id
    with database.write() as session:
        session.get_one(ApiKey, key_id).expires_at = now()
    with pytest.raises(Unauthorized):
        KeyRing(database).check(f"Bearer {key}")
    past = api.post("/keys", json={"name": "late", "expires_at": "2001-01-01T00:00:00Z"}).json()["error"]["message"]
    assert past == "expires_at: it lies in the past"
    assert api.post("/keys", json={"name": "for ever", "expires_at": None}).json()["expires_at"] is None


@on_sqlite
def test_another_projects_keys_are_not_there(api: TestClient, make_key: Callable[..., str]) -> None:
    other = make_key("proj-other", "admin")
    key_id = other.split("_")[1]
    assert api.patch(f"/keys/{key_id}", json={}).status_code == 404
    assert api.delete(f"/keys/{key_id}").status_code == 404
    assert all(row["id"] != key_id for row in api.get("/keys").json()["data"])


@on_sqlite
def test_only_admins_see_keys(api: TestClient, make_key: Callable[..., str]) -> None:
    headers = {"authorization": f"Bearer {make_key('proj-default', 'read', 'submit', 'serve')}"}
    assert api.get("/keys", headers=headers).status_code == 403
    assert api.post("/keys", headers=headers, json={"name": "x"}).status_code == 403


@on_sqlite
def test_limits_of_a_key_hold_at_the_gateway(api: TestClient) -> None:
    """From the row to the refusal: the model does not exist, so only the limit can make it a 429."""
    key = api.post("/keys", json={"name": "slow", "scopes": ["serve"], "requests_per_minute": 1}).json()["key"]
    headers = {"authorization": f"Bearer {key}"}
    body = {"model": "nobody", "messages": [{"role": "user", "content": "hi"}]}
    first, second = (api.post("/v1/chat/completions", headers=headers, json=body) for _ in range(2))
    assert (first.status_code, second.status_code) == (404, 429)
    assert second.headers["x-ratelimit-limit-requests"] == "1"
    assert "x-ratelimit-limit-requests" not in api.post("/v1/chat/completions", json=body).headers
