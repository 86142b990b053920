"""A request for a model that is on its way waits for it, with a bound; a stream says meanwhile that it is there."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from app.deployments.service import Route
from app.errors import Code, NotFound, Unavailable
from app.gateway import waking
from app.gateway.waking import Late, awake, within
from tests.app.gateway.doubles import to

ROUTE = to("/s", served="m")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waking, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(waking, "QUIET_SECONDS", 0.01)


class Clock:
    """A clock that goes on by one second with each look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def not_yet(code: Code = Code.MODEL_WAKING) -> Unavailable:
    return Unavailable("not yet", retry_after=5, code=code)


def test_it_waits_until_there_is_a_route() -> None:
    answers = [not_yet(), not_yet(), ROUTE]

    async def find() -> Route:
        answer = answers.pop(0)
        if isinstance(answer, Unavailable):
            raise answer
        return answer

    assert asyncio.run(awake(find, 60, Clock())) == ROUTE
    assert answers == []


@pytest.mark.parametrize("error", [NotFound("nobody"), not_yet(Code.MODEL_NOT_READY)])
def test_what_is_not_on_its_way_is_not_waited_for(error: Exception) -> None:
    asked = 0

    async def find() -> Route:
        nonlocal asked
        asked += 1
        raise error

    with pytest.raises(type(error)):
        asyncio.run(awake(find, 60, Clock()))
    assert asked == 1


def test_after_its_time_it_is_503_with_the_time_to_come_back() -> None:
    async def find() -> Route:
        raise not_yet()

    clock = Clock()
    with pytest.raises(Unavailable) as caught:
        asyncio.run(awake(find, 10, clock))
    assert clock.now > 10
    assert (caught.value.code, caught.value.status, caught.value.retry_after) == ("model_waking", 503, 5)


class Upstream:
    """An answer of two events."""

    def __init__(self) -> None:
        self.aborted = False

    async def events(self) -> AsyncIterator[bytes]:
        yield b"data: {}\n\n"
        yield b"data: [DONE]\n\n"

    def end(self) -> None:
        self.aborted = True


def test_a_stream_is_not_silent_while_it_waits() -> None:
    async def run() -> list[bytes]:
        coming: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        found = await within(coming, 0.01)
        assert isinstance(found, Late)
        pieces = []
        async for piece in found.events():
            pieces.append(piece)
            if len(pieces) == 3:
                coming.set_result(Upstream())
        return pieces

    pieces = asyncio.run(run())
    assert all(piece.startswith(b": ") for piece in pieces[:3])
    assert pieces[-2:] == [b"data: {}\n\n", b"data: [DONE]\n\n"]


def test_what_goes_wrong_then_is_an_event() -> None:
    async def run() -> list[bytes]:
        coming: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        late = Late(coming, anthropic=False)
        asyncio.get_running_loop().call_later(0.005, coming.set_exception, not_yet())
        return [piece async for piece in late.events()]

    *comments, last = asyncio.run(run())
    assert comments
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "model_waking"


def test_what_goes_wrong_at_once_is_an_answer_with_its_status() -> None:
    async def run() -> None:
        coming: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        coming.set_exception(NotFound("nobody"))
        await within(coming)

    with pytest.raises(NotFound):
        asyncio.run(run())


def test_a_client_that_leaves_ends_it() -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        coming: asyncio.Future[Any] = loop.create_future()
        Late(coming, anthropic=False).end()
        assert coming.cancelled()
        there: asyncio.Future[Any] = loop.create_future()
        upstream = Upstream()
        there.set_result(upstream)
        Late(there, anthropic=False).end()
        assert upstream.aborted

    asyncio.run(run())
