"""What no client gets an engine to do: fetch an address, change itself, tell of itself (case 82)."""

import http.client
import itertools
import json
from typing import Any

import httpx
import pytest

from tests.app.gateway.doubles import HELLO, Gateway

METADATA = "http://169.254.169.254/latest/meta-data/"
DATA = "data:image/png;base64,iVBORw0KGgo="


def chat(*parts: Any) -> dict[str, Any]:
    return {"messages": [*HELLO, {"role": "user", "content": [{"type": "text", "text": "What is this?"}, *parts]}]}


def response(*parts: Any) -> dict[str, Any]:
    return {"input": [{"role": "user", "content": [{"type": "input_text", "text": "What is this?"}, *parts]}]}


def message(*parts: Any) -> dict[str, Any]:
    return {**chat(*parts), "max_tokens": 5}


ADDRESSES = (
    METADATA,
    "https://example.com/cat.png",
    "http://[::ffff:169.254.169.254]/",
    "http://2852039166/",
    "file:///etc/passwd",
    "/etc/passwd",
    " data:image/png;base64,iVBORw0KGgo=",
    "",
)


def image(url: str) -> dict[str, Any]:
    return {"type": "image", "source": {"type": "url", "url": url}}


def addressed(url: str) -> list[tuple[str, dict[str, Any]]]:
    """Every place of a request in which an engine looks for an address."""
    parts = [{"type": kind, kind: {"url": url}} for kind in ("image_url", "audio_url", "video_url")]
    parts += [{"image_url": url}, {"type": "image_url", "image_url": url, "uuid": "x"}]
    asked = [("chat/completions", chat(part)) for part in parts]
    asked += [("responses", response({"type": "input_image", "image_url": url}))]
    asked += [("responses", response({"type": "input_file", "file_url": url}))]
    shot = {"type": "computer_call_output", "call_id": "c", "output": {"type": "input_image", "image_url": url}}
    asked += [("responses", {"input": [shot]})]
    asked += [("messages", message(image(url)))]
    result = {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "x"}, image(url)]}
    return [*asked, ("messages", message(result))]


@pytest.mark.parametrize("url", ADDRESSES)
def test_an_address_is_not_passed_on(shared: Gateway, url: str) -> None:
    for path, body in addressed(url):
        answer = shared.post({"model": "served-name", **body}, path)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "invalid_value"), (path, body)
        assert error["param"] == ("input" if path == "responses" else "messages")
        assert "data: URL" in error["message"]
    assert shared.engine.requests() == []


def test_what_is_sent_in_the_request_is_passed_on(gateway: Gateway) -> None:
    """Whether the model can see is the engine's to say."""
    for path, body in addressed(DATA):
        asked = {"model": "served-name", **body}
        assert gateway.post(asked, path).status_code == 200
        sent = gateway.engine.requests()[-1]["body"]
        assert {name: sent[name] for name in asked} == asked


def test_an_address_that_is_a_text_is_passed_on(gateway: Gateway) -> None:
    """In a question, in what a tool was called with, in what it answered: nobody fetches it there."""
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": json.dumps({"url": METADATA})}}
    asked = {
        "chat/completions": {
            "messages": [
                {"role": "user", "content": f"Read {METADATA}"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": METADATA}]},
            ]
        },
        "messages": message({"type": "tool_use", "id": "t", "name": "look", "input": {"image_url": METADATA}}),
        "responses": {"input": METADATA},
    }
    for path, body in asked.items():
        assert gateway.post({"model": "served-name", **body}, path).status_code == 200


# Routes of vLLM that are none of a client's business, with those that its options open.
ROUTES = (
    *("/invocations", "/pause", "/resume", "/is_paused", "/update_weights", "/init_weight_transfer_engine"),
    *("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/sleep", "/wake_up", "/is_sleeping", "/collective_rpc"),
    *("/reset_prefix_cache", "/reset_mm_cache", "/server_info", "/start_profile", "/stop_profile", "/load", "/ping"),
    *("/tokenize", "/detokenize", "/pooling", "/classify", "/score", "/v1/score", "/rerank", "/v1/rerank"),
    *("/inference/v1/generate", "/scale_elastic_ep", "/v1/messages/count_tokens", "/v1/audio/transcriptions"),
    *("/v1/responses/resp_1", "/v1/responses/resp_1/cancel", "/version", "/metrics", "/health"),
)
DISGUISES = ("{}/", "/{}", "/v1/..{}", "/v1/%2e%2e{}", "/v1/chat/completions/..{}", "/v1/chat/completions{}", "{}%00")


def test_no_other_route_of_an_engine_is_open(shared: Gateway) -> None:
    for path, method in itertools.product(ROUTES, ("GET", "POST", "PUT", "DELETE", "OPTIONS")):
        assert httpx.request(method, shared.url + path).status_code == 404, (method, path)
    assert shared.engine.requests() == []


def test_no_spelling_of_a_path_gets_there(shared: Gateway) -> None:
    """Sent as it stands: a client library would tidy it up first."""
    host = shared.url.removeprefix("http://")
    spellings = [disguise.format(path) for path in ROUTES for disguise in DISGUISES]
    spellings += [f"http://engine{path}" for path in ROUTES]
    connection = http.client.HTTPConnection(host, timeout=20)
    for path in spellings:
        connection.request("POST", path, json.dumps({"model": "served-name"}), {"content-type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        assert answer.status in (400, 404), path
    connection.close()
    assert shared.engine.requests() == []
