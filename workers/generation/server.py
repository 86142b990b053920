"""OpenAI's completion routes over ``generate``, on a unix socket: ``python -m workers.generation.server``."""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import threading
import time
import uuid
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, NamedTuple

from aiohttp import web

from workers.generation.asked import Asked, Refused, read
from workers.generation.writer import Adapter, Read, Writer, Written

_MAX_BODY = 16 << 20


class _Prompt(NamedTuple):
    """One answer that is to be written, and by whom."""

    asked: Asked
    ids: list[int]
    adapter: Adapter | None


class Server:
    """The routes of an engine. One request is computed at a time; the others wait in line."""

    def __init__(self, writer: Writer, *, hot_load: bool) -> None:
        self._writer = writer
        self.app = web.Application(client_max_size=_MAX_BODY)
        self.app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/metrics", self._metrics),
                web.get("/v1/models", self._models),
                web.post("/v1/completions", self._complete),
                web.post("/v1/chat/completions", self._complete),
            ]
        )
        if hot_load:
            self.app.add_routes(
                [
                    web.post("/v1/load_lora_adapter", self._load),
                    web.post("/v1/unload_lora_adapter", self._unload),
                ]
            )

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({})

    async def _metrics(self, request: web.Request) -> web.Response:
        text = f"# TYPE tunesmith_requests_running gauge\ntunesmith_requests_running {self._writer.waiting}\n"
        return web.Response(text=text)

    async def _models(self, request: web.Request) -> web.Response:
        own = {"object": "model", "owned_by": "tunesmith", "max_model_len": self._writer.room}
        data = [{"id": name, **own} for name in self._writer.models]
        return web.json_response({"object": "list", "data": data})

    async def _load(self, request: web.Request) -> web.Response:
        try:
            body = await request.json()
            await asyncio.to_thread(self._writer.load, str(body["lora_name"]), Path(body["lora_path"]))
        except Refused as error:
            return _error(error)
        return web.json_response({})

    async def _unload(self, request: web.Request) -> web.Response:
        try:
            await asyncio.to_thread(self._writer.unload, str((await request.json())["lora_name"]))
        except Refused as error:
            return _error(error)
        return web.json_response({})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        chat = request.path == "/v1/chat/completions"
        # An adapter that is put away from here on stays until all of this is answered.
        with contextlib.ExitStack() as held:
            try:
                body = await request.json()
                asked = read(body, chat=chat)
                adapter = held.enter_context(self._writer.using(asked[0].model))
                ids = await asyncio.to_thread(lambda: [self._writer.ids(each) for each in asked])
            except Refused as error:
                return _error(error)
            prompts = [_Prompt(*each, adapter) for each in zip(asked, ids, strict=True)]
            answer = Answer(asked[0].model, chat=chat)
            if body.get("stream"):
                usage = bool((body.get("stream_options") or {}).get("include_usage"))
                return await self._stream(request, answer, prompts, usage)
            written = []
            for prompt in prompts:
                async with contextlib.aclosing(self._pieces(prompt)) as pieces:
                    written += [piece async for piece in pieces if isinstance(piece, Written)]
            return web.json_response(answer.whole(prompts, written))

    async def _stream(
        self, request: web.Request, answer: "Answer", prompts: list[_Prompt], usage: bool
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        written = []
        for index, prompt in enumerate(prompts):
            if answer.chat:
                await response.write(_event(answer.piece(index, "", first=True)))
            async with contextlib.aclosing(self._pieces(prompt)) as pieces:
                async for piece in pieces:
                    if isinstance(piece, Written):
                        written.append(piece)
                        await response.write(_event(answer.piece(index, "", finish=piece.finish)))
                    else:
                        await response.write(_event(answer.piece(index, piece)))
        if usage:
            await response.write(_event({**answer.frame(chunk=True), "choices": [], "usage": _usage(prompts, written)}))
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _pieces(self, prompt: _Prompt) -> AsyncGenerator[str | Written, None]:
        """Text as it is made, and the whole at last; when nobody waits for it any more the computing ends."""
        loop, gone = asyncio.get_running_loop(), threading.Event()
        pieces: asyncio.Queue[str | Written | BaseException] = asyncio.Queue()

        def put(piece: str | Written | BaseException) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        def work() -> None:
            try:
                put(self._writer.write(*prompt, put, gone))
            except BaseException as error:
                put(error)

        threading.Thread(target=work, name="write", daemon=True).start()
        try:
            while True:
                piece = await pieces.get()
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
                if isinstance(piece, Written):
                    return
        finally:
            gone.set()


class Answer:
    """The shapes of OpenAI's answers to one request."""

    def __init__(self, model: str, *, chat: bool) -> None:
        self.chat = chat
        self._model = model
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex[:24]}"
        self._created = int(time.time())

    def frame(self, *, chunk: bool) -> dict[str, Any]:
        """What every answer and every piece begins with."""
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def piece(self, index: int, text: str, *, first: bool = False, finish: str | None = None) -> dict[str, Any]:
        """One event of a stream."""
        delta: dict[str, Any] = {"role": "assistant", "content": ""} if first else {"content": text} if text else {}
        own = {"delta": delta} if self.chat else {"text": text}
        return {
            **self.frame(chunk=True),
            "choices": [{"index": index, **own, "logprobs": None, "finish_reason": finish}],
        }

    def whole(self, prompts: list[_Prompt], written: list[Written]) -> dict[str, Any]:
        """The answer to a request that did not ask for a stream."""
        choices = []
        for index, (prompt, each) in enumerate(zip(prompts, written, strict=True)):
            message = {"role": "assistant", "content": each.text}
            own: dict[str, Any] = {"message": message} if self.chat else {"text": each.text}
            own["logprobs"] = self._logprobs(each) if each.logprobs else None
            if prompt.asked.token_ids:
                own["token_ids"] = each.token_ids
            choices.append({"index": index, **own, "finish_reason": each.finish})
        return {**self.frame(chunk=False), "choices": choices, "usage": _usage(prompts, written)}

    def _logprobs(self, written: Written) -> dict[str, Any]:
        pairs = list(zip(written.tokens, written.logprobs, strict=True))
        if not self.chat:
            whole = [*written.read, *(Read(token, value, {token: value}) for token, value in pairs)]
            tokens, values, tops = [list(column) for column in zip(*whole, strict=True)]
            return {
                "tokens": tokens,
                "token_logprobs": values,
                "top_logprobs": tops if written.read else None,
                "text_offset": [],
            }
        return {
            "content": [
                {"token": token, "logprob": value, "bytes": list(token.encode()), "top_logprobs": []}
                for token, value in pairs
            ]
        }


def _usage(prompts: list[_Prompt], written: list[Written]) -> dict[str, int]:
    """A prompt counts once, however many answers it has."""
    prompt = sum(len(each.ids) for each in prompts if not each.asked.number)
    made = sum(len(each.token_ids) for each in written)
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def _error(error: Refused) -> web.Response:
    kinds = {400: "BadRequestError", 404: "NotFoundError"}
    kind = error.kind or kinds.get(error.status, "InternalServerError")
    problem = {"message": error.message, "type": kind, "param": error.param, "code": error.status}
    return web.json_response({"error": problem}, status=error.status)


async def serve(server: Server, socket: str) -> None:
    """Until SIGTERM; what is being answered then gets a moment to end."""
    runner = web.AppRunner(server.app, handler_cancellation=True, shutdown_timeout=20)
    await runner.setup()
    await web.UnixSite(runner, socket).start()
    over = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, over.set)
    await over.wait()
    await runner.cleanup()


def main() -> None:
    """Loads the model, then listens: a socket that is there answers."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--uds", required=True)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--hot-load", action="store_true")
    given = parser.parse_args()
    writer = Writer(given.model, given.served_model_name, given.dtype, given.max_model_len)
    if given.hot_load:
        threading.Thread(target=writer.expect_adapters, name="adapters", daemon=True).start()
    asyncio.run(serve(Server(writer, hot_load=given.hot_load), given.uds))
    # Threads that still compute for nobody hold nothing up.
    os._exit(0)


if __name__ == "__main__":
    main()
