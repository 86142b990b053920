"""The plain engine in this process: what is asked while others wait, what a refusal names, what is counted."""

import asyncio
import json
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import ClientSession, UnixConnector, web
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.workers.conftest import make_model
from workers.generation.server import Server
from workers.generation.writer import Writer

PROMPT = "zero one two"
Post = Callable[..., Awaitable[tuple[int, Any]]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that changes a lot."""
    torch.manual_seed(1)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(whole, config).save_pretrained(folder)
    return folder


@pytest.fixture
def writer(model: Path) -> Writer:
    return Writer(model, "plain", "float32", 64)


@pytest.fixture
def socket() -> Iterator[Path]:
    """A path short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="ts-") as folder:
        yield Path(folder) / "s"


def served(writer: Writer, socket: Path, ask: Callable[[Post], Awaitable[None]]) -> None:
    """Runs ``ask`` with a way to post to the engine."""

    async def go() -> None:
        runner = web.AppRunner(Server(writer, hot_load=True).app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.UnixSite(runner, str(socket)).start()
        async with ClientSession("http://engine", connector=UnixConnector(str(socket))) as session:

            async def post(path: str, **body: Any) -> tuple[int, Any]:
                async with session.post(f"/v1/{path}", json=body) as response:
                    text = await response.text()
                    return response.status, text if body.get("stream") else json.loads(text)

            try:
                await ask(post)
            finally:
                await runner.cleanup()

    asyncio.run(go())


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.01)


def greedy(model: Path, adapter: Path | None) -> str:
    """What transformers and peft write after the prompt."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    whole = PeftModel.from_pretrained(whole, adapter) if adapter else whole
    whole.generation_config.eos_token_id = None
    output = whole.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=8, do_sample=False)
    return str(tokenizer.decode(output[0, -8:], skip_special_tokens=True))


@pytest.mark.parametrize("others", [0, 1])
def test_what_waits_for_an_adapter_that_is_put_away_is_answered_by_it(
    others: int, model: Path, adapter: Path, writer: Writer, socket: Path
) -> None:
    """Never by the base; two answers, so that the second begins when the name is long gone."""
    for name in ["a", "b"][: 1 + others]:
        writer.load(name, adapter)
    asked = {"model": "a", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True, "n": 2}

    async def ask(post: Post) -> None:
        writer._turn.acquire()  # somebody else's answer is being made
        try:
            first = asyncio.create_task(post("completions", **asked))
            await until(lambda: writer.waiting)
            put_away = asyncio.create_task(post("unload_lora_adapter", lora_name="a"))
            await until(lambda: "a" not in writer.models)
            status, body = await post("completions", **asked)
            assert (status, body["error"]["param"]) == (404, "model"), "the gateway asks for the way anew"
        finally:
            writer._turn.release()
        assert await first == (200, (await first)[1])
        said = {choice["text"] for choice in (await first)[1]["choices"]}
        assert said == {greedy(model, adapter)} != {greedy(model, None)}
        assert (await put_away)[0] == 200
        await until(lambda: len(writer._inside) == others)
        assert isinstance(writer._model, PeftModel) is bool(others)
        _, body = await post("completions", **{**asked, "model": "plain"})
        assert body["choices"][0]["text"] == greedy(model, None)

    served(writer, socket, ask)


CHAT = [{"role": "user", "content": "one two"}]


def test_a_refusal_names_the_field(writer: Writer, socket: Path) -> None:
    bodies: list[tuple[dict[str, Any], str, str]] = [
        ({"messages": CHAT, "tools": [{"type": "function"}]}, "tools", "tools_not_supported"),
        ({"messages": CHAT, "top_logprobs": 3}, "top_logprobs", "BadRequestError"),
        ({"messages": CHAT, "reasoning_effort": "a lot"}, "reasoning_effort", "BadRequestError"),
        ({"messages": CHAT, "chat_template": "{{ x.y.z }}"}, "messages", "BadRequestError"),
        ({"messages": CHAT, "max_tokens": 64}, "messages", "BadRequestError"),
        ({"prompt": PROMPT, "logprobs": 3}, "logprobs", "BadRequestError"),
        ({"prompt": [9999]}, "prompt", "BadRequestError"),
        ({"prompt": PROMPT, "max_tokens": 64}, "prompt", "BadRequestError"),
    ]

    async def ask(post: Post) -> None:
        for body, param, kind in bodies:
            status, answer = await post(
                "chat/completions" if "messages" in body else "completions", model="plain", **body
            )
            error = answer["error"]
            assert (status, error["code"], error["param"], error["type"]) == (400, 400, param, kind)

    served(writer, socket, ask)


def test_a_prompt_counts_once_however_many_answers_it_has(writer: Writer, socket: Path, model: Path) -> None:
    tokenizer, prompts = AutoTokenizer.from_pretrained(model), ["zero", "one two three"]
    asked = sum(len(tokenizer(prompt).input_ids) for prompt in prompts)
    expected = {"prompt_tokens": asked, "completion_tokens": 8, "total_tokens": asked + 8}
    body = {"model": "plain", "prompt": prompts, "n": 2, "max_tokens": 2, "ignore_eos": True}

    async def ask(post: Post) -> None:
        assert (await post("completions", **body))[1]["usage"] == expected
        _, text = await post("completions", **body, stream=True, stream_options={"include_usage": True})
        *_, last, done = text.strip().split("\n\n")
        assert (json.loads(last.removeprefix("data: "))["usage"], done) == (expected, "data: [DONE]")

    served(writer, socket, ask)


def test_the_template_is_told_whether_to_think(writer: Writer, socket: Path, model: Path) -> None:
    template = "{{ messages[0].content }}{{ ' two two' if enable_thinking }} {{ reasoning_effort }}"
    tokenizer = AutoTokenizer.from_pretrained(model)
    body = {"model": "plain", "messages": CHAT, "max_tokens": 1, "chat_template": template}

    async def ask(post: Post) -> None:
        for more, text in (
            ({}, "one two "),
            ({"chat_template_kwargs": {"enable_thinking": True}}, "one two two two "),
            ({"reasoning_effort": "low"}, "one two two two low"),
        ):
            _, answer = await post("chat/completions", **body, **more)
            assert answer["usage"]["prompt_tokens"] == len(tokenizer(text).input_ids)

    served(writer, socket, ask)
