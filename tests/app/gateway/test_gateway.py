"""The gateway against an engine on a real unix socket, asked by the real openai client."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import httpx
import openai  # noqa: TID253  (slow to import, which only matters in the service)
import pytest
import uvicorn
from fastapi import FastAPI

from app import http
from app.deployments.service import Route
from app.deps import Server
from app.errors import Code, NotFound, Unavailable
from app.gateway.proxy import ROUTE_SECONDS, EngineClient
from app.gateway.router import find_route, router
from app.projects.caller import Caller
from app.settings import Settings
from workers.replica import UnixConnection

FAKE_ENGINE = Path(__file__).parents[2] / "workers" / "fake_engine.py"
HELLO: list[Any] = [{"role": "user", "content": "hi"}]


class Engine:
    """A fake engine that can be ended and started again on another socket."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self.start()

    def start(self) -> None:
        """Starts it and waits until it listens."""
        self._count += 1
        self.socket = str(self._folder / f"{self._count}.sock")
        self.log = self._folder / f"{self._count}.log"
        arguments = [self.socket, "moody", f"--log={self.log}", "--served=served-name"]
        self._process = subprocess.Popen([sys.executable, str(FAKE_ENGINE), *arguments], stdout=subprocess.DEVNULL)
        wait_for(Path(self.socket).exists)

    def stop(self) -> None:
        """Kills it, socket and all."""
        self._process.kill()
        self._process.wait()
        Path(self.socket).unlink()

    def pause(self) -> None:
        """It holds its socket but answers nothing."""
        self._process.send_signal(signal.SIGSTOP)

    def requests(self) -> list[dict[str, Any]]:
        """What it was asked."""
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []


class Gateway:
    """A tiny application with the gateway in it, on a real port."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.looked_up: list[tuple[str, str]] = []
        self.starting = False
        self.clock = time.monotonic
        app = FastAPI(lifespan=self._lifespan)
        http.install(app)
        app.add_middleware(http.Guard, settings=Settings())
        app.include_router(router)
        app.dependency_overrides[find_route] = lambda: self.find
        app.dependency_overrides[get_args(Server)[1].dependency] = lambda: Caller("p1", "k1", frozenset({"serve"}))
        config = uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1, ws="none")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        wait_for(lambda: self._server.started)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        app.state.engine_client = EngineClient(lambda: self.clock())
        yield
        await app.state.engine_client.close()

    def find(self, model: str, project_id: str) -> Route:
        """In place of the database."""
        self.looked_up.append((model, project_id))
        if self.starting:
            raise Unavailable("starting", retry_after=5, code=Code.MODEL_NOT_READY)
        if model not in ("served-name", "alias"):
            raise NotFound(f"the model {model} is not being served", param="model", code=Code.MODEL_NOT_FOUND)
        return Route(self.engine.socket, "served-name", "dep-1")

    def close(self) -> None:
        """Stops the server."""
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()

    def post(self, body: Any, path: str = "chat/completions") -> httpx.Response:
        """A raw request."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return httpx.post(f"{self.url}/v1/{path}", content=content, timeout=20)


def wait_for(condition: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@pytest.fixture
def engine() -> Iterator[Engine]:
    # Not under tmp_path: a unix socket's path holds 107 bytes.
    with tempfile.TemporaryDirectory(prefix="ts-") as folder:
        engine = Engine(Path(folder))
        yield engine
        with contextlib.suppress(FileNotFoundError):
            engine.stop()


@pytest.fixture
def gateway(engine: Engine) -> Iterator[Gateway]:
    gateway = Gateway(engine)
    yield gateway
    gateway.close()


@pytest.fixture(scope="module")
def shared() -> Iterator[Gateway]:
    """One for all requests that reach no engine."""
    with tempfile.TemporaryDirectory(prefix="ts-") as folder:
        gateway = Gateway(Engine(Path(folder)))
        yield gateway
        gateway.close()
        gateway.engine.stop()


@pytest.fixture
def client(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=gateway.url + "/v1", api_key="k", max_retries=0, timeout=20) as client:
        yield client


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
    expected = {"model": "served-name", "messages": messages, "stream_options": {}}
    assert gateway.engine.requests()[0]["body"] == expected


def test_what_the_engine_refuses_is_a_400_with_its_words(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "bad_request"}]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="maximum context length is 16"):
            client.chat.completions.create(model="alias", messages=messages, stream=stream)


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
        return Route(gateway.engine.socket, "lora", "dep-1")

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
    assert len(gateway.looked_up) == 2


def test_only_two_routes_are_open(shared: Gateway) -> None:
    """None of the engine's others, which change it or tell of it."""
    for path in ("/invocations", "/pause", "/v1/update_weights", "/metrics", "/v1/load_lora_adapter", "/tokenize"):
        assert httpx.post(shared.url + path, json={}).status_code == 404
    assert shared.engine.requests() == []


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


def test_open_files_do_not_grow(gateway: Gateway) -> None:
    body = {"model": "served-name", "messages": HELLO}
    gateway.post(body)
    before = _open_files()
    for _ in range(20):
        gateway.post(body)
        gateway.post({**body, "stream": True})
        gateway.post({"model": "served-name", "messages": [{"role": "user", "content": "lies"}]})
    assert _open_files() <= before + 3
