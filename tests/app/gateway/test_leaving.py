"""A client that leaves at the very moment when its engine answers: nothing of its request is left."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from app.deployments.manners import Manner
from app.deployments.routes import Route
from app.gateway import waking
from app.gateway.desk import Desk
from app.gateway.limits import Limiter
from app.gateway.proxy import EngineClient
from app.gateway.router import _complete
from app.gateway.schemas import ChatRequest
from app.projects.caller import Caller, KeyLimits
from app.usage.meter import Meter
from tests.app.gateway.doubles import HELLO, to

CALLER = Caller("p1", "k1", frozenset({"serve"}), KeyLimits(concurrent_requests=1))
TURNS = 7
"""Of the event loop: more than lie between an engine's first byte and the client."""


class Answer:
    """Of an engine that has begun, and says nothing more."""

    status = 200

    def __init__(self) -> None:
        self.closed = False
        self.content = self

    def close(self) -> None:
        self.closed = True

    async def read(self) -> bytes:
        await asyncio.Event().wait()
        raise AssertionError

    async def iter_any(self) -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""


class Engines(EngineClient):
    """One that begins to answer after so many turns of the loop."""

    def __init__(self, turns: int, stubborn: bool) -> None:
        super().__init__(SimpleNamespace(remembered=lambda _: Manner()))  # type: ignore[arg-type]
        self._turns_left = turns
        self._stubborn = stubborn
        self.answers: list[Answer] = []

    async def _find(self, *_: Any) -> Route:
        return to("/s", served="m")

    async def _send(self, *_: Any) -> Any:
        for _ in range(self._turns_left):
            try:
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                if not self._stubborn:
                    raise
        self.answers.append(Answer())
        return self.answers[-1]

    @property
    def outstanding(self) -> int:
        return sum(engine.outstanding for engine in self._engines.values())


async def left_behind(
    answers_after: int, leaves_after: int, *, streamed: bool, cancelled: bool, stubborn: bool
) -> tuple[int, int, bool]:
    """What a request leaves behind: requests that the engine has, those that the key has, an open connection."""
    engines, limiter = Engines(answers_after, stubborn), Limiter()
    desk = Desk(engines, limiter, Meter(None))  # type: ignore[arg-type]

    async def receive() -> dict[str, Any]:
        for _ in range(10_000 if cancelled else leaves_after):
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        await asyncio.sleep(0)

    async def served() -> None:
        state = SimpleNamespace(request_id="req_1")
        app = SimpleNamespace(state=SimpleNamespace(desk=desk))
        url = SimpleNamespace(path="/v1/chat/completions")
        request: Any = SimpleNamespace(app=app, state=state, url=url, receive=receive)
        body = ChatRequest.model_validate({"model": "m", "messages": HELLO, "stream": streamed})
        response = await _complete(request, body, CALLER, lambda *_: to("/s"))
        await response({"type": "http"}, receive, send)

    request = asyncio.create_task(served())
    if cancelled:
        for _ in range(leaves_after):
            await asyncio.sleep(0)
        request.cancel()
    await asyncio.gather(request, return_exceptions=True)
    for _ in range(4 * TURNS):
        await asyncio.sleep(0)
    found = engines.outstanding, limiter._running["k1"], not all(answer.closed for answer in engines.answers)
    await engines.close()
    return found


@pytest.mark.parametrize("quiet", [60.0, 0.0], ids=["in time", "late"])
@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("cancelled", [False, True], ids=["the client leaves", "the service stops"])
@pytest.mark.parametrize("stubborn", [False, True], ids=["called off", "not to be called off"])
def test_in_whatever_order_it_comes(
    monkeypatch: pytest.MonkeyPatch, quiet: float, streamed: bool, cancelled: bool, stubborn: bool
) -> None:
    monkeypatch.setattr(waking, "QUIET_SECONDS", quiet)

    async def run() -> dict[tuple[int, int], tuple[int, int, bool]]:
        return {
            (answers, leaves): await left_behind(
                answers, leaves, streamed=streamed, cancelled=cancelled, stubborn=stubborn
            )
            for answers in range(TURNS)
            for leaves in range(2 * TURNS)
        }

    found = asyncio.run(run())
    assert {order: left for order, left in found.items() if left != (0, 0, False)} == {}
