"""Limits of a key: 429 with what to do about it; counted in Redis, and here when that is away."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import openai  # noqa: TID253  (slow to import, which only matters in the service)
import pytest

from app.aliases.traffic import Split
from app.deployments.routes import Route
from app.errors import TooManyRequests
from app.gateway import waking
from app.gateway.limits import Limiter, Permit
from app.projects.caller import Caller, KeyLimits
from tests.app.gateway.doubles import HELLO, Gateway, wait_for

BODY = {"model": "served-name", "messages": HELLO}


def caller(key: str = "k1", **limits: int) -> Caller:
    return Caller("p1", key, frozenset(), KeyLimits(**limits))


@asynccontextmanager
async def limiter(url: str | None = None, **defaults: int) -> AsyncIterator[Limiter]:
    found = Limiter(KeyLimits(**defaults), url)
    try:
        yield found
    finally:
        await found.close()


async def refused(limits: Limiter, who: Caller) -> TooManyRequests:
    with pytest.raises(TooManyRequests) as caught:
        await limits.enter(who)
    return caught.value


def test_requests_a_minute(gateway: Gateway) -> None:
    gateway.limits = KeyLimits(requests_per_minute=2)
    first, second, third = (gateway.post(BODY) for _ in range(3))
    assert [first.status_code, second.status_code, third.status_code] == [200, 200, 429]
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert third.headers["x-ratelimit-remaining-requests"] == "0"
    assert 1 <= int(third.headers["retry-after"]) <= 60
    assert third.headers["x-ratelimit-reset-requests"].endswith("s")
    error = third.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("rate_limit_error", "rate_limit_exceeded", None)
    assert "2 requests a minute" in error["message"]
    assert third.headers["x-request-id"].startswith("req_")
    assert len(gateway.engine.requests()) == 2


def test_a_stream_that_waits_for_its_engine_tells_them_too(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waking, "QUIET_SECONDS", 0.01)
    there = threading.Event()
    find = gateway.find

    def late(model: str, project_id: str) -> Route | Split:
        assert there.wait(20)
        return find(model, project_id)

    monkeypatch.setattr(gateway, "find", late)
    gateway.limits = KeyLimits(requests_per_minute=2)
    with httpx.stream(
        "POST", f"{gateway.url}/v1/chat/completions", json={**BODY, "stream": True}, timeout=20
    ) as answer:
        assert answer.headers["x-ratelimit-remaining-requests"] == "1"
        lines = answer.iter_lines()
        assert next(lines).startswith(": "), "its engine is not there yet"
        there.set()
        assert list(lines)[-2] == "data: [DONE]"


def test_the_openai_client_knows_the_error(client: openai.OpenAI, gateway: Gateway) -> None:
    gateway.limits = KeyLimits(requests_per_minute=1)
    client.chat.completions.create(model="served-name", messages=HELLO)
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model="served-name", messages=HELLO, stream=True)
    assert caught.value.code == "rate_limit_exceeded"


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_a_minute(gateway: Gateway, stream: bool) -> None:
    """Known when the answer is whole: the request that goes over the limit is answered, the next is not."""
    gateway.limits = KeyLimits(tokens_per_minute=10)
    first, second, third = (gateway.post({**BODY, "stream": stream}) for _ in range(3))
    assert [first.status_code, second.status_code, third.status_code] == [200, 200, 429]
    assert first.headers["x-ratelimit-remaining-tokens"] == "10"
    assert second.headers["x-ratelimit-remaining-tokens"] == "2"
    assert third.headers["x-ratelimit-remaining-tokens"] == "0"
    assert "10 tokens a minute" in third.json()["error"]["message"]


def test_requests_at_once(gateway: Gateway) -> None:
    gateway.limits = KeyLimits(concurrent_requests=1)
    slow = {"model": "served-name", "messages": [{"role": "user", "content": "slow_stream"}], "stream": True}
    with httpx.stream("POST", f"{gateway.url}/v1/chat/completions", json=slow, timeout=20) as response:
        pieces = response.iter_bytes()
        next(pieces)
        answer = gateway.post(BODY)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    wait_for(lambda: gateway.post(BODY).status_code == 200)


@pytest.mark.parametrize("words", ["lies", "bad_request", "dies_mid_stream"])
def test_a_request_that_fails_leaves_its_place(gateway: Gateway, words: str) -> None:
    gateway.limits = KeyLimits(concurrent_requests=1)
    for _ in range(3):
        body = {"model": "served-name", "messages": [{"role": "user", "content": words}], "stream": "mid" in words}
        assert gateway.post(body).status_code != 429
    assert gateway.post({"model": "nobody", "messages": HELLO}).status_code == 404
    assert gateway.post(BODY).status_code == 200


@pytest.mark.parametrize("where", ["here", "redis"])
def test_keys_do_not_share_a_limit_and_processes_do(where: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue("valkey_url") if where == "redis" else None

    async def ask() -> None:
        async with limiter(url) as one, limiter(url) as other:
            mine, yours = (
                caller(f"mine-{where}", requests_per_minute=1),
                caller(f"yours-{where}", requests_per_minute=1),
            )
            await one.enter(mine)
            await one.enter(yours)
            await refused(one, mine)
            if where == "redis":
                await refused(other, mine)
            else:
                await other.enter(mine)

    asyncio.run(ask())


def test_tokens_are_shared_through_redis(valkey_url: str) -> None:
    async def ask() -> None:
        who = caller("tokens", tokens_per_minute=5)
        async with limiter(valkey_url) as one, limiter(valkey_url) as other:
            permit = await one.enter(who)
            permit.leave(7)
            permit.leave(7)
            await one.close()
            error = await refused(other, who)
            assert error.headers["x-ratelimit-remaining-tokens"] == "0"

    asyncio.run(ask())


def test_a_broker_that_is_away_costs_no_request(caplog: pytest.LogCaptureFixture) -> None:
    async def ask() -> None:
        async with limiter("redis+socket://:hidden-word@/nowhere/at/all.sock") as limits:
            who = caller(requests_per_minute=2)
            await limits.enter(who)
            await limits.enter(who)
            await refused(limits, who)

    asyncio.run(ask())
    assert "hidden-word" not in caplog.text
    assert caplog.text.count("limits are counted in this process") == 1


def test_the_settings_fill_what_a_key_leaves_open() -> None:
    async def ask() -> None:
        async with limiter(requests_per_minute=1) as limits:
            await limits.enter(caller("plain"))
            await refused(limits, caller("plain"))
            free = caller("free", requests_per_minute=0)
            permits: list[Permit] = [await limits.enter(free) for _ in range(3)]
            assert [permit.headers for permit in permits] == [{}, {}, {}]
            own = caller("own", requests_per_minute=2)
            await limits.enter(own)
            await limits.enter(own)
            await refused(limits, own)

    asyncio.run(ask())
