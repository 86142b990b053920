"""Embeddings, Responses and Messages: what they take, and what an engine without them says."""

import json
import typing
from typing import Any

import openai  # noqa: TID253  (slow to import, which only matters in the service)
import pytest
from openai.types import completion_create_params as completion_params  # noqa: TID253
from openai.types import embedding_create_params as embedding_params  # noqa: TID253
from openai.types.chat import completion_create_params as chat_params  # noqa: TID253
from openai.types.responses import response_create_params as response_params  # noqa: TID253

from app.deployments.manners import Manner
from app.gateway.more_schemas import EmbeddingsRequest, MessagesRequest, ResponsesRequest
from app.gateway.requests import EngineRequest
from app.gateway.schemas import ChatRequest, CompletionRequest
from tests.app.gateway.doubles import HELLO, Gateway, wait_for

GOOD: dict[str, tuple[type[EngineRequest], dict[str, Any]]] = {
    "embeddings": (EmbeddingsRequest, {"model": "m", "input": "hi"}),
    "responses": (ResponsesRequest, {"model": "m", "input": "hi"}),
    "messages": (MessagesRequest, {"model": "m", "messages": HELLO, "max_tokens": 5}),
}


@pytest.mark.parametrize(
    ("path", "extra", "code", "param"),
    [
        ("embeddings", {"inputs": "hi"}, "unknown_field", "inputs"),
        ("embeddings", {"input": []}, "invalid_type", "input"),
        ("embeddings", {"input": None}, "invalid_type", "input"),
        ("embeddings", {"encoding_format": "int8"}, "invalid_value", "encoding_format"),
        ("embeddings", {"dimensions": 0}, "invalid_value", "dimensions"),
        ("responses", {"previous_response_id": "resp_1"}, "refused_field", "previous_response_id"),
        ("responses", {"conversation": {"id": "c"}}, "refused_field", "conversation"),
        ("responses", {"prompt": {"id": "p"}}, "refused_field", "prompt"),
        ("responses", {"background": True}, "invalid_value", "background"),
        ("responses", {"tools": [{"type": "mcp", "server_url": "http://inside"}]}, "invalid_value", "tools"),
        ("responses", {"tools": [{"type": "code_interpreter"}]}, "invalid_value", "tools"),
        ("responses", {"include": ["file_search_call.results"]}, "invalid_value", "include.0"),
        ("responses", {"max_output_tokens": 0}, "invalid_value", "max_output_tokens"),
        ("responses", {"request_id": "x"}, "refused_field", "request_id"),
        ("messages", {"max_tokens": None}, "invalid_type", "max_tokens"),
        ("messages", {"mcp_servers": []}, "refused_field", "mcp_servers"),
        ("messages", {"container": "c"}, "refused_field", "container"),
        ("messages", {"stop": "x"}, "unknown_field", "stop"),
        ("messages", {"temperature": 3}, "invalid_value", "temperature"),
        ("messages", {"cache_salt": "x"}, "refused_field", "cache_salt"),
    ],
)
def test_a_bad_field_is_named(shared: Gateway, path: str, extra: dict[str, Any], code: str, param: str) -> None:
    response = shared.post({**GOOD[path][1], **extra}, path)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, code, param)
    assert code != "refused_field" or error["hint"]
    assert shared.engine.requests() == []


@pytest.mark.parametrize("path", list(GOOD))
def test_a_body_that_lacks_something(shared: Gateway, path: str) -> None:
    assert shared.post({"model": "m"}, path).json()["error"]["code"] == "missing_field"
    assert shared.post(b"[", path).json()["error"]["code"] == "invalid_json"


@pytest.mark.parametrize(
    ("path", "quiet"),
    [
        ("embeddings", {"user": "me"}),
        (
            "responses",
            {"user": "me", "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "background": False}
            | {"previous_response_id": None, "conversation": None, "stream_options": {"include_obfuscation": True}}
            | {"access_programs": ["x"], "background_options": {"window": "2h"}, "image": {"detail": "low"}},
        ),
        (
            "messages",
            {"metadata": {"user_id": "me"}, "service_tier": "auto", "container": None, "workspace_id": "w"}
            | {"cache_control": {"type": "ephemeral"}, "inference_geo": "eu", "speed": "fast", "user_profile_id": "u"},
        ),
    ],
)
def test_what_has_no_effect_is_dropped(path: str, quiet: dict[str, Any]) -> None:
    kind, body = GOOD[path]
    expected = {**body, "model": "engine's", **({"store": False} if path == "responses" else {})}
    assert json.loads(kind.parse(json.dumps({**body, **quiet}).encode()).body_for("engine's")) == expected


@pytest.mark.parametrize(
    ("params", "ours"),
    [
        (chat_params.CompletionCreateParamsBase, ChatRequest),
        (completion_params.CompletionCreateParamsBase, CompletionRequest),
        (embedding_params.EmbeddingCreateParams, EmbeddingsRequest),
        (response_params.ResponseCreateParamsBase, ResponsesRequest),
    ],
)
def test_every_field_of_the_installed_client_is_known(params: Any, ours: type[EngineRequest]) -> None:
    """Passed on, ignored, or refused with what to do instead; never a name that nobody has heard of."""
    names = set(typing.get_type_hints(params))
    assert len(names) >= 5
    assert names - set(ours.model_fields) - set(ours.refused) == set()


@pytest.mark.parametrize("path", list(GOOD))
def test_an_engine_without_the_route(gateway: Gateway, path: str) -> None:
    gateway.engine.stop()
    gateway.engine.start(also=False)
    response = gateway.post({**GOOD[path][1], "model": "alias"}, path)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (404, "endpoint_not_supported", "model")
    assert f"/v1/{path}" in error["message"]


def test_embeddings_through_the_client(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model="alias", input="hi", encoding_format="float")
    assert answer.data[0].embedding == [0.5, -0.5]
    assert answer.model == "alias"


def test_responses_through_the_client(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="alias", input="hi", store=False)
    assert (answer.output_text, answer.model) == ("Hello", "alias")
    events = list(client.responses.create(model="alias", input="hi", stream=True))
    assert [event.type for event in events] == ["response.output_text.delta", "response.completed"]
    assert events[-1].response.model == "alias"  # type: ignore[union-attr]


def test_messages_as_they_are_read(gateway: Gateway) -> None:
    body = {"model": "alias", "messages": HELLO, "max_tokens": 5}
    answer = gateway.post(body, "messages").json()
    assert (answer["content"][0]["text"], answer["model"]) == ("Hello", "alias")
    lines = gateway.post({**body, "stream": True}, "messages").text.split("\n")
    assert [line for line in lines if line.startswith("event: ")] == [
        "event: message_start",
        "event: message_delta",
        "event: message_stop",
    ]
    assert '"model":"alias"' in lines[1].replace(" ", "")


def test_a_stream_of_messages_that_breaks_off_ends_with_an_error_of_their_kind(gateway: Gateway) -> None:
    body = {"model": "alias", "messages": [{"role": "user", "content": "breaks"}], "max_tokens": 5, "stream": True}
    text = gateway.post(body, "messages").text
    last = text.strip().split("\n\n")[-1]
    kind, data = last.split("\n")
    told = json.loads(data.removeprefix("data: "))
    assert (kind, told["type"], told["error"]["type"]) == ("event: error", "error", "api_error")


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({"model": "nobody", "messages": HELLO, "max_tokens": 5}, 404, "not_found_error"),
        ({"model": "alias", "messages": HELLO}, 400, "invalid_request_error"),
        ({"model": "alias", "messages": [{"role": "user", "content": "x" * (10 << 20)}]}, 413, "invalid_request_error"),
    ],
)
def test_an_error_of_messages_has_anthropics_frame(
    shared: Gateway, body: dict[str, Any], status: int, kind: str
) -> None:
    answer = shared.post(body, "messages")
    assert (answer.status_code, answer.json()["type"], answer.json()["error"]["type"]) == (status, "error", kind)
    assert answer.json()["error"]["code"], "and what all errors have"
    assert answer.headers["request-id"] == answer.headers["x-request-id"] == answer.json()["request_id"]
    assert "type" not in shared.post(body).json(), "OpenAI's have none"


def test_the_request_id_reaches_the_engine(gateway: Gateway) -> None:
    answers = [gateway.post({**body, "model": "alias"}, path) for path, (_, body) in GOOD.items()]
    wait_for(lambda: len(gateway.engine.requests()) == len(GOOD))
    sent = [request["headers"]["x-request-id"] for request in gateway.engine.requests()]
    assert sent == [answer.headers["x-request-id"] for answer in answers]


def test_tools_where_nobody_can_read_their_calls(gateway: Gateway) -> None:
    gateway.manner = Manner(reads_tools=False)
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    flat = {"type": "function", "name": "look", "parameters": {"type": "object"}}
    bodies: dict[str, dict[str, Any]] = {
        "chat/completions": {"messages": HELLO, "tools": [tool]},
        "responses": {"input": "hi", "tools": [flat]},
        "messages": {"messages": HELLO, "max_tokens": 5, "tools": [{"name": "look", "input_schema": {}}]},
    }
    for path, body in bodies.items():
        response = gateway.post({"model": "alias", **body}, path)
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, "tools_not_supported", "tools")
    assert gateway.engine.requests() == []
    assert gateway.post({"model": "alias", "messages": HELLO, "tools": []}).status_code == 200
    gateway.manner = Manner()
    for path, body in bodies.items():
        assert gateway.post({"model": "alias", **body}, path).status_code == 200
