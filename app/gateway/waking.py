"""Patience with a model that is on its way: its engine is woken, or its adapter is loaded."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from app.errors import AppError, Code, Unavailable
from app.gateway import refusals
from app.gateway.upstream import Events, Upstream

Found = TypeVar("Found")

FIRST_PAUSE = 0.05
LONGEST_PAUSE = 1.0
QUIET_SECONDS = 5.0
"""How long a stream may keep silent before a comment says that it is still there."""


async def awake(find: Callable[[], Awaitable[Found]], seconds: float, clock: Callable[[], float]) -> Found:
    """The route, as soon as there is one. Raises what ``find`` raises; ``model_waking`` only after ``seconds``."""
    until, pause = clock() + seconds, FIRST_PAUSE
    while True:
        try:
            return await find()
        except Unavailable as error:
            if error.code is not Code.MODEL_WAKING or clock() + pause > until:
                raise
        await asyncio.sleep(pause)
        pause = min(pause * 1.5, LONGEST_PAUSE)


class Late:
    """A stream whose engine is not there yet: comments until it is, then its events, or what went wrong as one.

    The status 200 is out by then, so an error can only be an event; whoever reads the stream finds it there.
    """

    def __init__(self, coming: "asyncio.Future[Upstream]", *, anthropic: bool) -> None:
        self._coming = coming
        self._anthropic = anthropic

    async def events(self) -> AsyncIterator[bytes]:
        """Never silent for longer than ``QUIET_SECONDS`` before the first event."""
        while not self._coming.done():
            yield b": the model has not begun to answer\n\n"
            await asyncio.wait({self._coming}, timeout=QUIET_SECONDS)
        try:
            upstream = self._coming.result()
        except AppError as error:
            yield refusals.as_event(error, anthropic=self._anthropic) + b"\n\n"
            return
        async for event in upstream.events():
            yield event

    def end(self) -> None:
        """Nobody waits any more."""
        leave(self._coming)


async def within(
    coming: "asyncio.Future[Upstream]", seconds: float | None = None, *, anthropic: bool = False
) -> Events:
    """The answer when it begins in time, else a stream that waits for it.

    Raises what ``coming`` raises in time. Whoever does not get to what this returns ends ``coming`` by ``leave``.
    """
    await asyncio.wait({coming}, timeout=QUIET_SECONDS if seconds is None else seconds)
    if not coming.done():
        return Late(coming, anthropic=anthropic)
    return coming.result()


def leave(coming: "asyncio.Future[Upstream]") -> None:
    """Nobody waits any more: what has not come is called off, what has come, be it in this moment, is hung up on."""
    if coming.done():
        _hang_up(coming)
        return
    coming.cancel()
    # A task that was through at its last await when it was cancelled may still end with an answer.
    coming.add_done_callback(_hang_up)


def _hang_up(came: "asyncio.Future[Upstream]") -> None:
    if not came.cancelled() and came.exception() is None:
        came.result().end()
