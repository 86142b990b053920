"""Several engines behind one name: who gets the next request, and what becomes of those of one that dies."""

import contextlib
import json
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from app.deployments.routes import Route
from app.gateway.proxy import FAILING_SECONDS
from tests.app.gateway.doubles import HELLO, Engine, Gateway, to, wait_for

SLOW = [{"role": "user", "content": "slow_stream"}]


@pytest.fixture
def engines(gateway: Gateway) -> Iterator[list[Engine]]:
    """Three behind ``served-name``."""
    with contextlib.ExitStack() as stack:
        others = [Engine(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ts-")))) for _ in range(2)]
        found = [gateway.engine, *others]

        def find(model: str, project_id: str) -> Route:
            return to(*(engine.socket for engine in found))

        gateway.find = find  # type: ignore[method-assign]
        yield found
        for engine in others:
            if Path(engine.socket).exists():
                engine.stop()


@pytest.fixture
def stream(gateway: Gateway) -> Iterator[Callable[[], httpx.Response]]:
    """Opens a stream that does not end."""
    with contextlib.ExitStack() as stack, httpx.Client(timeout=20) as client:
        reading = []  # an iterator that is let go hangs up

        def stream() -> httpx.Response:
            body = {"model": "served-name", "messages": SLOW, "stream": True}
            response = stack.enter_context(client.stream("POST", f"{gateway.url}/v1/chat/completions", json=body))
            reading.append(response.iter_bytes())
            next(reading[-1])
            return response

        yield stream


def counts(engines: list[Engine]) -> list[int]:
    return [sum("body" in line for line in engine.requests()) for engine in engines]


def test_one_after_the_other_while_nobody_is_busy(gateway: Gateway, engines: list[Engine]) -> None:
    for _ in range(9):
        assert gateway.post({"model": "served-name", "messages": HELLO}).status_code == 200
    assert counts(engines) == [3, 3, 3]


def test_the_least_busy_one_is_next(
    gateway: Gateway, engines: list[Engine], stream: Callable[[], httpx.Response]
) -> None:
    first, _ = stream(), stream()
    assert counts(engines) == [1, 1, 0]
    for _ in range(6):
        assert gateway.post({"model": "served-name", "messages": HELLO}).status_code == 200
    assert counts(engines) == [1, 1, 6], "two are busy for a long time"
    first.close()
    wait_for(lambda: any("aborted" in line for line in engines[0].requests()))
    for _ in range(6):
        assert gateway.post({"model": "served-name", "messages": HELLO}).status_code == 200
    assert counts(engines) == [4, 1, 9], "whoever is free again gets his share"


def test_what_failed_or_was_refused_is_over_too(gateway: Gateway, engines: list[Engine]) -> None:
    for word, status in (("bad_request", 400), ("lies", 502)):
        for _ in range(3):
            answer = gateway.post({"model": "served-name", "messages": [{"role": "user", "content": word}]})
            assert answer.status_code == status
    before = counts(engines)
    for _ in range(3):
        assert gateway.post({"model": "served-name", "messages": HELLO}).status_code == 200
    assert [after - one for one, after in zip(before, counts(engines), strict=True)] == [1, 1, 1]


def test_one_that_is_gone_costs_no_request(gateway: Gateway, engines: list[Engine]) -> None:
    engines[1].stop()
    answers = [gateway.post({"model": "served-name", "messages": HELLO}) for _ in range(6)]
    assert [answer.status_code for answer in answers] == [200] * 6


def test_one_that_dies_before_its_first_word_costs_no_request(gateway: Gateway, engines: list[Engine]) -> None:
    engines[0].pause()
    answers: list[int] = []

    def ask() -> None:
        answers.append(gateway.post({"model": "served-name", "messages": HELLO}).status_code)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(answers) >= 4)
    assert len(answers) < 6, "some wait for the one that does not answer"
    engines[0].stop()
    for thread in threads:
        thread.join(20)
    assert answers == [200] * 6


def test_a_stream_whose_engine_dies_before_its_first_word_is_another_ones(
    gateway: Gateway, engines: list[Engine]
) -> None:
    """The head of a stream is out before the prompt is read."""
    engines[0].stop()
    engines[0].start(mode="dies_unheard")
    body = {"model": "served-name", "messages": HELLO, "stream": True}
    answers = [gateway.post(body) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200] * 3
    assert all(answer.text.endswith("data: [DONE]\n\n") and '"error"' not in answer.text for answer in answers)
    assert counts(engines)[0] == 1


def test_a_stream_that_no_engine_begins_is_an_error(gateway: Gateway, engines: list[Engine]) -> None:
    body = {"model": "served-name", "messages": [{"role": "user", "content": "dies_unheard"}], "stream": True}
    answer = gateway.post(body)
    assert (answer.status_code, answer.json()["error"]["type"]) == (502, "server_error")
    assert counts(engines) == [1, 1, 1]
    assert gateway.counted[-1]["failed"], gateway.counted


def test_one_that_fails_at_once_does_not_draw_the_traffic(gateway: Gateway, engines: list[Engine]) -> None:
    """It never has anything to do; the one that is well is asked in its place, and from then on first."""
    for engine in engines[1:]:
        engine.stop()
        engine.start(mode="lies")
    now = [100.0]
    gateway.clock = lambda: now[0]
    answers = [gateway.post({"model": "served-name", "messages": HELLO}) for _ in range(12)]
    assert [answer.status_code for answer in answers] == [200] * 12
    assert counts(engines) == [12, 1, 1]
    now[0] += FAILING_SECONDS
    answers = [gateway.post({"model": "served-name", "messages": HELLO}) for _ in range(12)]
    assert [answer.status_code for answer in answers] == [200] * 12
    assert counts(engines) == [24, 2, 2], "now and then they are tried again"


def test_one_that_dies_in_the_middle_of_an_answer_is_told_of(gateway: Gateway, engines: list[Engine]) -> None:
    body = {"model": "served-name", "messages": SLOW, "stream": True}
    with (
        httpx.Client(timeout=20) as client,
        client.stream("POST", f"{gateway.url}/v1/chat/completions", json=body) as response,
    ):
        pieces = response.iter_lines()
        next(pieces)
        engines[0].stop()
        last = [line for line in pieces if line.startswith("data: ")][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"]
    assert counts(engines) == [1, 0, 0], "a client that has seen a part is not given another answer's rest"


def test_when_all_are_gone_that_is_said(gateway: Gateway, engines: list[Engine]) -> None:
    for engine in engines:
        engine.stop()
    answer = gateway.post({"model": "served-name", "messages": HELLO})
    assert answer.status_code in (502, 503)
    assert answer.json()["error"]["code"]
    gateway.engine.start()
