"""Asking a served model: in order, several at a time, patient with what passes, and no longer than that."""

import json
import socketserver
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from app.catalog import Interrupted, Served
from app.errors import Code, RunError
from tests.workers.context import RecordingContext
from workers.loading.served import ServedModel

Answer = Callable[[dict[str, Any]], tuple[int, Any]]


def said(body: dict[str, Any]) -> tuple[int, Any]:
    return 200, {"model": body["model"], "choices": [{"index": 0, "text": f"re: {body['prompt']}"}]}


class Stand(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """An engine whose answers are a function; it knows how many requests it had at a time."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, socket: Path, answer: Answer = said) -> None:
        super().__init__(str(socket), Handler)
        self.answer, self.bodies, self.most = answer, list[dict[str, Any]](), 0
        self.way = Served((socket,), "inner")
        self.headers: list[str] = []
        self._now = 0
        self._lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=[0.02], daemon=True).start()

    def handle_error(self, *_: Any) -> None:
        """Clients that hang up are part of it."""

    def take(self, body: dict[str, Any]) -> tuple[int, Any]:
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
            self.bodies.append(body)
        time.sleep(0.02)
        try:
            return self.answer(body)
        finally:
            with self._lock:
                self._now -= 1


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Stand

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def do_GET(self) -> None:
        listing = [{"id": "adapter", "max_model_len": None}, {"id": "inner", "max_model_len": 77}]
        self._send(200, {"data": listing})

    def do_POST(self) -> None:
        self.server.headers += [name.lower() for name in self.headers]
        self._send(*self.server.take(json.loads(self.rfile.read(int(self.headers["content-length"])))))

    def _send(self, status: int, value: Any) -> None:
        if status == 0:  # hangs up
            self.close_connection = True
            return
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Asking(RecordingContext):
    """Where the model is served is what the test says."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.way: Callable[[], Served | str] = lambda: "nobody has said it yet"
        self.fields: set[str] = set()
        self.stop_at: int | None = None
        self.ticks = 0

    def served(self, field: Any) -> Served | str:
        self.fields.add(field)
        return self.way()

    def tick(self) -> None:
        self.ticks += 1

    def stop_requested(self) -> bool:
        return self.stop_at is not None and self.ticks >= self.stop_at


@pytest.fixture
def sockets() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ts-") as folder:
        yield Path(folder)


@pytest.fixture
def ctx(tmp_path: Path) -> Asking:
    return Asking(tmp_path)


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.loading.served.PAUSE_SECONDS", 0.05)
    monkeypatch.setattr("workers.loading.served.PATIENCE_SECONDS", 1.0)


def text(_: int, answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["text"])


def prompts(count: int) -> list[dict[str, Any]]:
    return [{"prompt": number} for number in range(count)]


def test_answers_come_in_order_from_several_requests_at_a_time(sockets: Path, ctx: Asking) -> None:
    engine = Stand(sockets / "a")
    ctx.way = lambda: engine.way
    served = ServedModel(ctx, "model", 4)
    answers = served.ask(prompts(20), text)
    assert answers == [f"re: {number}" for number in range(20)]
    assert {body["model"] for body in engine.bodies} == {"inner"}
    assert 1 < engine.most <= 4
    assert "authorization" not in engine.headers
    assert (ctx.fields, served.name, ctx.ticks) == ({"model"}, "inner", 20)
    assert ctx.steps[-1]["step"] == ctx.steps[-1]["total"] == 20
    assert served.ask([], text) == []
    assert served.room(5) == 77


def test_an_engine_that_starts_anew_on_another_socket_is_found(sockets: Path, ctx: Asking) -> None:
    """It hangs up on the third request; then nobody answers for a while; then there is another one."""
    first = Stand(sockets / "a", lambda body: (0, None) if body["prompt"] >= 2 else said(body))
    second = Stand(sockets / "b")
    ways: list[Served | str] = [
        *[first.way] * 6,
        "it is starting",
        Served((sockets / "nobody",), "x"),
        "it is starting",
    ]
    ctx.way = lambda: ways.pop(0) if ways else second.way
    answers = ServedModel(ctx, "baseline", 2).ask(prompts(6), text)
    assert answers == [f"re: {number}" for number in range(6)]
    assert second.bodies
    assert ctx.codes() == ["engine_awaited"]


def test_several_engines_are_asked_in_turn(sockets: Path, ctx: Asking) -> None:
    """One of them is not there: its requests go to the others."""
    first, second = Stand(sockets / "a"), Stand(sockets / "b")
    ctx.way = lambda: Served((*first.way.sockets, sockets / "nobody", *second.way.sockets), "inner")
    answers = ServedModel(ctx, "model", 3).ask(prompts(12), text)
    assert answers == [f"re: {number}" for number in range(12)]
    assert min(len(first.bodies), len(second.bodies)) > 2
    assert len(first.bodies) + len(second.bodies) == 12


@pytest.mark.parametrize("status", [404, 429, 503])
def test_what_passes_is_tried_again(status: int, sockets: Path, ctx: Asking) -> None:
    refused: list[int] = []

    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        if len(refused) < 3:
            refused.append(status)
            return status, {"error": {"message": "not now"}}
        return said(body)

    engine = Stand(sockets / "a", answer)
    ctx.way = lambda: engine.way
    assert len(ServedModel(ctx, "model", 1).ask(prompts(2), text)) == 2
    assert len(engine.bodies) == 5


def test_what_the_engine_refuses_ends_the_job_with_its_own_words(sockets: Path, ctx: Asking) -> None:
    engine = Stand(sockets / "a", lambda _: (400, {"error": {"message": "echo is not supported"}}))
    ctx.way = lambda: engine.way
    with pytest.raises(RunError, match="echo is not supported") as caught:
        ServedModel(ctx, "model", 2).ask(prompts(3), text)
    assert (caught.value.code, caught.value.param, caught.value.transient) == (Code.BAD_SPEC, "deployment", False)


@pytest.mark.parametrize("answer", [(500, {"error": {"message": "a kernel fell over"}}), (500, b"<html>")])
def test_an_engine_that_fails_again_and_again_is_given_up(answer: Any, sockets: Path, ctx: Asking) -> None:
    engine = Stand(sockets / "a", lambda _: answer)
    ctx.way = lambda: engine.way
    with pytest.raises(RunError, match="failed 5 times at one request") as caught:
        ServedModel(ctx, "model", 1).ask(prompts(1), text)
    assert (caught.value.code, caught.value.transient) == (Code.ENGINE_ERROR, True)
    assert len(engine.bodies) == 5


def test_patience_ends(sockets: Path, ctx: Asking) -> None:
    ctx.way = lambda: "the model plain is queued"
    began = time.monotonic()
    with pytest.raises(RunError, match="has not answered for 1 s: the model plain is queued") as caught:
        ServedModel(ctx, "model", 3).ask(prompts(3), text)
    assert (caught.value.code, caught.value.transient) == (Code.MODEL_NOT_READY, True)
    assert 0.9 < time.monotonic() - began < 10
    nowhere = Served((sockets / "nobody",), "x")
    ctx.way = lambda: nowhere
    with pytest.raises(RunError, match="it does not answer"):
        ServedModel(ctx, "model", 1).ask(prompts(1), text)
    broken = Stand(sockets / "a", lambda _: (200, b"not json"))
    ctx.way = lambda: broken.way
    with pytest.raises(RunError, match="it does not answer"):
        ServedModel(ctx, "model", 1).ask(prompts(1), text)


def test_one_that_is_no_longer_served_ends_the_job_at_once(ctx: Asking) -> None:
    def gone() -> Served:
        raise RunError(Code.MODEL_NOT_FOUND, "'plain' is not being served", param="deployment")

    ctx.way = gone
    with pytest.raises(RunError, match="not being served"):
        ServedModel(ctx, "model", 2).ask(prompts(4), text)
    assert ctx.ticks == 0


def test_a_run_that_is_to_stop_hangs_up(sockets: Path, ctx: Asking) -> None:
    """In the middle of answers that never come."""
    never = threading.Event()

    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        if body["prompt"] >= 2:
            never.wait(30)
        return said(body)

    engine = Stand(sockets / "a", answer)
    ctx.way = lambda: engine.way
    ctx.stop_at = 2
    began = time.monotonic()
    with pytest.raises(Interrupted):
        ServedModel(ctx, "model", 2).ask(prompts(10), text)
    assert time.monotonic() - began < 5
    assert len(engine.bodies) <= 4
    never.set()


def test_an_attempt_that_goes_on_asks_only_what_is_left(sockets: Path, tmp_path: Path) -> None:
    """The first was to stop, the second was killed while it wrote down what it heard."""
    engine = Stand(sockets / "a")
    attempts = [Asking(tmp_path) for _ in range(4)]
    for one in attempts:
        one.way = lambda: engine.way
    bodies = [*prompts(10), *prompts(10)]
    attempts[0].stop_at = 6
    with pytest.raises(Interrupted):
        ServedModel(attempts[0], "model", 1).ask(bodies, text)
    (file,) = tmp_path.glob("kept/said-*.jsonl")
    known = len(file.read_text().splitlines())
    assert 6 <= known < 20
    with file.open("a") as torn:
        torn.write('["1-ab')
    before = len(engine.bodies)
    served = ServedModel(attempts[1], "model", 3)
    assert served.ask(bodies, text) == [f"re: {number}" for number in [*range(10), *range(10)]]
    assert len(engine.bodies) - before == 20 - known
    assert attempts[1].events == [
        {
            "code": "answers_kept",
            "message": "Answers of an earlier attempt are used.",
            "level": "info",
            "answers": known,
        }
    ]
    engine.bodies.clear()
    again = ServedModel(attempts[2], "model", 3)
    assert again.ask(bodies, text) == served.ask(bodies, text)
    assert (again.name, engine.bodies) == ("inner", [])
    ServedModel(attempts[3], "baseline", 3).ask(prompts(2), text)
    assert len(engine.bodies) == 2, "of the other model nothing is known"
