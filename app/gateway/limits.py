"""How much a key may ask: requests and tokens a minute, counted in Redis or in this process; requests at once.

Tokens are known only when an answer is whole, so a request is let in while any of the minute's tokens are left, and
what it came to is taken off afterwards. Requests at once are counted by each API process for itself.
"""

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

from limits import RateLimitItem, RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import FixedWindowRateLimiter, SlidingWindowCounterRateLimiter
from redis.exceptions import RedisError

from app.errors import TooManyRequests
from app.projects.caller import Caller, KeyLimits

_PATIENCE = 0.5
_AWAY_SECONDS = 5.0
log = logging.getLogger(__name__)
Result = TypeVar("Result")


class Permit:
    """A request that was let in. ``headers`` tell what is left; ``leave`` makes room for the next."""

    def __init__(self, headers: Mapping[str, str], leave: Callable[[], None], spend: Callable[[int], None]) -> None:
        self.headers = headers
        self._leave = leave
        self._spend = spend
        self.left = False

    def leave(self, tokens: int) -> None:
        """The request is over and came to so many tokens. Only the first call counts."""
        if self.left:
            return
        self.left = True
        self._leave()
        if tokens:
            self._spend(tokens)


class _Windows:
    """The two windows over one storage."""

    def __init__(self, storage: MemoryStorage | RedisStorage) -> None:
        self.requests = SlidingWindowCounterRateLimiter(storage)
        # A fixed window also takes what goes over its amount; the sliding one would refuse it and count nothing.
        self.tokens = FixedWindowRateLimiter(storage)


class Limiter:
    """One per application, for one event loop; ``close`` it at the end.

    ``defaults``: for keys without limits of their own. ``redis_url``: a broker's, of any scheme that Celery takes for
    Redis; without one, and while it does not answer, each process counts for itself.
    """

    def __init__(self, defaults: KeyLimits | None = None, redis_url: str | None = None) -> None:
        self._defaults = defaults or KeyLimits()
        self._here = _Windows(MemoryStorage())
        self._redis = _redis(redis_url) if redis_url else None
        self._shared = _Windows(self._redis) if self._redis else None
        self._away_until = 0.0
        self._running: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()

    async def enter(self, caller: Caller) -> Permit:
        """Lets a request in. Raises TooManyRequests."""
        limits = caller.limits.over(self._defaults)
        if limits == KeyLimits():
            return Permit({}, _nothing, _nothing_spent)
        key, headers = caller.key_id, dict[str, str]()
        if limits.concurrent_requests and self._running[key] >= limits.concurrent_requests:
            raise _refused(f"{limits.concurrent_requests} requests at once", 1, {})
        self._running[key] += 1
        try:
            if limits.tokens_per_minute:
                headers |= await self._check_tokens(key, limits.tokens_per_minute)
            if limits.requests_per_minute:
                headers |= await self._take_request(key, limits.requests_per_minute, headers)
        except BaseException:
            self._left(key)
            raise
        per_minute = limits.tokens_per_minute
        spend = (lambda tokens: self._spend(key, per_minute, tokens)) if per_minute else _nothing_spent
        return Permit(headers, lambda: self._left(key), spend)

    async def close(self) -> None:
        """Waits for what is still being counted, and hangs up."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1)
        if self._redis is not None:
            # limits has no way to close a storage.
            await self._redis.bridge.get_connection().aclose()  # type: ignore[attr-defined]

    def _left(self, key: str) -> None:
        self._running[key] -= 1
        if self._running[key] <= 0:
            del self._running[key]

    async def _check_tokens(self, key: str, amount: int) -> dict[str, str]:
        item = RateLimitItemPerMinute(amount)
        reset, remaining = await self._counted(lambda windows: windows.tokens.get_window_stats(item, "tokens", key))
        wait = max(0.0, reset - time.time()) if remaining < amount else 0.0
        headers = _headers("tokens", amount, max(0, remaining), wait)
        if remaining <= 0:
            raise _refused(f"{amount} tokens a minute", wait, headers)
        return headers

    async def _take_request(self, key: str, amount: int, more: dict[str, str]) -> dict[str, str]:
        item = RateLimitItemPerMinute(amount)
        good = await self._counted(lambda windows: windows.requests.hit(item, "requests", key))
        reset, remaining = await self._counted(lambda windows: windows.requests.get_window_stats(item, "requests", key))
        wait = max(0.0, reset - time.time())
        headers = _headers("requests", amount, max(0, remaining), wait)
        if not good:
            raise _refused(f"{amount} requests a minute", wait, {**more, **headers})
        return headers

    def _spend(self, key: str, amount: int, tokens: int) -> None:
        item: RateLimitItem = RateLimitItemPerMinute(amount)

        async def spend() -> None:
            await self._counted(lambda windows: windows.tokens.hit(item, "tokens", key, cost=tokens))

        task = asyncio.get_running_loop().create_task(spend())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _counted(self, ask: Callable[[_Windows], Awaitable[Result]]) -> Result:
        """In Redis if it answers, else here; one that did not answer is left alone for a while."""
        if self._shared is not None and time.monotonic() >= self._away_until:
            try:
                async with asyncio.timeout(_PATIENCE):
                    return await ask(self._shared)
            except (RedisError, OSError, TimeoutError) as error:
                if not self._away_until:
                    # Its text may hold the broker's address with the password.
                    log.warning("limits are counted in this process, the broker fails: %s", type(error).__name__)
                self._away_until = time.monotonic() + _AWAY_SECONDS
        return await ask(self._here)


def _redis(url: str) -> RedisStorage | None:
    scheme, _, rest = url.partition("://")
    known = {"redis": "redis", "rediss": "rediss", "redis+socket": "redis+unix"}.get(scheme)
    if known is None:
        return None
    return RedisStorage(
        f"async+{known}://{rest}",
        implementation="redispy",
        key_prefix="tunesmith.limits",
        socket_timeout=_PATIENCE,
        socket_connect_timeout=_PATIENCE,
    )


def _refused(what: str, wait: float, headers: Mapping[str, str]) -> TooManyRequests:
    error = TooManyRequests(
        f"this key may ask for {what}",
        hint="Wait as Retry-After says; an admin can give the key more (PATCH /keys/<id>).",
    )
    error.retry_after = max(1, math.ceil(wait))
    error.headers = dict(headers)
    return error


def _headers(what: str, limit: int, remaining: int, seconds: float) -> dict[str, str]:
    """As OpenAI names and writes them: ``x-ratelimit-reset-requests: 1.5s``."""
    return {
        f"x-ratelimit-limit-{what}": str(limit),
        f"x-ratelimit-remaining-{what}": str(remaining),
        f"x-ratelimit-reset-{what}": f"{seconds:.3g}s" if seconds < 100 else f"{seconds:.0f}s",
    }


def _nothing() -> None:
    """For keys without limits."""


def _nothing_spent(_: int) -> None:
    """For keys without a limit of tokens."""
