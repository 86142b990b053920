"""What a client is told while an engine goes wrong: the whole API in front of an engine under real supervision."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.processes import processes_with_token
from tests.support import wait_for
from tests.workers.serving.conftest import Serving

pytestmark = pytest.mark.fault
PATIENT = 30.0


class Client:
    """Asks the deployment; each answer is a status and an error code."""

    def __init__(self, api: TestClient) -> None:
        self.api = api

    def ask(self, **more: Any) -> tuple[int, str | None]:
        """A completion, or why there is none; what may be tried again says when."""
        answer = self.api.post("/v1/completions", json={"model": "plain", "prompt": "x", **more})
        error = {} if answer.is_success else answer.json()["error"]
        assert answer.status_code not in (502, 503) or int(answer.headers["retry-after"]) > 0
        assert "/opt" not in answer.text, "an engine's words may name files"
        return answer.status_code, error.get("code")

    def answered(self) -> bool:
        return self.ask() == (200, None)

    def models(self) -> dict[str, str]:
        return {entry["id"]: entry["status"] for entry in self.api.get("/v1/models").json()["data"]}


@pytest.fixture
def client(api: TestClient) -> Client:
    return Client(api)


class Watching(threading.Thread):
    """Which states a deployment went through, and how many engines it had at most."""

    def __init__(self, serving: Serving) -> None:
        super().__init__()
        self._serving = serving
        self._over = threading.Event()
        self.states: list[str] = []
        self.most = 0

    def run(self) -> None:
        while not self._over.wait(0.01):
            state = self._serving.shown()["status"]
            if self.states[-1:] != [state]:
                self.states.append(state)
            self.most = max(self.most, len(self._serving.engines()))

    def end(self) -> None:
        self._over.set()
        self.join()


@pytest.fixture
def watch() -> Iterator[Callable[[Serving], Watching]]:
    started: list[Watching] = []

    def watch(serving: Serving) -> Watching:
        started.append(Watching(serving))
        started[-1].start()
        return started[-1]

    yield watch
    for each in started:
        each.end()


def over(serving: Serving, client: Client) -> None:
    """It failed: its name is nobody's, and no process is left."""
    wait_for(lambda: serving.shown()["status"] == "failed", PATIENT)
    wait_for(lambda: client.ask() == (404, "model_not_found"))
    assert client.models() == {}
    assert [pid for token in serving.tokens for pid in processes_with_token(token)] == []


@pytest.mark.parametrize("mode", ["exits", "never_ready", "lies"])
def test_one_that_never_answers(serve: Callable[..., Serving], client: Client, mode: str) -> None:
    """Case 76. Each of them is a 503 for as long as there is hope, then a 404; never an answer, never a wait."""
    serving = serve(start_timeout=10)
    told = set()
    while serving.shown()["status"] != "failed":
        told.add(client.ask())
        assert client.models() in ({}, {"plain": "queued"}, {"plain": "starting"})
    assert (503, "model_not_ready") in told
    assert told <= {(503, "model_not_ready"), (404, "model_not_found")}
    over(serving, client)


@pytest.mark.parametrize("mode", ["hangs"])
def test_one_that_hangs_lets_nobody_wait_for_ever(
    serve: Callable[..., Serving],
    client: Client,
    watch: Callable[[Serving], Watching],
    quick_probes: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Case 76. It is unhealthy, then killed; who asked it is told; it hangs again, and that is a crash loop."""
    monkeypatch.setattr("workers.replicas.CRASH_LOOP", 2)
    serving = serve()
    watching = watch(serving)
    serving.ready()
    first = serving.token
    assert client.ask() == (502, "engine_error"), "it waited for an answer until the engine was killed"
    wait_for(lambda: processes_with_token(first) == [])
    over(serving, client)
    watching.end()
    assert watching.states.index("ready") < watching.states.index("unhealthy") < watching.states.index("failed")
    error = serving.shown()["last_error"]
    assert (error["code"], "unresponsive" in error["message"]) == ("engine_crash_loop", True)
    assert serving.codes().count("engine_unhealthy") == 6, "three probes of each"
    assert watching.most == 1


@pytest.mark.parametrize(("mode", "file"), [("flaky", "sick"), ("busy", "busy")])
def test_one_that_goes_wrong_while_health_says_200_is_replaced(
    serve: Callable[..., Serving],
    client: Client,
    watch: Callable[[Serving], Watching],
    quick_probes: None,
    mode: str,
    file: str,
) -> None:
    """Case 76. Every completion a 500, or none ever comes: another engine answers, and nobody had to ask for it."""
    serving = serve()
    watching = watch(serving)
    serving.ready()
    assert client.answered()
    first, socket = serving.token, serving.router.route_for("plain", "proj-default").targets[0].socket
    Path(f"{socket}.{file}").touch()
    assert client.ask() == (502, "engine_error")
    wait_for(lambda: serving.shown()["restarts"] == 1, PATIENT)
    wait_for(client.answered, PATIENT)
    assert processes_with_token(first) == []
    watching.end()
    assert "unhealthy" in watching.states
    assert watching.most == 1
    assert all(client.answered() for _ in range(10))
    assert serving.shown()["restarts"] == 1


@pytest.mark.parametrize("mode", ["dies"])
def test_one_that_dies_in_use(
    serve: Callable[..., Serving], client: Client, watch: Callable[[Serving], Watching]
) -> None:
    """Case 76. The tenth completion kills it, each time: whoever asks again is answered again."""
    serving = serve()
    watching = watch(serving)
    serving.ready()
    for restarts in (1, 2):
        answers = [client.ask() for _ in range(9)]
        assert answers == [(200, None)] * 8 + [(502, "engine_error")]
        wait_for(lambda restarts=restarts: serving.shown()["restarts"] == restarts)
        wait_for(lambda: serving.shown()["status"] == "ready")
    assert client.answered()
    watching.end()
    assert watching.most == 1


@pytest.mark.parametrize("mode", ["leaks"])
@pytest.mark.parametrize("victim", ["engine", "keeper"])
def test_what_it_leaked_is_gone_before_the_next_one_starts(
    serve: Callable[..., Serving], client: Client, victim: str
) -> None:
    """Cases 76, 77. A child in a session of its own, deaf to SIGTERM: it would hold the GPU's memory."""
    serving = serve()
    serving.ready()
    old = serving.token
    before = processes_with_token(old)
    (engine,) = serving.engines()
    lines = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in before}
    assert sum("fake_engine" in line for line in lines.values()) == 2, "the engine and its stray child"
    keeper = min(pid for pid, line in lines.items() if "workers.replica" in line)
    os.kill(engine if victim == "engine" else keeper, signal.SIGKILL)
    # The token of the next attempt is made when it is claimed, before anything of it is started.
    wait_for(lambda: serving.token != old)
    assert processes_with_token(old) == []
    wait_for(client.answered, PATIENT)
    assert len(serving.engines()) == 1
