"""Patience with a model that is on its way: its engine is woken, or its adapter is loaded."""

import asyncio
from collections.abc import Awaitable, Callable

from app.deployments.service import Route
from app.errors import Code, Unavailable

FIRST_PAUSE = 0.05
LONGEST_PAUSE = 1.0


async def awake(find: Callable[[], Awaitable[Route]], seconds: float, clock: Callable[[], float]) -> Route:
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
