"""A run that answers between its steps: the bytes that it ends with are those of a run that nobody asked."""

import contextlib
import hashlib
import http.client
import itertools
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.catalog import Catalog
from tests.support import wait_for
from tests.workers.context import RecordingContext
from tests.workers.recipes.conftest import SAYS_IT
from workers.loading.live import MOST_TOKENS, Ask, Live, Refused
from workers.loading.live_http import LiveServer, parse
from workers.replica import UnixConnection

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:bitsandbytes",
    "ignore:.*_check_is_size will be removed:FutureWarning",
)
ASKED = {"model": "numbers:ckpt-live", "messages": [{"role": "user", "content": "17"}], "max_tokens": 4}
THINKS = "{% if enable_thinking %}one two three {{ reasoning_effort }}{% endif %}"
LORA = {"peft_config": {"r": 8, "target_modules": "all-linear", "lora_dropout": 0.1}}
SPECS: dict[str, dict[str, Any]] = {
    "sft": {"model": LORA, "training": {"max_steps": 12, "learning_rate": 1e-2}},
    "ppo": {
        "model": {"peft_config": {"r": 8, "target_modules": "all-linear"}},
        "graders": [SAYS_IT],
        "ppo": {"response_length": 8},
        "training": {"max_steps": 4, "per_device_train_batch_size": 8},
    },
}


@pytest.fixture
def socket() -> Iterator[Path]:
    """A path short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="ts-") as folder:
        yield Path(folder) / "x.l"


def post(socket: Path, body: dict[str, Any] | bytes, path: str = "/v1/chat/completions") -> tuple[int, bytes]:
    connection = UnixConnection(str(socket), 120)
    try:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, data, {"content-type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def asking(socket: Path, over: threading.Event, found: list[dict[str, Any]]) -> None:
    """Asks, one request after the other, with and without chance, until the run is over."""
    number = 0
    while not over.is_set():
        number += 1
        with contextlib.suppress(OSError, http.client.HTTPException):
            status, body = post(socket, {**ASKED, "temperature": number % 2, "max_tokens": 1 + number % 5})
            if status == 200:
                found.append(json.loads(body))
                continue
        time.sleep(0.01)


@pytest.mark.parametrize("algorithm", list(SPECS))
def test_a_run_that_was_asked_ends_with_the_same_bytes(
    algorithm: str, tmp_path: Path, socket: Path, speller: Path, numbers: Path, word_file: Path, catalog: Catalog
) -> None:
    recipe = catalog.recipes[algorithm]
    described = SPECS[algorithm]
    spec = recipe.spec.model_validate(
        {
            "algorithm": algorithm,
            **described,
            "model": {"model_name_or_path": "artifact:art-tiny", **described["model"]},
            "dataset": {"file": "file-1"},
        }
    )
    inputs = {"model.model_name_or_path": speller, "dataset.file": numbers if algorithm == "sft" else word_file}
    ended: list[str] = []
    for name in ("alone", "asked"):
        ctx = RecordingContext(tmp_path / name, inputs, {"model.model_name_or_path": {"name": "tiny"}}, catalog)
        over, found = threading.Event(), list[dict[str, Any]]()
        thread = threading.Thread(target=asking, args=(socket, over, found), daemon=True)
        if name == "asked":
            ctx.live_socket = socket
            thread.start()
        recipe.run(spec, ctx)
        over.set()
        if name == "asked":
            thread.join(30)
            assert len(found) >= 2, "nobody was answered"
            assert len({answer["step"] for answer in found}) >= 2
            assert all(answer["choices"][0]["message"]["role"] == "assistant" for answer in found)
            assert any(answer["choices"][0]["message"]["content"] for answer in found)
            assert ctx.codes().count("live_answered") >= len(found)
        assert not socket.exists()
        ended.append(hashlib.sha256((ctx.folder / "adapter_model.safetensors").read_bytes()).hexdigest())
    assert ended[0] == ended[1]


@pytest.fixture
def answerer(tmp_path: Path, socket: Path, tiny: Path) -> Iterator[threading.Event]:
    """The tiny model behind a socket, its "steps" going by; set the event to make a step last."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template += THINKS
    live = Live(RecordingContext(tmp_path), tokenizer)
    server = LiveServer(socket, live)
    held, over = threading.Event(), threading.Event()

    def steps() -> None:
        step = 0
        while not over.is_set():
            step += 1
            if not held.is_set():
                server.between_steps(model, step)
            time.sleep(0.005)

    thread = threading.Thread(target=steps, daemon=True)
    thread.start()
    yield held
    over.set()
    thread.join(30)
    server.close()


def test_a_stream_and_a_whole_answer_say_the_same(socket: Path, answerer: threading.Event) -> None:
    asked = {**ASKED, "temperature": 0, "max_tokens": 12}
    status, body = post(socket, asked)
    whole = json.loads(body)
    assert status == 200
    assert whole["usage"]["completion_tokens"] <= 12
    status, body = post(socket, {**asked, "stream": True, "stream_options": {"include_usage": True}})
    events = [line.removeprefix(b"data: ") for line in body.split(b"\n\n") if line]
    assert events[-1] == b"[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert chunks[-1]["usage"] == whole["usage"]
    assert chunks[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    said = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks[:-1])
    assert said == whole["choices"][0]["message"]["content"]


def test_a_seed_draws_the_same_and_a_stop_text_ends_the_answer(socket: Path, answerer: threading.Event) -> None:
    asked = {**ASKED, "seed": 7, "max_tokens": 24}
    texts = [json.loads(post(socket, asked)[1])["choices"][0]["message"]["content"] for _ in range(2)]
    assert texts[0] == texts[1]
    stop = texts[0][5:7]
    assert stop, "the seed's answer is too short for this test"
    choice = json.loads(post(socket, {**asked, "stop": stop})[1])["choices"][0]
    assert choice["message"]["content"] == texts[0][: texts[0].index(stop)]
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("path", "body", "status", "says", "param"),
    [
        ("/v1/chat/completions", {**ASKED, "tools": [{"type": "function"}]}, 400, "tools", "tools"),
        ("/v1/chat/completions", {**ASKED, "logprobs": True}, 400, "logprobs is not possible", "logprobs"),
        ("/v1/chat/completions", {**ASKED, "n": 2}, 400, "one answer at a time", "n"),
        ("/v1/chat/completions", {**ASKED, "reasoning_effort": "a lot"}, 400, "one of none", "reasoning_effort"),
        ("/v1/chat/completions", {**ASKED, "messages": [{"content": [{"type": "audio"}]}]}, 400, "text", "messages"),
        ("/v1/chat/completions", {**ASKED, "messages": [{"content": "so " * 3000}]}, 400, "no room", "messages"),
        ("/v1/chat/completions", {"model": "x"}, 400, "cannot be read", None),
        ("/v1/chat/completions", b"{", 400, "cannot be read", None),
        ("/v1/completions", {"model": "x", "prompt": [1, 2]}, 400, "one text", "prompt"),
        ("/v1/completions", {"model": "x", "prompt": ""}, 400, "no room", "prompt"),
        ("/v1/completions", {"model": "x", "prompt": "so " * 3000}, 400, "no room", "prompt"),
        ("/v1/embeddings", {"model": "x"}, 501, "/v1/completions", None),
    ],
)
def test_what_a_run_cannot_answer_is_refused(
    path: str, body: Any, status: int, says: str, param: str | None, socket: Path, answerer: threading.Event
) -> None:
    answered = post(socket, body, path)
    error = json.loads(answered[1])["error"]
    assert (answered[0], error["param"]) == (status, param)
    assert says in error["message"]
    assert (error["type"] == "tools_not_supported") is (param == "tools")
    assert post(socket, {"model": "x", "prompt": "1", "max_tokens": 1}, "/v1/completions")[0] == 200, "and it goes on"


def test_a_route_that_is_not_here_leaves_the_connection_usable(socket: Path, answerer: threading.Event) -> None:
    connection = UnixConnection(str(socket), 60)
    for path, status in (("/v1/embeddings", 501), ("/v1/chat/completions", 200)):
        connection.request("POST", path, json.dumps(ASKED), {"content-type": "application/json"})
        response = connection.getresponse()
        assert (response.status, bool(json.loads(response.read()))) == (status, True)
    connection.close()


def test_the_template_is_told_whether_to_think(socket: Path, answerer: threading.Event, tiny: Path) -> None:
    from transformers import AutoTokenizer  # noqa: PLC0415

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template += THINKS
    for more, told in (
        ({}, {}),
        ({"chat_template_kwargs": {"enable_thinking": True}}, {"enable_thinking": True}),
        ({"reasoning_effort": "low"}, {"enable_thinking": True, "reasoning_effort": "low"}),
    ):
        usage = json.loads(post(socket, {**ASKED, "max_tokens": 1, **more})[1])["usage"]
        rendered = tokenizer.apply_chat_template(ASKED["messages"], add_generation_prompt=True, tokenize=False, **told)
        assert usage["prompt_tokens"] == len(tokenizer(rendered, add_special_tokens=False).input_ids)


@pytest.mark.parametrize("stream", [False, True])
def test_whoever_leaves_before_a_step_is_over_leaves_the_place_free(stream: bool, tmp_path: Path, socket: Path) -> None:
    live = Live(RecordingContext(tmp_path), None)
    server = LiveServer(socket, live)
    connection = UnixConnection(str(socket), 60)
    connection.request("POST", "/v1/chat/completions", json.dumps({**ASKED, "stream": stream}))
    wait_for(live._busy.locked, 10)
    connection.close()
    wait_for(lambda: not live._busy.locked(), 10)
    assert live._next() is None, "and no step answers it"
    server.close()


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_nobody_waits_for_is_computed_no_further(
    stream: bool, tmp_path: Path, socket: Path, tiny: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    ctx, tokens, some = RecordingContext(tmp_path), itertools.count(1), threading.Event()

    def tick() -> None:
        time.sleep(0.01)
        if next(tokens) == 3:
            some.set()

    ctx.tick = tick  # type: ignore[method-assign]
    live = Live(ctx, AutoTokenizer.from_pretrained(tiny))
    server = LiveServer(socket, live)
    connection = UnixConnection(str(socket), 60)
    body = {**ASKED, "max_tokens": MOST_TOKENS, "temperature": 0, "stream": stream}
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    wait_for(live._busy.locked, 10)
    model = AutoModelForCausalLM.from_pretrained(tiny)
    step = threading.Thread(target=lambda: wait_for(lambda: live.between_steps(model, 1) or ctx.codes(), 20))
    step.start()
    assert some.wait(20)
    connection.close()
    step.join(30)
    assert ctx.codes() == ["live_left"]
    assert next(tokens) < MOST_TOKENS // 2
    server.close()


def test_one_at_a_time_and_whoever_left_is_not_answered(
    socket: Path, answerer: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    answerer.set()
    monkeypatch.setattr("workers.loading.live_http.PATIENCE", 0.5)
    first: list[int] = []
    thread = threading.Thread(target=lambda: first.append(post(socket, ASKED)[0]))
    thread.start()
    time.sleep(0.2)
    status, body = post(socket, ASKED)
    assert (status, json.loads(body)["error"]["message"]) == (503, "this run answers one request at a time")
    thread.join(30)
    assert first == [503], "a step that lasts is not waited for without end"
    answerer.clear()
    assert post(socket, ASKED)[0] == 200


def test_an_answer_has_its_cap() -> None:
    assert parse("/v1/chat/completions", json.dumps({**ASKED, "max_tokens": 100_000}).encode()).tokens == MOST_TOKENS
    parts = [{"role": "user", "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "7"}]}]
    (turn,) = parse("/v1/chat/completions", json.dumps({**ASKED, "messages": parts}).encode()).messages
    assert turn["content"] == "1\n7", "as vLLM joins them"


@pytest.mark.parametrize(
    ("field", "changes", "quiet"),
    [
        ("presence_penalty", 0.5, 0),
        ("frequency_penalty", -0.5, 0.0),
        ("repetition_penalty", 1.2, 1.0),
        ("top_k", 5, -1),
        ("min_p", 0.1, 0),
        ("logit_bias", {"1": 5}, {}),
        ("stop_token_ids", [1], []),
        ("skip_special_tokens", False, True),
        ("include_reasoning", False, True),
        ("add_special_tokens", True, False),
        ("response_format", {"type": "json_object"}, {"type": "text"}),
    ],
)
def test_what_would_change_the_answer_is_never_ignored(field: str, changes: Any, quiet: Any) -> None:
    with pytest.raises(Refused, match=f"{field} is not possible"):
        parse("/v1/chat/completions", json.dumps({**ASKED, field: changes}).encode())
    for value in (quiet, None):
        assert parse("/v1/chat/completions", json.dumps({**ASKED, field: value}).encode()).tokens == 4


def test_who_waits_when_the_run_ends_is_told(tmp_path: Path) -> None:
    live = Live(RecordingContext(tmp_path), None)
    ask = Ask(True, [], "", "x", 1, 0.0, 1.0, None, [], False, False)
    with live.asking(ask):
        live.end()
        assert isinstance(ask.pieces.get_nowait(), Refused)
