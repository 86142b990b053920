"""Uploads: the key comes first, then the form."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

HEAD = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'


@pytest.fixture
def backend() -> str:
    return "sqlite"


def post(app: Any, key: str | None) -> tuple[int, dict[str, Any], int]:
    """Status, answer, and how many chunks of an endless upload were asked for."""
    headers = [(b"host", b"testserver"), (b"content-type", b"multipart/form-data; boundary=b")]
    headers += [(b"authorization", f"Bearer {key}".encode())] if key else []
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/files",
        "raw_path": b"/files",
        "root_path": "",
        "query_string": b"",
        "headers": headers,
        "client": ("testclient", 1),
        "server": ("testserver", 80),
    }
    asked = 0
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        nonlocal asked
        asked += 1
        return {"type": "http.request", "body": HEAD if asked == 1 else b"x" * 65536, "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    body = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"], json.loads(body), asked


def test_an_upload_without_a_key_is_not_read(api: TestClient, make_key: Callable[..., str]) -> None:
    for wrong, status in ((None, 401), ("ts_000000000000_no", 401), (make_key("proj-default", "read"), 403)):
        found, body, asked = post(api.app, wrong)
        assert (found, asked) == (status, 0)
        assert body["error"]["hint"]


def test_an_endless_upload_with_a_key_is_cut_off(api: TestClient, key: str) -> None:
    status, body, asked = post(api.app, key)
    assert (status, body["error"]["code"]) == (413, "body_too_large")
    assert asked < 100


def test_one_file_and_few_fields(api: TestClient) -> None:
    two = [("file", ("a.jsonl", b"{}")), ("file", ("b.jsonl", b"{}"))]
    answer = api.post("/files", files=two)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value")


def test_a_name_with_a_nul(api: TestClient) -> None:
    body = HEAD.replace(b"a.jsonl", b"a\0.jsonl") + b"{}\r\n--b--\r\n"
    answer = api.post("/files", content=body, headers={"content-type": "multipart/form-data; boundary=b"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_value", "file")


def test_the_purpose_has_a_default(upload: Callable[..., Any]) -> None:
    assert upload().json()["purpose"] == "fine-tune"
    assert upload(purpose="").json()["purpose"] == "fine-tune"
    assert upload(b"anything", "a.txt", purpose="user_data").json()["purpose"] == "user_data"


def test_the_form_is_documented(api: TestClient) -> None:
    operation = api.get("/openapi.json").json()["paths"]["/files"]["post"]
    content = operation["requestBody"]["content"]["multipart/form-data"]
    assert set(content["schema"]["properties"]) == {"file", "purpose"}
    assert content["schema"]["required"] == ["file"]
    assert content["examples"]
