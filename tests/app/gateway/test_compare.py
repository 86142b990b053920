"""The same question to several models: side by side, each with its answer or its error."""

from typing import Any

import pytest

from app.projects.caller import KeyLimits
from tests.app.gateway.doubles import HELLO, Gateway


def compare(gateway: Gateway, **body: Any) -> Any:
    return gateway.post({"models": ["served-name", "alias"], "messages": HELLO, **body}, "../compare")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"models": []}, "models"),
        ({"models": ["m"] * 9}, "models"),
        ({"models": [""]}, "models.0"),
        ({"messages": []}, "messages"),
        ({"sampling": {"stream": True}}, "sampling.stream"),
        ({"sampling": {"model": "m"}}, "sampling.model"),
        ({"sampling": {"temprature": 1}}, "sampling.temprature"),
        ({"sampling": {"temperature": 9}}, "sampling.temperature"),
        ({"temperature": 1}, "temperature"),
    ],
)
def test_what_is_wrong_whatever_the_model(shared: Gateway, body: dict[str, Any], param: str) -> None:
    answer = compare(shared, **body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert shared.engine.requests() == []


def test_side_by_side_in_the_order_that_was_asked(gateway: Gateway) -> None:
    found = compare(gateway, sampling={"max_tokens": 7, "seed": 1}).json()["data"]
    assert [entry["model"] for entry in found] == ["served-name", "alias"]
    assert {entry["content"] for entry in found} == {"Hello there, friend."}
    assert all(entry["error"] is None and entry["usage"]["completion_tokens"] == 5 for entry in found)
    assert all(entry["finish_reason"] == "stop" and entry["latency_ms"] > 0 for entry in found)
    asked = gateway.engine.requests()
    assert [(request["body"]["max_tokens"], request["body"]["seed"]) for request in asked] == [(7, 1)] * 2
    assert len({request["headers"]["x-request-id"] for request in asked}) == 2


def test_one_that_fails_fails_alone(gateway: Gateway) -> None:
    found = compare(gateway, models=["nobody", "served-name", "nobody-else"]).json()["data"]
    assert [(entry["error"] or {}).get("code") for entry in found] == ["model_not_found", None, "model_not_found"]
    assert found[1]["content"] == "Hello there, friend."
    assert found[0]["content"] is None


def test_each_answer_counts_against_the_limits(gateway: Gateway) -> None:
    gateway.limits = KeyLimits(requests_per_minute=1)
    found = compare(gateway).json()["data"]
    assert sorted((entry["error"] or {}).get("code") or "" for entry in found) == ["", "rate_limit_exceeded"]
