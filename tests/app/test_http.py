"""What every request meets: keys, scopes, unknown places, media types, headers, hosts."""

import inspect
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select
from sqlalchemy.exc import OperationalError

from app.db import Database
from app.deps import Rooms
from app.main import create_app
from app.models import Job
from app.settings import Settings
from tests.support import train_spec

OPEN = {"/healthz", "/readyz"}


@pytest.fixture
def backend() -> str:
    """Nothing here depends on the kind of database."""
    return "sqlite"


def routes(document: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for path, operations in document["paths"].items():
        for method in operations:
            yield method.upper(), path


def test_every_route_needs_a_key(api: TestClient) -> None:
    """The whole route table is walked, so that a new route cannot be forgotten."""
    stranger = TestClient(api.app)
    walked = 0
    documents = [("GET", "/docs"), ("GET", "/openapi.json")]
    for method, path in [*routes(api.get("/openapi.json").json()), *documents]:
        answer = stranger.request(method, path.replace("{", "").replace("}", ""))
        if path in OPEN:
            assert answer.status_code == 200
            continue
        walked += 1
        assert answer.status_code == 401, (method, path)
        assert answer.json()["error"]["code"] == "missing_api_key"
    assert walked >= 15


def test_health_says_alive_without_touching_anything(api: TestClient) -> None:
    assert TestClient(api.app).get("/healthz").json() == {"status": "ok"}


def test_ready_although_there_is_no_worker(api: TestClient) -> None:
    answer = api.get("/readyz")
    assert answer.status_code == 200
    assert answer.json() == {"ready": True, "reasons": [], "degraded": ["no worker"]}


def test_not_ready_with_another_schema(tmp_path: Any) -> None:
    settings = Settings(data_dir=tmp_path)
    with TestClient(create_app(settings)) as client:
        answer = client.get("/readyz")
    assert answer.status_code == 503
    assert "tunesmith migrate" in answer.json()["reasons"][0]


SCOPES = [
    ("GET", "/jobs", "read"),
    ("GET", "/files", "read"),
    ("GET", "/artifacts", "read"),
    ("GET", "/deployments", "read"),
    ("POST", "/jobs", "submit"),
    ("POST", "/files", "submit"),
    ("POST", "/jobs/none/cancel", "submit"),
    ("POST", "/deployments", "serve"),
    ("DELETE", "/deployments/none", "serve"),
    ("POST", "/deployments/none/adapters", "serve"),
    ("GET", "/deployments/none/adapters", "read"),
    ("DELETE", "/deployments/none/adapters/x", "serve"),
    ("POST", "/v1/chat/completions", "serve"),
    ("POST", "/v1/responses", "serve"),
    ("GET", "/usage", "read"),
]


def test_a_key_without_the_scope(api: TestClient, make_key: Callable[..., str]) -> None:
    for scope in ("read", "submit", "serve"):
        client = TestClient(api.app, headers={"authorization": f"Bearer {make_key('proj-default', scope)}"})
        for method, path, needed in SCOPES:
            answer = client.request(method, path)
            assert (answer.status_code == 403) == (needed != scope), (scope, method, path, answer.text)
            if needed != scope:
                error = answer.json()["error"]
                assert (error["type"], error["code"]) == ("permission_error", "missing_scope")
                assert needed in error["message"]


def test_who_may_chat_may_list_what_there_is_to_chat_with(api: TestClient, make_key: Callable[..., str]) -> None:
    """OpenAI's clients ask for the models first."""
    for scope, listed in (("read", 200), ("serve", 200), ("submit", 403)):
        client = TestClient(api.app, headers={"authorization": f"Bearer {make_key('proj-default', scope)}"})
        assert client.get("/v1/models").status_code == listed
        assert client.get("/v1/models/nobody").status_code == (404 if listed == 200 else 403)


def test_an_admin_key_may_do_everything(api: TestClient, make_key: Callable[..., str]) -> None:
    client = TestClient(api.app, headers={"authorization": f"Bearer {make_key('proj-default', 'admin')}"})
    assert all(client.request(method, path).status_code != 403 for method, path, _ in SCOPES)


def test_an_unknown_place(api: TestClient) -> None:
    for path in ("/", "/nothing", "/jobs/a/b/c", "/v1/nothing", "/jobs/%2e%2e"):
        answer = api.get(path)
        assert answer.status_code == 404, path
        error = answer.json()["error"]
        assert error["code"] == "not_found"
        assert error["type"] == "not_found_error"


@pytest.mark.parametrize(
    ("method", "path", "meant"),
    [
        ("POST", "/chat/completions", "/v1/chat/completions"),
        ("GET", "/models", "/v1/models"),
        ("POST", "/v1/v1/messages", "/v1/messages"),
        ("GET", "/nothing", None),
        ("GET", "/v1/v1/nothing", None),
    ],
)
def test_a_base_url_with_a_version_too_few_or_too_many(
    api: TestClient, method: str, path: str, meant: str | None
) -> None:
    answer = api.request(method, path, json={})
    assert answer.status_code == 404
    hint = answer.json()["error"]["hint"]
    assert hint.startswith(f"There is {meant}: the base URL") if meant else hint == "See /docs."


def test_a_wrong_method_is_told_the_right_ones(api: TestClient) -> None:
    """All of them, though each is a route of its own."""
    paths = api.get("/openapi.json").json()["paths"]
    assert set(paths["/jobs"]) == {"get", "post"}
    for path in ("/jobs", "/jobs/{job_id}", "/jobs/{job_id}/cancel", "/deployments/{deployment_id}", "/healthz"):
        allowed = ", ".join(sorted(method.upper() for method in paths[path]))
        answer = api.put(path.replace("{", "").replace("}", ""))
        assert answer.status_code == 405
        assert answer.headers["allow"] == allowed
        error = answer.json()["error"]
        assert error["code"] == "method_not_allowed"
        assert allowed in error["hint"]


@pytest.mark.parametrize("media", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x"])
def test_a_media_type_that_is_not_read(api: TestClient, media: str) -> None:
    for path in ("/jobs", "/deployments"):
        answer = api.post(path, content=b'{"type": "sleepy"}', headers={"content-type": media})
        assert answer.status_code == 415, (path, answer.text)
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("unsupported_media_type", "Content-Type")
        assert "application/json" in error["hint"]


def test_files_are_not_uploaded_as_json(api: TestClient) -> None:
    answer = api.post("/files", json={"file": "x"})
    assert answer.status_code == 415
    assert "multipart/form-data" in answer.json()["error"]["hint"]


def test_json_with_parameters_or_without_a_type_is_read(api: TestClient) -> None:
    for headers in ({"content-type": "Application/JSON; charset=utf-8"}, {}):
        assert api.post("/jobs", content=b'{"type": "sleepy"}', headers=headers).status_code == 201


def test_headers_over_the_cap(api: TestClient) -> None:
    answer = api.get("/jobs", headers={"x-big": "x" * 40_000})
    assert answer.status_code == 431
    assert answer.json()["error"]["code"] == "headers_too_large"
    assert api.get("/jobs", headers={"x-big": "x" * 20_000}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost@evil", "", "a b", "[::1"])
def test_a_foreign_host(api: TestClient, host: str) -> None:
    """A page that resolves its own name to this address reads nothing (DNS rebinding)."""
    for path in ("/jobs", "/healthz", "/v1/models"):
        answer = api.get(path, headers={"host": host})
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "invalid_host"
        assert answer.headers["x-request-id"]


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "LOCALHOST", "localhost:1", "[::1]:8000"])
def test_our_own_host(api: TestClient, host: str) -> None:
    assert api.get("/jobs", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    ("hosts", "host", "good"),
    [
        (("*",), "anything", True),
        (("*.example.com",), "a.example.com", True),
        (("*.example.com",), "example.com.evil", False),
        (("tune.example.com",), "tune.example.com:443", True),
        (("tune.example.com",), "localhost", False),
    ],
)
def test_hosts_that_the_operator_allows(settings: Settings, hosts: tuple[str, ...], host: str, good: bool) -> None:
    with TestClient(create_app(settings.model_copy(update={"allowed_hosts": hosts}))) as client:
        assert (client.get("/healthz", headers={"host": host}).status_code == 200) == good


def test_every_answer_has_a_request_id_of_its_own(api: TestClient) -> None:
    seen = [api.get(path).headers["x-request-id"] for path in ("/jobs", "/jobs", "/nothing", "/healthz", "/jobs/x")]
    assert len(set(seen)) == 5
    assert all(value.startswith("req_") and len(value) == 36 for value in seen)


def test_a_failure_of_ours_tells_nothing_but_where_to_look(
    api: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret inner words")

    monkeypatch.setattr("app.jobs.service.listing", broken)
    answer = api.get("/jobs")
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "internal_error")
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] in error["hint"]
    assert "secret inner words" in caplog.text


def test_a_busy_database_is_503_with_a_time_to_come_back(api: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: object) -> None:
        raise OperationalError("SELECT 1", {}, Exception("locked"))

    monkeypatch.setattr("app.jobs.service.listing", busy)
    answer = api.get("/jobs")
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0
    assert answer.json()["error"]["code"] == "database_busy"


def test_a_nearly_full_disk_takes_no_new_work(settings: Settings, key: str) -> None:
    full = settings.model_copy(update={"min_free_bytes": 1 << 60})
    with TestClient(create_app(full), headers={"authorization": f"Bearer {key}"}) as client:
        for answer in (
            client.post("/jobs", json={"type": "sleepy"}),
            client.post("/files", files={"file": ("a.jsonl", b"{}")}),
        ):
            assert answer.status_code == 507
            assert answer.headers["x-should-retry"] == "false"
            assert answer.json()["error"]["code"] == "disk_full"
        assert client.get("/jobs").json()["data"] == []
        assert client.get("/readyz").json()["degraded"] == ["no worker", "disk is nearly full"]


def test_the_row_is_durable_before_the_answer_leaves(settings: Settings, key: str, database: Database) -> None:
    """FastAPI ends dependencies after the response unless their scope is ``function``."""
    app = create_app(settings)
    seen: list[int] = []

    class Watching:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            async def watched(message: Any) -> None:
                if message["type"] == "http.response.start" and scope.get("method") == "POST":
                    with database.read() as session:
                        seen.append(len(session.scalars(select(Job.id)).all()))
                await send(message)

            await self.inner(scope, receive, watched)

    app.add_middleware(Watching)
    with TestClient(app, headers={"authorization": f"Bearer {key}"}) as client:
        assert client.post("/jobs", json={"type": "sleepy"}).status_code == 201
    assert seen == [1]


def test_the_doorbell_rings_only_after_the_commit(settings: Settings, key: str, database: Database) -> None:
    class Bell:
        reachable = True

        def __init__(self) -> None:
            self.heard: list[int] = []

        def ring(self) -> None:
            with database.read() as session:
                self.heard.append(len(session.scalars(select(Job.id)).all()))

        def close(self) -> None:
            pass

    bell = Bell()
    app = create_app(settings, bell)  # type: ignore[arg-type]
    rooms: Rooms = app.state.rooms
    assert rooms.doorbell is bell
    with TestClient(app, headers={"authorization": f"Bearer {key}"}) as client:
        client.post("/jobs", json={"type": "sleepy", "mode": "nonsense"})
        assert bell.heard == []
        client.post("/jobs", json={"type": "sleepy"})
        assert bell.heard == [1]


def test_another_projects_rows_do_not_exist(
    api: TestClient, make_key: Callable[..., str], models: Any, file_id: str
) -> None:
    body = train_spec(str(models / "tiny"), file_id, metadata={"team": "a"})
    job = api.post("/jobs", json=body).json()
    deployment = api.post("/deployments", json={"name": "mine", "model": str(models / "tiny")}).json()
    stranger = TestClient(api.app, headers={"authorization": f"Bearer {make_key('proj-other')}"})
    for method, path in [
        ("GET", f"/jobs/{job['id']}"),
        ("GET", f"/jobs/{job['id']}/events"),
        ("GET", f"/jobs/{job['id']}/logs"),
        ("GET", f"/jobs/{job['id']}/metrics"),
        ("GET", f"/jobs/{job['id']}/checkpoints"),
        ("GET", f"/jobs/{job['id']}/stream"),
        ("POST", f"/jobs/{job['id']}/cancel"),
        ("GET", f"/files/{file_id}"),
        ("GET", f"/jobs?after={job['id']}"),
        ("GET", f"/deployments/{deployment['id']}"),
        ("DELETE", f"/deployments/{deployment['id']}"),
        ("GET", "/v1/models/mine"),
    ]:
        assert stranger.request(method, path).status_code == 404, (method, path)
    for path in ("/jobs", "/files", "/artifacts", "/deployments", "/jobs?type=serve", "/v1/models"):
        assert stranger.get(path).json()["data"] == [], path
    answer = stranger.post("/jobs", json=body)
    assert answer.status_code == 404
    assert answer.json()["error"]["param"] in ("dataset.file", "model.model_name_or_path")
    assert stranger.post("/jobs", json={"type": "validate", "model": f"job:{job['id']}"}).status_code in (400, 404)
    # The same name is free in another project.
    assert stranger.post("/deployments", json={"name": "mine", "model": str(models / "tiny")}).status_code == 201
    assert api.get(f"/jobs/{job['id']}").json()["status"] == "queued"


def test_the_test_operations_need_no_torch() -> None:
    """Keeps this suite quick: the plug that it submits is imported by the API as well."""
    from tests.plugs import sleepy  # noqa: PLC0415

    assert "torch" not in inspect.getsource(sleepy).replace("without torch", "")
    assert json.dumps(sleepy.SleepySpec.model_json_schema())
