"""Bad requests: the right status, an error that names the culprit and says what to do, nothing half-created."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.settings import Settings
from tests.support import on_sqlite


def test_a_body_over_the_cap(
    api: TestClient, refused: Callable[..., Any], settings: Settings, upload: Callable[..., Any]
) -> None:
    big = b" " * (settings.max_body_bytes + 1)
    error = refused(api.post("/jobs", content=big, headers={"content-type": "application/json"}), 413, "body_too_large")
    assert "POST /files" in error["hint"]
    refused(upload(b"x" * (settings.max_upload_bytes + 1)), 413, "body_too_large", "file")
    refused(upload(b"x" * (settings.max_upload_bytes + (2 << 20))), 413, "body_too_large")


@on_sqlite
@pytest.mark.parametrize("path", ["/jobs", "/deployments", "/files"])
def test_a_body_over_the_cap_without_a_length(
    api: TestClient, refused: Callable[..., Any], settings: Settings, path: str
) -> None:
    """Chunked: the cap holds while the body comes in."""
    size = settings.max_upload_bytes + (2 << 20) if path == "/files" else settings.max_body_bytes + 1
    head = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n' if path == "/files" else b""
    )
    media = "multipart/form-data; boundary=b" if path == "/files" else "application/json"

    def chunks() -> Iterator[bytes]:
        yield head
        for _ in range(0, size + 4096, 4096):
            yield b"1" * 4096

    refused(api.post(path, content=chunks(), headers={"content-type": media}), 413, "body_too_large")


@on_sqlite
@pytest.mark.parametrize(
    ("header", "code"),
    [
        (None, "missing_api_key"),
        ("Bearer ", "invalid_api_key"),
        ("Bearer wrong", "invalid_api_key"),
        ("Bearer ts_000000000000_secret", "invalid_api_key"),
        ("Basic dXNlcjpwYXNz", "invalid_api_key"),
    ],
)
def test_no_key_or_a_wrong_one(
    api: TestClient, refused: Callable[..., Any], header: str | None, code: str, key: str
) -> None:
    client = TestClient(api.app, headers={"authorization": header} if header else {})
    for answer in (client.get("/jobs"), client.post("/jobs", json={}), client.post("/files")):
        error = refused(answer, 401, code)
        assert error["hint"]
        assert answer.headers["www-authenticate"] == "Bearer"
    wrong_secret = TestClient(api.app, headers={"authorization": f"Bearer {key[:-1]}"})
    refused(wrong_secret.get("/jobs"), 401, "invalid_api_key")


@on_sqlite
def test_two_keys_in_one_request_are_one_too_many(api: TestClient, refused: Callable[..., Any], key: str) -> None:
    client = TestClient(api.app)
    headers = [("authorization", f"Bearer {key}"), ("authorization", f"Bearer {key}")]
    refused(client.get("/jobs", headers=headers), 401, "missing_api_key")


LOOK_UPS = [
    ("GET", "/jobs/{id}", "job_id"),
    ("GET", "/jobs/{id}/events", "job_id"),
    ("GET", "/jobs/{id}/logs", "job_id"),
    ("GET", "/jobs/{id}/metrics", "job_id"),
    ("GET", "/jobs/{id}/checkpoints", "job_id"),
    ("GET", "/jobs/{id}/stream", "job_id"),
    ("POST", "/jobs/{id}/cancel", "job_id"),
    ("GET", "/files/{id}", "file_id"),
    ("GET", "/artifacts/{id}", "artifact_id"),
    ("GET", "/deployments/{id}", "deployment_id"),
    ("DELETE", "/deployments/{id}", "deployment_id"),
    ("GET", "/jobs?after={id}", "after"),
    ("GET", "/files?after={id}", "after"),
    ("GET", "/artifacts?after={id}", "after"),
    ("GET", "/deployments?after={id}", "after"),
]


@pytest.mark.parametrize("unknown", ["ftjob-000000000000000000000000", "%F0%9F%99%82", "'%20OR%201=1--"])
def test_an_unknown_id(api: TestClient, refused: Callable[..., Any], unknown: str) -> None:
    for method, path, param in LOOK_UPS:
        refused(api.request(method, path.replace("{id}", unknown)), 404, "not_found", param)


@on_sqlite
def test_an_address_with_a_nul(api: TestClient, refused: Callable[..., Any]) -> None:
    """Postgres cannot even look for it."""
    for method, path, _ in LOOK_UPS:
        refused(api.request(method, path.replace("{id}", "%00")), 400, "invalid_value")


def test_cancelling_a_finished_job(api: TestClient, file_id: str) -> None:
    job = api.post("/jobs", json={"type": "sleepy"}).json()
    assert api.post(f"/jobs/{job['id']}/cancel").json()["status"] == "cancelled"
    events = api.get(f"/jobs/{job['id']}/events").json()
    answer = api.post(f"/jobs/{job['id']}/cancel")
    assert answer.status_code == 409
    assert answer.headers["x-should-retry"] == "false"
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("wrong_state", "job_id")
    assert "cancelled" in error["message"]
    assert error["hint"]
    assert api.get(f"/jobs/{job['id']}/events").json() == events


@on_sqlite
@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"[]", "invalid_type"),
        (b"null", "invalid_type"),
        (b'{"type": "sleepy", "seconds": NaN}', "invalid_json"),
        (b'{"type": "sleepy", "seconds": -Infinity}', "invalid_json"),
        (b'{"type": "sleepy", "seconds": 1e999}', "invalid_value"),
        (b'{"type": "sleepy", "marker": "\\ud800"}', "invalid_value"),
        (b'{"type": "sleepy", "marker": "a\\u0000b"}', "invalid_value"),
        (b'{"type": "sleepy", "marker": "\xff"}', "invalid_json"),
        (b'{"type": "sleepy", "metadata": ' + b"[" * 100_00 + b"]" * 100_00 + b"}", "invalid_json"),
        (b'{"type": "sleepy", "metadata": ' + b'{"a":' * 70 + b"1" + b"}" * 70 + b"}", "invalid_json"),
        (b'{"type": "sleepy", "priority": ' + b"9" * 5000 + b"}", "invalid_json"),
    ],
)
def test_json_that_is_none(api: TestClient, refused: Callable[..., Any], body: bytes, code: str) -> None:
    answer = api.post("/jobs", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    refused(answer, 400, code, answer.json()["error"]["param"])


@on_sqlite
def test_a_key_that_stands_twice(api: TestClient, refused: Callable[..., Any]) -> None:
    body = b'{"type": "sleepy", "seconds": 1, "seconds": 2}'
    refused(
        api.post("/jobs", content=body, headers={"content-type": "application/json"}), 400, "invalid_json", "seconds"
    )


BAD_DEPLOYMENTS: list[tuple[Any, int, str, str | None]] = [
    ({"name": "a", "model": "artifact:none"}, 404, "model_not_found", "model"),
    ({"name": "a", "model": "artifact:\x00"}, 400, "invalid_value", "model"),
    ({"name": "a", "model": "/x\x00y"}, 400, "invalid_value", "model"),
    ({"name": "a", "model": "/" + "x" * 400}, 400, "model_outside_roots", "model"),
    ({"name": "a b", "model": "m"}, 400, "invalid_value", "name"),
    ({"model": "m"}, 400, "missing_field", "name"),
    ({"name": "a", "model": "m", "argv": ["--trust-remote-code"]}, 400, "unknown_field", "argv"),
    ({"name": "a", "model": "m", "engine": "sglang"}, 400, "invalid_value", "engine"),
    ({"name": "a", "model": "m", "max_model_len": "big"}, 400, "invalid_type", "max_model_len"),
    ([], 400, "invalid_type", None),
]


def test_a_deployment_that_cannot_be(api: TestClient, refused: Callable[..., Any]) -> None:
    for body, status, code, param in BAD_DEPLOYMENTS:
        refused(api.post("/deployments", json=body), status, code, param)


@on_sqlite
@pytest.mark.parametrize(
    ("query", "param"),
    [("limit=0", "limit"), ("limit=1001", "limit"), ("limit=x", "limit"), ("status=done", "status")],
)
def test_a_query_that_makes_no_sense(api: TestClient, refused: Callable[..., Any], query: str, param: str) -> None:
    answer = api.get(f"/jobs?{query}")
    assert answer.status_code == 400
    refused(answer, 400, answer.json()["error"]["code"], param)
