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


def test_of_a_stream_that_is_left_its_pieces_are_counted(gateway: Gateway) -> None:
    body = {"model": "served-name", "messages": [{"role": "user", "content": "slow_stream"}], "stream": True}
    with httpx.stream("POST", f"{gateway.url}/v1/chat/completions", json=body, timeout=20) as response:
        lines = response.iter_lines()
        for _ in range(3):
            next(line for line in lines if line)
    count = told(gateway)
    assert count["completion_tokens"] >= 3
    assert not count["failed"]


def test_what_reached_no_model_is_not_counted(gateway: Gateway) -> None:
    """A name that a client made up would be a row for ever."""
    assert gateway.post({"model": "nobody", "messages": HELLO}).status_code == 404
    assert gateway.post({"model": "served-name"}).status_code == 400
    assert gateway.post({"model": "served-name", "messages": HELLO}).status_code == 200
    told(gateway)
