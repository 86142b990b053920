"""OpenAI's completion routes over ``generate``, on a unix socket: ``python -m workers.generation.server``."""

import argparse
import asyncio
import json
import os
import signal
import threading
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from aiohttp import web

from workers.generation.asked import Asked, Refused, read
from workers.generation.writer import Read, Writer, Written

_MAX_BODY = 16 << 20


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
        try:
            body = await request.json()
            asked = read(body, chat=chat)
            prompts = await asyncio.to_thread(lambda: [self._writer.ids(each) for each in asked])
        except Refused as error:
            return _error(error)
        answer = Answer(str(body["model"]), chat=chat)
        if body.get("stream"):
            usage = bool((body.get("stream_options") or {}).get("include_usage"))
            return await self._stream(request, answer, asked, prompts, usage)
        written = []
        for each, ids in zip(asked, prompts, strict=True):
            async for piece in self._pieces(each, ids):
                if isinstance(piece, Written):
                    written.append(piece)
        return web.json_response(answer.whole(written, token_ids=asked[0].token_ids))

    async def _stream(
        self, request: web.Request, answer: "Answer", asked: list[Asked], prompts: list[list[int]], usage: bool
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        written = []
        for index, (each, ids) in enumerate(zip(asked, prompts, strict=True)):
            if answer.chat:
                await response.write(_event(answer.piece(index, "", first=True)))
            async for piece in self._pieces(each, ids):
                if isinstance(piece, Written):
                    written.append(piece)
                    await response.write(_event(answer.piece(index, "", finish=piece.finish)))
                else:
                    await response.write(_event(answer.piece(index, piece)))
        if usage:
            await response.write(_event({**answer.frame(chunk=True), "choices": [], "usage": _usage(written)}))
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _pieces(self, asked: Asked, ids: list[int]) -> AsyncIterator[str | Written]:
        """Text as it is made, and the whole at last; when nobody waits for it any more the computing ends."""
        loop, gone = asyncio.get_running_loop(), threading.Event()
        pieces: asyncio.Queue[str | Written | BaseException] = asyncio.Queue()

        def put(piece: str | Written | BaseException) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        def work() -> None:
            try:
                put(self._writer.write(asked, ids, put, gone))
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

    def whole(self, written: list[Written], *, token_ids: bool = False) -> dict[str, Any]:
        """The answer to a request that did not ask for a stream."""
        choices = []
        for index, each in enumerate(written):
            message = {"role": "assistant", "content": each.text}
            own: dict[str, Any] = {"message": message} if self.chat else {"text": each.text}
            own["logprobs"] = self._logprobs(each) if each.logprobs else None
            if token_ids:
                own["token_ids"] = each.token_ids
            choices.append({"index": index, **own, "finish_reason": each.finish})
        return {**self.frame(chunk=False), "choices": choices, "usage": _usage(written)}

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


def _usage(written: list[Written]) -> dict[str, int]:
    prompt = sum(each.prompt_tokens for each in written)
    made = sum(len(each.token_ids) for each in written)
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def _error(error: Refused) -> web.Response:
    kind = (
        "BadRequestError" if error.status == 400 else "NotFoundError" if error.status == 404 else "InternalServerError"
    )
    problem = {"message": error.message, "type": kind, "param": None, "code": error.status}
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
