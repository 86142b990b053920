"""The gateway against an engine on a real unix socket, asked by the real openai client."""

import contextlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import httpx
import openai  # noqa: TID253  (slow to import, which only matters in the service)
import pytest

from app.deployments.service import Route
from app.gateway import refusals
from app.gateway.proxy import ROUTE_SECONDS
from app.gateway.schemas import ChatRequest
from tests.app.gateway.doubles import HELLO, Gateway, to, wait_for
from workers.replica import UnixConnection


def test_a_chat(client: openai.OpenAI, gateway: Gateway) -> None:
    answer = client.chat.completions.create(model="served-name", messages=HELLO, temperature=0.5, max_tokens=7)
    assert answer.choices[0].message.content == "Hello there, friend."
    assert answer.model == "served-name"
    (asked,) = gateway.engine.requests()
    assert asked["path"] == "/v1/chat/completions"
    assert asked["body"] == {"model": "served-name", "messages": HELLO, "temperature": 0.5, "max_tokens": 7}
    assert "authorization" not in asked["headers"]


def test_a_completion_of_token_ids(client: openai.OpenAI, gateway: Gateway) -> None:
    client.completions.create(model="served-name", prompt=[1, 2, 3], extra_body={"top_k": 5})
    assert gateway.engine.requests()[0]["body"] == {"model": "served-name", "prompt": [1, 2, 3], "top_k": 5}


@pytest.mark.parametrize("model", ["served-name", "alias"])
def test_a_stream(client: openai.OpenAI, model: str) -> None:
    """Also under another name than the engine's: the answer bears the name that was asked for."""
    chunks = list(client.chat.completions.create(model=model, messages=HELLO, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello there, friend."
    assert {chunk.model for chunk in chunks} == {model}
    assert client.completions.create(model=model, prompt="hi").model == model


def test_a_stream_is_passed_on_word_for_word_and_at_once(gateway: Gateway) -> None:
    body = {"model": "served-name", "messages": [{"role": "user", "content": "slow_stream"}], "stream": True}
    with httpx.stream("POST", f"{gateway.url}/v1/chat/completions", json=body, timeout=20) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-request-id"].startswith("req_")
        lines = response.iter_lines()
        # The engine never ends by itself: were anything buffered, nothing would come.
        for _ in range(3):
            line = next(line for line in lines if line)
            assert json.loads(line.removeprefix("data: "))["choices"][0]["delta"]["content"] == " again"


@pytest.mark.parametrize("words", ["slow_stream", "slow_stream, never read"])
def test_a_client_that_leaves_ends_the_engines_work(gateway: Gateway, words: str) -> None:
    body = {"model": "alias", "messages": [{"role": "user", "content": words}], "stream": True}
    with httpx.stream("POST", f"{gateway.url}/v1/chat/completions", json=body, timeout=20) as response:
        if "never" not in words:
            next(response.iter_bytes())
    wait_for(lambda: {"aborted": "/v1/chat/completions"} in gateway.engine.requests())


def test_a_client_that_leaves_while_it_waits_frees_the_gateway(gateway: Gateway) -> None:
    gateway.engine.pause()
    before = _open_files()
    for path, body in (("chat/completions", {"messages": HELLO}), ("completions", {"prompt": "hi", "stream": True})):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{gateway.url}/v1/{path}", json={"model": "served-name", **body}, timeout=0.5)
    wait_for(lambda: _open_files() <= before)


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_an_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="nobody", messages=HELLO)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"


def test_a_model_that_is_starting(gateway: Gateway) -> None:
    gateway.starting = True
    response = gateway.post({"model": "served-name", "messages": HELLO})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "5"
    assert response.json()["error"]["code"] == "model_not_ready"


@pytest.mark.parametrize(
    ("extra", "code", "param"),
    [
        ({"temprature": 1}, "unknown_field", "temprature"),
        ({"chat_template": "{{ evil }}"}, "refused_field", "chat_template"),
        ({"prompt_embeds": "AAAA"}, "refused_field", "prompt_embeds"),
        ({"chat_template_kwargs": {"tools": True}}, "invalid_value", "chat_template_kwargs"),
        ({"n": 16384}, "invalid_value", "n"),
        ({"n": 0}, "invalid_value", "n"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"max_tokens": "many"}, "invalid_type", "max_tokens"),
        ({"max_completion_tokens": -1}, "invalid_value", "max_completion_tokens"),
        ({"temperature": 2.5}, "invalid_value", "temperature"),
        ({"stop": [1]}, "invalid_type", "stop"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": ["hi"]}, "invalid_type", "messages.0"),
        ({"messages": None}, "invalid_type", "messages"),
        ({"model": 5}, "invalid_type", "model"),
        ({"prompt": "hi"}, "unknown_field", "prompt"),
    ],
)
def test_a_bad_field_is_named(shared: Gateway, extra: dict[str, Any], code: str, param: str) -> None:
    response = shared.post({"model": "served-name", "messages": HELLO, **extra})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, code, param)
    assert param != "temprature" or error["hint"] == "Did you mean temperature?"
    assert shared.engine.requests() == []


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"[]", "invalid_type"),
        (b'"hi"', "invalid_type"),
        (b"\xff\xfe", "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"model":"served-name","messages":[{"role":"user","content":"\\ud800"}]}', "invalid_json"),
        (b'{"model":"served-name"}', "missing_field"),
        (b'{"messages":[{}]}', "missing_field"),
    ],
)
def test_a_body_that_is_no_request(shared: Gateway, body: bytes, code: str) -> None:
    response = shared.post(body)
    assert (response.status_code, response.json()["error"]["code"]) == (400, code)


@pytest.mark.parametrize("prompt", [[], [[]], {}, True, None, [1, "a"], [-1], ["a"] * 65])
def test_a_prompt_is_text_or_token_ids(shared: Gateway, prompt: Any) -> None:
    response = shared.post({"model": "served-name", "prompt": prompt}, "completions")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"


def test_a_body_of_more_than_10_mb(shared: Gateway) -> None:
    assert shared.post({"messages": [{"role": "user", "content": "x" * (10 << 20)}]}).status_code == 413
    assert shared.engine.requests() == []


def test_a_long_prompt_under_the_cap_arrives_whole(gateway: Gateway) -> None:
    body = {"model": "served-name", "messages": [{"role": "user", "content": "ü" * (1 << 20)}]}
    assert gateway.post(body).status_code == 200
    assert gateway.engine.requests()[0]["body"] == body


def test_what_has_no_effect_is_dropped_and_nulls_in_messages_stay(gateway: Gateway) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": []}]
    quiet = {"user": "me", "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "verbosity": "low"}
    more = {"safety_identifier": "x", "prompt_cache_key": "y", "stop": None, "top_logprobs": None}
    body = {"model": "served-name", "messages": messages, "stream_options": {"include_obfuscation": False}}
    assert gateway.post({**body, **quiet, **more}).status_code == 200
    expected = {"model": "served-name", "messages": messages}
    assert gateway.engine.requests()[0]["body"] == expected


def test_what_the_engine_refuses_is_a_400_with_its_words(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "bad_request"}]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="maximum context length is 16") as caught:
            client.chat.completions.create(model="alias", messages=messages, stream=stream)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="alias", prompt="bad_request")
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")


def refused(message: str, param: str | None, kind: str = "BadRequestError") -> dict[str, str | None]:
    body = json.dumps({"error": {"message": message, "type": kind, "param": param, "code": 400}}).encode()
    return refusals.at_fault(
        body, ChatRequest.parse(json.dumps({"model": "m", "messages": HELLO}).encode())
    ).as_object()["error"]


def test_the_field_is_named_where_the_engine_names_one_of_the_requests() -> None:
    found = refused(
        "max_tokens=9 cannot be greater than max_model_len=4. (parameter=max_tokens, value=9)", "max_tokens"
    )
    assert (found["message"], found["param"], found["code"]) == (
        "max_tokens=9 cannot be greater than max_model_len=4.",
        "max_tokens",
        "invalid_value",
    )
    assert refused("no such thing", "input_tokens")["param"] is None
    found = refused(
        "This model's maximum context length is 4 tokens. (parameter=input_tokens, value=9)", "input_tokens"
    )
    assert (found["message"], found["param"]) == ("This model's maximum context length is 4 tokens.", "messages")
    assert found["code"] == "context_length_exceeded"
    assert "max_model_len" in str(found["hint"])


def test_tools_that_an_engine_turns_out_not_to_read() -> None:
    """What ``auto`` became is known to the engine alone."""
    found = refused("tools: nobody reads calls of them", "tools", "tools_not_supported")
    assert (found["code"], found["param"]) == ("tools_not_supported", "tools")
    assert "Leave tools out" in str(found["hint"])
    assert refused("tools.0: no name", "tools")["code"] == "invalid_value"


def test_an_engine_that_fails_is_a_502_without_its_words(gateway: Gateway) -> None:
    response = gateway.post({"model": "served-name", "messages": [{"role": "user", "content": "lies"}]})
    assert response.status_code == 502
    assert response.headers["retry-after"] == "2"
    assert response.json()["error"]["code"] == "engine_error"
    assert "/opt" not in response.text


@pytest.mark.parametrize("model", ["served-name", "alias"])
def test_an_engine_that_dies_in_a_stream_leaves_an_error_event(client: openai.OpenAI, model: str) -> None:
    messages: list[Any] = [{"role": "user", "content": "dies_mid_stream"}]
    with contextlib.closing(client.chat.completions.create(model=model, messages=messages, stream=True)) as stream:
        got = [next(stream).choices[0].delta.content for _ in range(2)]
        with pytest.raises(openai.APIError, match="in the middle of the answer"):
            next(stream)
    assert got == ["Hello", " there"]


def test_an_engine_that_is_gone_is_a_503(gateway: Gateway) -> None:
    gateway.engine.stop()
    response = gateway.post({"model": "served-name", "messages": HELLO})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "5"
    assert response.json()["error"]["code"] == "model_not_ready"
    assert len(gateway.looked_up) == 2  # the first route might have been an old one


def test_an_adapter_that_was_put_away_is_found_again_within_the_same_request(gateway: Gateway) -> None:
    """The engine knows it no longer; asking for the way has it loaded again."""

    def load(*_: str) -> Route:
        gateway.looked_up.append(("alias", "p1"))
        if len(gateway.looked_up) == 2:
            (Path(gateway.engine.socket).parent / "adapter_config.json").touch()
            connection = UnixConnection(gateway.engine.socket, 5)
            body = {"lora_name": "lora", "lora_path": str(Path(gateway.engine.socket).parent)}
            connection.request("POST", "/v1/load_lora_adapter", json.dumps(body))
            assert connection.getresponse().status == 200
            connection.close()
        return to(gateway.engine.socket, served="lora")

    gateway.find = load  # type: ignore[method-assign]
    answer = gateway.post({"model": "alias", "messages": HELLO})
    assert (answer.status_code, answer.json()["model"]) == (200, "alias")
    assert len(gateway.looked_up) == 2


def test_an_engine_that_was_started_anew_is_found_within_the_same_request(gateway: Gateway) -> None:
    body = {"model": "served-name", "messages": HELLO}
    assert gateway.post(body).status_code == 200
    gateway.engine.stop()
    gateway.engine.start()
    assert gateway.post(body).status_code == 200


def test_routes_are_looked_up_once_a_second(gateway: Gateway) -> None:
    gateway.clock = lambda: 100.0
    for _ in range(3):
        gateway.post({"model": "served-name", "messages": HELLO})
    assert gateway.looked_up == [("served-name", "p1")]
    gateway.clock = lambda: 100.0 + ROUTE_SECONDS
    gateway.post({"model": "served-name", "messages": HELLO})
    wait_for(lambda: len(gateway.looked_up) == 2)


def test_a_route_that_is_long_past_is_not_used_any_more(gateway: Gateway) -> None:
    gateway.clock = lambda: 100.0
    gateway.post({"model": "served-name", "messages": HELLO})
    gateway.clock = lambda: 100.0 + 2 * ROUTE_SECONDS
    gateway.starting = True
    assert gateway.post({"model": "served-name", "messages": HELLO}).status_code == 503


def test_a_route_that_is_gone_is_used_once_more_at_most(gateway: Gateway) -> None:
    gateway.clock = lambda: 100.0
    gateway.post({"model": "served-name", "messages": HELLO})
    gateway.clock = lambda: 100.0 + ROUTE_SECONDS
    gateway.starting = True
    assert gateway.post({"model": "served-name", "messages": HELLO}).status_code == 200
    wait_for(lambda: gateway.post({"model": "served-name", "messages": HELLO}).status_code == 503)


def test_every_answer_has_one_request_id(gateway: Gateway) -> None:
    bodies: list[Any] = [{"model": "served-name", "messages": HELLO}, {"model": "nobody", "messages": HELLO}, []]
    for body in bodies:
        assert len(gateway.post(body).headers.get_list("x-request-id")) == 1


def test_fifty_clients_at_once(gateway: Gateway) -> None:
    """More than a default connection pool holds, some of them leaving in the middle."""
    slow = {"model": "served-name", "messages": [{"role": "user", "content": "slow_stream"}], "stream": True}
    done: list[int] = []

    def leave() -> None:
        with httpx.stream("POST", f"{gateway.url}/v1/chat/completions", json=slow, timeout=20) as response:
            next(response.iter_bytes())
            done.append(response.status_code)

    def stay() -> None:
        done.append(gateway.post({"model": "alias", "messages": HELLO}).status_code)

    threads = [threading.Thread(target=leave if number % 2 else stay) for number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert done == [200] * 50
    wait_for(lambda: sum("aborted" in line for line in gateway.engine.requests()) == 25)


def test_a_thousand_clients_that_leave_in_the_middle(gateway: Gateway) -> None:
    slow = {"model": "served-name", "messages": [{"role": "user", "content": "slow_stream"}], "stream": True}
    gateway.post({"model": "served-name", "messages": HELLO})
    before = _open_files()

    def leave() -> None:
        with httpx.Client(timeout=60) as client:
            for _ in range(50):
                with client.stream("POST", f"{gateway.url}/v1/chat/completions", json=slow) as response:
                    next(response.iter_bytes())

    threads = [threading.Thread(target=leave) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    wait_for(lambda: sum("aborted" in line for line in gateway.engine.requests()) == 1000, 60)
    assert len(gateway.counted) == 1001
    assert _open_files() <= before + 3


def test_open_files_do_not_grow(gateway: Gateway) -> None:
    body = {"model": "served-name", "messages": HELLO}
    gateway.post(body)
    before = _open_files()
    for _ in range(20):
        gateway.post(body)
        gateway.post({**body, "stream": True})
        gateway.post({"model": "served-name", "messages": [{"role": "user", "content": "lies"}]})
    assert _open_files() <= before + 3
