"""An adapter's own chat template: sent with each chat to its engine, never taken from a client."""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app.aliases.traffic import Split
from app.deployments.manners import Manner
from tests.app.gateway.doubles import HELLO, Engine, Gateway, to

OWN = "{% for m in messages %}«{{ m['content'] }}»\n{% endfor %}\"<\\"
CHAT = {"model": "tuned", "messages": HELLO}


@pytest.fixture
def adapter(gateway: Gateway) -> Gateway:
    """``tuned`` is an adapter with a template of its own; ``alias`` is a plain model of the same engine."""
    gateway.split = Split("tuned", replace(to(gateway.engine.socket), adapter="artifact:art-1"))
    gateway.manner = Manner(template=OWN)
    return gateway


@pytest.mark.parametrize("stream", [False, True])
def test_it_goes_with_each_chat(adapter: Gateway, stream: bool) -> None:
    answer = adapter.post({**CHAT, "stream": stream, "max_tokens": 3})
    assert answer.status_code == 200
    (request,) = adapter.engine.requests()
    assert request["body"]["chat_template"] == OWN
    assert (request["body"]["messages"], request["body"]["max_tokens"]) == (HELLO, 3)


def test_a_text_and_another_model_need_none(adapter: Gateway) -> None:
    assert adapter.post({"model": "tuned", "prompt": "hi"}, "completions").status_code == 200
    assert adapter.post({"model": "tuned", "input": "hi"}, "embeddings").status_code == 200
    assert adapter.post({**CHAT, "model": "alias"}).status_code == 200
    assert not [request for request in adapter.engine.requests() if "chat_template" in request["body"]]


@pytest.mark.parametrize(
    ("path", "body"), [("responses", {"input": "hi"}), ("messages", {"messages": HELLO, "max_tokens": 5})]
)
def test_where_the_engine_takes_none_it_is_said_instead_of_answered(
    adapter: Gateway, path: str, body: dict[str, Any]
) -> None:
    answer = adapter.post({"model": "tuned", **body}, path)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (404, "endpoint_not_supported", "model")
    assert "/v1/chat/completions" in error["hint"]
    assert adapter.engine.requests() == []
    assert adapter.post({"model": "alias", **body}, path).status_code == 200


def test_a_clients_own_is_refused(adapter: Gateway) -> None:
    for model in ("tuned", "alias"):
        error = adapter.post({**CHAT, "model": model, "chat_template": "{{ x }}"}).json()["error"]
        assert (error["code"], error["param"]) == ("refused_field", "chat_template")
        hidden = {"chat_template_kwargs": {"chat_template": "{{ x }}"}}
        assert adapter.post({**CHAT, "model": model, **hidden}).status_code == 400
    assert adapter.engine.requests() == []


def test_tools_it_writes_otherwise_than_the_engine_reads(adapter: Gateway) -> None:
    adapter.manner = Manner(reads_tools=False, template=OWN)
    tool = {"type": "function", "function": {"name": "look"}}
    error = adapter.post({**CHAT, "tools": [tool]}).json()["error"]
    assert error["code"] == "tools_not_supported"
    assert adapter.post(CHAT).status_code == 200


@pytest.fixture
def other() -> Iterator[Engine]:
    with tempfile.TemporaryDirectory(prefix="ts-") as folder:
        engine = Engine(Path(folder))
        yield engine
        engine.stop()


def test_of_two_targets_of_an_alias_each_gets_what_is_its_own(adapter: Gateway, other: Engine) -> None:
    assert adapter.split is not None
    adapter.split = Split("tuned", adapter.split.main, to(other.socket, deployment="dep-2"), 50)
    for number in range(12):
        assert adapter.post({**CHAT, "user": str(number)}).status_code == 200
    assert {request["body"].get("chat_template") for request in adapter.engine.requests()} == {OWN}
    assert {request["body"].get("chat_template") for request in other.requests()} == {None}
