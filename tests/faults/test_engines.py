"""Deployments of a real worker process behind a real API: the worker is killed, everybody asks for everything at once.

The engine is without a model (tests/workers/fake_engine.py).
"""

import http.client
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.processes import processes_of_attempts
from app.settings import Settings
from app.storage import Storage
from tests.app.gateway.test_closed import ROUTES
from tests.faults.conftest import WorkerProcess
from tests.faults.service import ApiProcess
from tests.faults.timeline import Timeline
from tests.support import make_model_folder, on_sqlite, wait_for

pytestmark = [pytest.mark.fault, on_sqlite]
BACK = 60.0
"""From the death of a worker to an answer."""


class Stand:
    """What a user has: the address of an API and a key."""

    def __init__(self, service: ApiProcess, key: str, settings: Settings, models: Path) -> None:
        self._service, self._key = service, key
        self._settings, self._models = settings, models

    def __call__(self, method: str, path: str, **more: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {self._key}"}
        return httpx.request(method, f"{self._service.url}{path}", headers=headers, timeout=60, trust_env=False, **more)

    def raw(self, method: str, path: str) -> tuple[int, bytes]:
        """As it stands, with a key."""
        connection = http.client.HTTPConnection(self._service.url.removeprefix("http://"), timeout=60)
        headers = {"authorization": f"Bearer {self._key}", "content-type": "application/json"}
        connection.request(method, path, json.dumps({"model": "m"}) if method != "GET" else None, headers)
        answer = connection.getresponse()
        found = answer.status, answer.read()
        connection.close()
        return found

    def model(self, mode: str) -> Path:
        """A model whose engine behaves so."""
        folder = self._models / mode / "model"
        if not folder.exists():
            (make_model_folder(folder) / "mode.txt").write_text(mode)
        return folder

    def asked(self, mode: str) -> list[str]:
        """Paths that engines of this mode were asked for, without the probe's."""
        log = self._models / mode / "requests"
        paths = [json.loads(line)["path"] for line in log.read_text().splitlines()] if log.exists() else []
        return [path for path in paths if path != "/v1/completions"]

    def deploy(self, mode: str = "ok", name: str = "m", **fields: Any) -> httpx.Response:
        return self(
            "POST", "/deployments", json={"name": name, "engine": "pretend", "model": str(self.model(mode)), **fields}
        )

    def shown(self, deployment: str) -> dict[str, Any]:
        shown: dict[str, Any] = self("GET", f"/deployments/{deployment}").json()
        return shown

    def ready(self, deployment: str, seconds: float = 60) -> None:
        wait_for(lambda: self.shown(deployment)["status"] == "ready", seconds)

    def ask(self, name: str = "m") -> tuple[int, str | None]:
        """A chat: status, and the code of its error."""
        body = {"model": name, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
        answer = self("POST", "/v1/chat/completions", json=body)
        if answer.is_success:
            assert answer.json()["choices"][0]["message"]["content"] == "Hello there, friend."
            return answer.status_code, None
        return answer.status_code, answer.json()["error"]["code"]

    def everybody(self) -> set[int]:
        return set(processes_of_attempts(self._settings.instance))

    def engines(self) -> set[int]:
        """Engines alone; what one of them forked is not at the head of a group."""
        return {pid for pid in self.everybody() if _leads(pid) and "fake_engine" in _line(pid)}

    def starts(self, replica: str) -> int:
        """How many engines were ever started for it: each says so first."""
        logs = Storage(self._settings.data_dir).job_dir(replica).glob("a*/log.txt")
        return sum(log.read_text().count("fake engine, mode") for log in logs)


def _leads(pid: int) -> bool:
    try:
        return os.getpgid(pid) == pid
    except ProcessLookupError:
        return False


def _line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


class Repeating(threading.Thread):
    """Does something again and again, beside the test."""

    def __init__(self, act: Callable[[], object], pause: float) -> None:
        super().__init__()
        self._act, self._pause = act, pause
        self._over = threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while not self._over.wait(self._pause):
                self._act()
        except BaseException as error:
            self.error = error

    def end(self) -> None:
        self._over.set()
        self.join(60)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error


@pytest.fixture
def beside() -> Iterator[Callable[..., Repeating]]:
    """``beside(act)``: until the end of the test."""
    started: list[Repeating] = []

    def beside(act: Callable[[], object], pause: float = 0.01) -> Repeating:
        started.append(Repeating(act, pause))
        started[-1].start()
        return started[-1]

    yield beside
    for each in started:
        each.end()


@pytest.fixture
def stand(service: ApiProcess, key: str, settings: Settings, models: Path) -> Stand:
    return Stand(service, key, settings, models)


@pytest.fixture
def places(models: Path) -> dict[str, str]:
    return {"TUNESMITH_MODEL_ROOTS": str(models)}


@pytest.fixture
def second(settings: Settings, valkey_url: str, tmp_path: Path, after_the_fault: None) -> Iterator[WorkerProcess]:
    """Another worker, on slots of its own."""
    second = WorkerProcess(settings, valkey_url, tmp_path / "second.log")
    yield second
    if second.process is not None and second.process.poll() is None:
        second.kill()


@pytest.mark.parametrize(
    ("heir", "lease"),
    [("started again", "30"), ("another", "3"), pytest.param("another", "30", marks=pytest.mark.long)],
)
def test_a_worker_that_is_killed_beside_its_engine(
    stand: Stand,
    service: ApiProcess,
    worker: WorkerProcess,
    second: WorkerProcess,
    places: dict[str, str],
    beside: Callable[..., Repeating],
    timeline: Timeline,
    heir: str,
    lease: str,
) -> None:
    """Case 78. Its engine goes with it, and what that leaked; within a minute another one answers, one alone.

    The worker starts again at once, as ``up`` sees to, or another one gets the job when the lease is over.
    """
    places |= {"TUNESMITH_LEASE_SECONDS": lease, "TUNESMITH_HEARTBEAT_SECONDS": "0.5"}
    service.start(**places)
    worker.start(TUNESMITH_SLOTS="serve:1", **places)
    deployment = stand.deploy("leaks").json()["id"]
    stand.ready(deployment)
    (replica,) = stand.shown(deployment)["replicas"]
    if heir == "another":
        second.start(TUNESMITH_SLOTS="gpu:1", **places)
        wait_for(lambda: len(stand("GET", "/workers").json()["data"]) == 2)
    before, (engine,) = stand.everybody(), stand.engines()
    assert len([pid for pid in before if "fake_engine" in _line(pid)]) == 2, "and its stray child"

    most, told = [0], Counter[tuple[int, str | None]]()
    beside(lambda: most.append(len(stand.engines())))
    asking = beside(lambda: told.update([stand.ask()]))
    wait_for(lambda: told[(200, None)] >= 5)
    worker.kill()
    begun = time.monotonic()
    if heir == "started again":
        worker.start(TUNESMITH_SLOTS="serve:1", **places)
    wait_for(lambda: not before & stand.everybody(), 15)
    timeline.bound("P13", "worker killed → its engine and what that leaked is gone", time.monotonic() - begun, 15)
    answered = told[(200, None)]
    wait_for(lambda: told[(200, None)] > answered, BACK)
    how = "worker started again" if heir == "started again" else f"another worker, lease {lease} s"
    timeline.bound("P15", f"worker killed → its deployment answers ({how})", time.monotonic() - begun, BACK)

    failed = told.total() - told[(200, None)]
    wait_for(lambda: told[(200, None)] >= answered + 20)
    assert told.total() - told[(200, None)] == failed, "from the first answer on all are answered"
    asking.end()
    assert failed, "without an engine there is no answer"
    assert set(told) <= {(200, None), (502, "engine_error"), (503, "model_not_ready")}
    shown = stand.shown(deployment)
    assert [one["id"] for one in shown["replicas"]] == [replica["id"]]
    assert (shown["status"], stand.starts(replica["id"])) == ("ready", 2)
    (new,) = stand.engines()
    assert new != engine
    assert max(most) == 1, "never two at a time"
    assert stand("DELETE", f"/deployments/{deployment}").status_code == 200
    wait_for(lambda: stand.shown(deployment)["status"] == "stopped")
    assert stand.everybody() == set()
    (worker if heir == "started again" else second).ends_well()


def test_whoever_asks_at_once_gets_one_engine(
    stand: Stand, service: ApiProcess, worker: WorkerProcess, places: dict[str, str], beside: Callable[..., Repeating]
) -> None:
    """Case 79. Ten starts of one name, and five stops of it, each at the same time."""
    service.start(**places)
    worker.start(TUNESMITH_SLOTS="serve:3", **places)
    stand.model("ok")
    most = [0]
    beside(lambda: most.append(len(stand.engines())))
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda _: stand.deploy(), range(10)))
        made = [answer.json() for answer in answers if answer.status_code == 201]
        refused = [answer.json()["error"]["code"] for answer in answers if answer.status_code != 201]
        assert (len(made), refused) == (1, ["name_taken"] * 9)
        stand.ready(made[0]["id"])
        assert stand.ask() == (200, None)
        stops = list(pool.map(lambda _: stand("DELETE", f"/deployments/{made[0]['id']}"), range(5)))
    assert [stop.status_code for stop in stops] == [200] * 5
    wait_for(lambda: stand.shown(made[0]["id"])["status"] == "stopped")
    assert stand.everybody() == set()
    assert (max(most), stand.starts(made[0]["replicas"][0]["id"])) == (1, 1)
    assert len(stand("GET", "/deployments").json()["data"]) == 1
    worker.ends_well()


@pytest.mark.parametrize("delays", [(0.0, 0.4), pytest.param([n / 10 for n in range(20)], marks=pytest.mark.long)])
def test_one_that_is_deleted_while_it_starts(
    stand: Stand,
    service: ApiProcess,
    worker: WorkerProcess,
    places: dict[str, str],
    beside: Callable[..., Repeating],
    delays: list[float],
) -> None:
    """Case 79. Before its claim, between claim and engine, before its first answer: it ends, and its name is free."""
    service.start(**places)
    worker.start(TUNESMITH_SLOTS="serve:1", **places)
    wait_for(lambda: stand("GET", "/workers").json()["data"])
    most = [0]
    beside(lambda: most.append(len(stand.engines())))
    for delay in delays:
        made = stand.deploy().json()
        time.sleep(delay)
        for _ in range(2):
            assert stand("DELETE", f"/deployments/{made['id']}").status_code == 200
        wait_for(lambda made=made: stand.shown(made["id"])["status"] == "stopped")
        assert stand.everybody() == set(), f"deleted after {delay} s"
        assert stand.starts(made["replicas"][0]["id"]) <= 1
        assert stand.ask() == (404, "model_not_found")
    again = stand.deploy().json()
    stand.ready(again["id"])
    assert stand.ask() == (200, None)
    assert (max(most), stand.starts(again["replicas"][0]["id"])) == (1, 1)
    assert stand("DELETE", f"/deployments/{again['id']}").status_code == 200
    wait_for(lambda: stand.shown(again["id"])["status"] == "stopped")
    worker.ends_well()


def test_what_a_client_cannot_reach(
    stand: Stand, service: ApiProcess, worker: WorkerProcess, places: dict[str, str]
) -> None:
    """Case 82. Of a ready engine behind the whole API, with a key of every scope."""
    service.start(**places)
    worker.start(TUNESMITH_SLOTS="serve:1", **places)
    deployment = stand.deploy().json()["id"]
    stand.ready(deployment)
    assert stand.ask() == (200, None)
    for method in ("GET", "POST"):
        for path in ROUTES:
            status, text = stand.raw(method, path)
            if status == 200:
                assert (method, path) == ("GET", "/metrics"), "the service's own"
                assert b"vllm:" not in text
            else:
                assert status in (404, 405), (method, path)
    assert stand.asked("ok") == ["/v1/chat/completions"]
    parts = [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest/meta-data/"}}]
    for more in (
        {"messages": [{"role": "user", "content": parts}]},
        {"messages": [], "prompt_embeds": "AAAA"},
        {"n": 16384},
    ):
        body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], **more}
        assert stand("POST", "/v1/chat/completions", json=body).status_code == 400
    assert stand.asked("ok") == ["/v1/chat/completions"]
    assert stand.ask() == (200, None)
    assert stand("DELETE", f"/deployments/{deployment}").status_code == 200
    wait_for(lambda: stand.shown(deployment)["status"] == "stopped")
    worker.ends_well()
