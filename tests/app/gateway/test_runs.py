"""The gateway before a run that answers between its steps: its own words for why it cannot."""

import json
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.app.gateway.doubles import HELLO, Gateway, to, wait_for
from tests.workers.context import RecordingContext
from workers.loading.live import Live, Refused
from workers.loading.live_http import LiveServer

NAME = "numbers:ckpt-live"
CHAT: dict[str, Any] = {"model": NAME, "messages": HELLO}


class Run:
    """One that takes no step by itself."""

    def __init__(self, folder: Path, socket: Path) -> None:
        self.live = Live(RecordingContext(folder), None)
        self.server = LiveServer(socket, self.live)


@pytest.fixture
def run(gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    with tempfile.TemporaryDirectory(prefix="ts-") as folder:
        socket = Path(folder) / "r"
        monkeypatch.setattr(gateway, "find", lambda *_: to(str(socket), served=NAME))
        run = Run(tmp_path, socket)
        yield run
        run.server.close()


def error_of(answer: httpx.Response) -> tuple[int, str, str | None]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("embeddings", {"input": "hi"}),
        ("responses", {"input": "hi"}),
        ("messages", {"messages": HELLO, "max_tokens": 5}),
    ],
)
def test_a_route_that_a_run_does_not_have(gateway: Gateway, run: Run, path: str, body: dict[str, Any]) -> None:
    answer = gateway.post({"model": NAME, **body}, path)
    assert error_of(answer) == (404, "endpoint_not_supported", "model")
    assert f"/v1/{path}" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools_not_supported", "tools"),
        ({"n": 2}, "invalid_value", "n"),
        ({"presence_penalty": 1}, "invalid_value", "presence_penalty"),
    ],
)
def test_the_field_that_a_run_refuses_is_named(
    gateway: Gateway, run: Run, body: dict[str, Any], code: str, param: str
) -> None:
    assert error_of(gateway.post({**CHAT, **body})) == (400, code, param)


@pytest.mark.parametrize("stream", [False, True])
def test_a_second_request_is_told_that_there_is_one(gateway: Gateway, run: Run, stream: bool) -> None:
    first: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: first.append(gateway.post(CHAT)))
    thread.start()
    wait_for(run.live._busy.locked)
    answer = gateway.post({**CHAT, "stream": stream})
    assert error_of(answer) == (503, "model_not_ready", None)
    assert answer.json()["error"]["message"].endswith("now: this run answers one request at a time")
    assert answer.headers["retry-after"] == "2"
    run.live.end()
    thread.join(20)
    assert first[0].json()["error"]["message"].endswith("now: the run has ended")


def test_a_stream_that_waits_too_long_says_why(gateway: Gateway, run: Run) -> None:
    got: list[str] = []

    def post() -> None:
        got.append(gateway.post({**CHAT, "stream": True}).text)

    thread = threading.Thread(target=post)
    thread.start()
    wait_for(run.live._busy.locked)
    ask = run.live._next()
    assert ask is not None
    ask.pieces.put("one")
    ask.pieces.put(Refused(503, "the run is in the middle of a step that takes longer"))
    thread.join(20)
    told = [json.loads(line.removeprefix("data: ")) for line in got[0].splitlines() if '"error"' in line]
    assert told[0]["error"]["message"].endswith("now: the run is in the middle of a step that takes longer")
    assert told[0]["error"]["code"] == "model_not_ready"
