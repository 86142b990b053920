"""Traffic through an alias: split, moved and cut off, with no request that fails."""

import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.aliases.traffic import Split
from app.deployments.service import Route
from tests.app.gateway.doubles import HELLO, Engine, Gateway, to


@pytest.fixture
def other() -> Iterator[Engine]:
    with tempfile.TemporaryDirectory(prefix="ts-") as folder:
        engine = Engine(Path(folder))
        yield engine
        if Path(engine.socket).exists():
            engine.stop()


def routes(gateway: Gateway, other: Engine) -> tuple[Route, Route]:
    return to(gateway.engine.socket), to(other.socket, deployment="dep-2")


def test_a_user_stays_on_one_side_and_no_user_is_split_by_request(gateway: Gateway, other: Engine) -> None:
    main, canary = routes(gateway, other)
    gateway.split = Split("prod", main, canary, 50)
    for user in ("ann", "bob", "eve", "joe"):
        for _ in range(3):
            body = {"model": "prod", "messages": HELLO, "user": user}
            assert gateway.post(body).json()["model"] == "prod"
    for _ in range(3):
        metadata = {"user_id": "ann"}
        gateway.post({"model": "prod", "messages": HELLO, "max_tokens": 5, "metadata": metadata}, "messages")
    sides = {
        user: {route.deployment_id for route in [gateway.split.routes_for(user)[0]]}
        for user in ("ann", "bob", "eve", "joe")
    }
    expected = Counter(next(iter(side)) for side in sides.values() for _ in range(3))
    expected[next(iter(sides["ann"]))] += 3
    assert Counter({"dep-1": len(gateway.engine.requests()), "dep-2": len(other.requests())}) == expected
    before = len(gateway.engine.requests()), len(other.requests())
    for _ in range(30):
        gateway.post({"model": "prod", "messages": HELLO})
    after = len(gateway.engine.requests()), len(other.requests())
    # Each request has an id of its own: both sides get some (one in 2**29 that they do not).
    assert after[0] > before[0]
    assert after[1] > before[1]


def test_a_side_that_nobody_listens_on_costs_no_request(gateway: Gateway, other: Engine) -> None:
    main, canary = routes(gateway, other)
    gateway.split = Split("prod", main, canary, 50)
    other.stop()
    answers = [gateway.post({"model": "prod", "messages": HELLO}) for _ in range(10)]
    assert {answer.status_code for answer in answers} == {200}


def test_both_sides_gone_is_a_503(gateway: Gateway, other: Engine) -> None:
    gateway.split = Split("prod", *routes(gateway, other), 50)
    other.stop()
    gateway.engine.stop()
    answer = gateway.post({"model": "prod", "messages": HELLO})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_not_ready")


def test_an_alias_moves_under_traffic_and_no_request_fails(gateway: Gateway, other: Engine) -> None:
    main, canary = routes(gateway, other)
    gateway.split = Split("prod", main)
    seen: list[int] = []
    stop = threading.Event()

    def ask(stream: bool) -> None:
        while not stop.is_set():
            answer = gateway.post({"model": "prod", "messages": HELLO, "stream": stream})
            good = answer.status_code == 200 and (not stream or answer.text.endswith("[DONE]\n\n"))
            seen.append(200 if good else answer.status_code)

    threads = [threading.Thread(target=ask, args=(number % 2 == 0,)) for number in range(4)]
    for thread in threads:
        thread.start()
    # Canary, promotion, rollback. A clock that the test sets makes each known at once.
    now = 0.0
    gateway.clock = lambda: now
    for split in (Split("prod", main, canary, 50), Split("prod", canary), Split("prod", main)):
        gateway.split = split
        now += 10
        upto = len(seen) + 20
        while len(seen) < upto:
            stop.wait(0.01)
    stop.set()
    for thread in threads:
        thread.join(20)
    assert set(seen) == {200}
    assert gateway.engine.requests()
    assert other.requests()
