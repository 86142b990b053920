"""What the gateway counts of each request, and what of it the client sees."""

from typing import Any

import httpx
import openai  # noqa: TID253  (slow to import, which only matters in the service)
import pytest

from tests.app.gateway.doubles import HELLO, Gateway, wait_for


def told(gateway: Gateway, number: int = 1) -> dict[str, Any]:
    """The last request that was counted."""
    wait_for(lambda: len(gateway.counted) >= number)
    assert len(gateway.counted) == number
    return gateway.counted[-1]


@pytest.mark.parametrize("model", ["served-name", "alias"])
def test_a_stream_is_counted_and_loses_the_usage_that_nobody_asked_for(gateway: Gateway, model: str) -> None:
    answer = gateway.post({"model": model, "messages": HELLO, "stream": True})
    assert '"usage"' not in answer.text
    assert answer.text.endswith("data: [DONE]\n\n")
    assert gateway.engine.requests()[0]["body"]["stream_options"] == {"include_usage": True}
    count = told(gateway)
    # Under the name of who answered, whatever it was asked by.
    assert (count["key"], count["model"], count["failed"]) == ("k1", "served-name", False)
    assert (count["prompt_tokens"], count["completion_tokens"]) == (3, 5)
    assert 0 < count["first_byte_seconds"] <= count["seconds"]


@pytest.mark.parametrize("model", ["served-name", "alias"])
def test_a_stream_keeps_the_usage_that_was_asked_for(client: openai.OpenAI, gateway: Gateway, model: str) -> None:
    chunks = list(
        client.chat.completions.create(model=model, messages=HELLO, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 5
    assert told(gateway)["completion_tokens"] == 5


def test_usage_with_every_piece_only_with_usage_at_all(gateway: Gateway) -> None:
    body = {"model": "served-name", "prompt": "hi", "stream": True}
    gateway.post({**body, "stream_options": {"continuous_usage_stats": True}}, "completions")
    gateway.post({**body, "stream_options": {"continuous_usage_stats": True, "include_usage": True}}, "completions")
    first, second = (request["body"]["stream_options"] for request in gateway.engine.requests())
    assert first == {"include_usage": True}
    assert second == {"include_usage": True, "continuous_usage_stats": True}


def test_an_answer_in_one_piece(client: openai.OpenAI, gateway: Gateway) -> None:
    client.chat.completions.create(model="alias", messages=HELLO)
    count = told(gateway)
    assert (count["model"], count["prompt_tokens"], count["completion_tokens"]) == ("served-name", 3, 5)


@pytest.mark.parametrize(
    ("path", "body", "tokens"),
    [
        ("embeddings", {"input": "hi"}, (4, 0)),
        ("responses", {"input": "hi"}, (4, 2)),
        ("responses", {"input": "hi", "stream": True}, (4, 2)),
        ("messages", {"messages": HELLO, "max_tokens": 5}, (4, 2)),
        ("messages", {"messages": HELLO, "max_tokens": 5, "stream": True}, (4, 2)),
    ],
)
def test_the_other_routes_are_counted(
    gateway: Gateway, path: str, body: dict[str, Any], tokens: tuple[int, int]
) -> None:
    assert gateway.post({"model": "alias", **body}, path).status_code == 200
    count = told(gateway)
    assert (count["prompt_tokens"], count["completion_tokens"], count["failed"]) == (*tokens, False)


@pytest.mark.parametrize(
    ("words", "stream", "failed"), [("lies", False, True), ("bad_request", True, True), ("dies_mid_stream", True, True)]
)
def test_what_the_engine_breaks_off_is_an_error(gateway: Gateway, words: str, stream: bool, failed: bool) -> None:
    gateway.post({"model": "served-name", "messages": [{"role": "user", "content": words}], "stream": stream})
    assert told(gateway)["failed"] is failed


@pytest.mark.parametrize(
    ("path", "begins", "prompt"), [("chat/completions", "data: ", 0), ("messages", "event: content_block_delta", 4)]
)
def test_of_a_stream_that_is_left_its_pieces_are_counted(gateway: Gateway, path: str, begins: str, prompt: int) -> None:
    """Also of one whose first event tells how much the answer has come to so far: nothing."""
    turns = [{"role": "user", "content": "slow_stream"}]
    body = {"model": "served-name", "messages": turns, "max_tokens": 50, "stream": True}
    with httpx.stream("POST", f"{gateway.url}/v1/{path}", json=body, timeout=20) as response:
        lines = response.iter_lines()
        for _ in range(3):
            next(line for line in lines if line.startswith(begins))
    count = told(gateway)
    assert 3 <= count["completion_tokens"] < 20
    assert count["prompt_tokens"] == prompt
    assert not count["failed"]


@pytest.mark.parametrize(
    ("path", "body", "last", "tokens"),
    [
        ("chat/completions", {"messages": HELLO, "stream_options": {"include_usage": True}}, "data: [DONE]", (3, 5)),
        ("messages", {"messages": HELLO, "max_tokens": 5}, "event: message_stop", (4, 2)),
    ],
)
def test_who_leaves_at_the_last_event_is_counted_exactly(
    gateway: Gateway, path: str, body: dict[str, Any], last: str, tokens: tuple[int, int]
) -> None:
    """As clients do: what their answer consists of is whole by then."""
    asked = {"model": "served-name", "stream": True, **body}
    with httpx.stream("POST", f"{gateway.url}/v1/{path}", json=asked, timeout=20) as response:
        next(line for line in response.iter_lines() if line == last)
    count = told(gateway)
    assert (count["prompt_tokens"], count["completion_tokens"], count["failed"]) == (*tokens, False)


def test_an_answer_in_one_piece_that_nobody_waited_for_is_a_request_without_tokens(gateway: Gateway) -> None:
    gateway.engine.pause()
    body = {"model": "served-name", "messages": HELLO}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{gateway.url}/v1/chat/completions", json=body, timeout=0.5)
    count = told(gateway)
    assert (count["prompt_tokens"], count["completion_tokens"], count["failed"]) == (0, 0, False)


def test_a_stream_that_breaks_off_has_its_pieces_counted(gateway: Gateway) -> None:
    turns = [{"role": "user", "content": "breaks"}]
    gateway.post({"model": "alias", "messages": turns, "max_tokens": 5, "stream": True}, "messages")
    count = told(gateway)
    assert (count["prompt_tokens"], count["completion_tokens"], count["failed"]) == (4, 1, True)


def test_what_reached_no_model_is_not_counted(gateway: Gateway) -> None:
    """A name that a client made up would be a row for ever."""
    assert gateway.post({"model": "nobody", "messages": HELLO}).status_code == 404
    assert gateway.post({"model": "served-name"}).status_code == 400
    assert gateway.post({"model": "served-name", "messages": HELLO}).status_code == 200
    told(gateway)
