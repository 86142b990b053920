"""OpenAI's routes of a run that answers between its steps, on a private unix socket."""

import itertools
import json
import queue
import select
import socket
import socketserver
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, TypeVar

from app.catalog import RunContext
from app.errors import Code
from workers.loading.live import MOST_SECONDS, MOST_TOKENS, PATIENCE, Ask, Live, Refused
from workers.turns import plain, switches

LOOK_SECONDS = 0.2
"""How often it is looked whether whoever waits for a piece is still there."""
_NOT_HERE = (
    *("logprobs", "top_logprobs", "structured_outputs", "echo", "suffix"),
    *("logit_bias", "bad_words", "allowed_token_ids", "stop_token_ids", "min_tokens", "ignore_eos"),
    *("truncate_prompt_tokens", "include_stop_str_in_output", "continue_final_message"),
    *("min_p", "presence_penalty", "frequency_penalty"),
)
_NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "top_k": (-1, 0),
    "repetition_penalty": (1,),
    "skip_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "include_reasoning": (True,),
}
"""What may be said of these, because it changes nothing."""
Result = TypeVar("Result")


def answering(ctx: RunContext, model: Any, tokenizer: Any) -> "LiveServer | None":
    """The socket of this run; None where nobody asks, or where the model writes no text."""
    if ctx.live_socket is None or not getattr(model, "can_generate", lambda: False)():
        return None
    return LiveServer(ctx.live_socket, Live(ctx, tokenizer))


class LiveServer:
    """Listens at ``path`` until ``close``; a socket that an earlier attempt left there is replaced."""

    def __init__(self, path: Path, live: Live) -> None:
        self._path, self._live = path, live
        path.unlink(missing_ok=True)
        self._server = _Server(str(path), _handler(live))
        threading.Thread(target=self._server.serve_forever, args=(0.05,), name="live", daemon=True).start()

    def between_steps(self, model: Any, step: int) -> None:
        """See ``Live.between_steps``."""
        self._live.between_steps(model, step)

    def close(self) -> None:
        """Nobody is answered any more; who waits is told so."""
        self._path.unlink(missing_ok=True)
        self._live.end()
        self._server.shutdown()
        self._server.server_close()


def parse(path: str, body: bytes) -> Ask:
    """Raises Refused for what this endpoint cannot do; the gateway has checked the rest."""
    try:
        value = json.loads(body)
        chat = path == "/v1/chat/completions"
        asked = {name for name in _NOT_HERE if value.get(name)}
        asked |= {name for name, quiet in _NO_EFFECT.items() if value.get(name) not in (None, *quiet)}
        asked |= {"add_special_tokens"} if value.get("add_special_tokens") not in (None, not chat) else set()
        if value.get("tools"):
            message = "tools: a run in training reads no calls of them: deploy the model for it"
            raise Refused(400, message, "tools", Code.TOOLS_NOT_SUPPORTED)
        if asked:
            name = min(asked)
            raise Refused(400, f"{name} is not possible while a run answers itself: deploy the model for it", name)
        if (value.get("n") or 1) != 1:
            raise Refused(400, "n: a run in training gives one answer at a time", "n")
        prompt = "" if chat else value["prompt"]
        if not isinstance(prompt, str):
            raise Refused(400, "prompt: a run in training takes one text", "prompt")
        most = value.get("max_completion_tokens") or value.get("max_tokens") or MOST_TOKENS
        stop = value.get("stop") or []
        temperature = value.get("temperature")
        return Ask(
            chat=chat,
            messages=_named("messages", plain, value["messages"]) if chat else [],
            prompt=prompt,
            model=str(value.get("model", "")),
            tokens=min(int(most), MOST_TOKENS),
            temperature=1.0 if temperature is None else float(temperature),
            top_p=float(value.get("top_p") or 1.0),
            seed=value.get("seed"),
            stop=[stop] if isinstance(stop, str) else list(stop),
            stream=bool(value.get("stream")),
            usage=bool((value.get("stream_options") or {}).get("include_usage")),
            template=_named("reasoning_effort", switches, value) if chat else {},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(400, f"the request cannot be read: {error}") from error


def _named(param: str, read: Callable[[Any], Result], value: Any) -> Result:
    """What is read of it. Raises Refused that names ``param`` for a ValueError, which names it itself."""
    try:
        return read(value)
    except ValueError as error:
        raise Refused(400, str(error), param) from error


def _hung_up(connection: socket.socket) -> bool:
    """Whether the other end is closed; told without reading, as more may have been sent before."""
    watched = select.poll()
    watched.register(connection, 0)  # a hang-up is told unasked
    return bool(watched.poll(0))


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True


def _handler(live: Live) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def address_string(self) -> str:
            return "gateway"

        def log_message(self, format: str, *values: Any) -> None:
            """Requests are told in the job's history."""

        def do_GET(self) -> None:
            self._json(200 if self.path == "/health" else 404, {})

        def do_POST(self) -> None:
            try:
                # Read in any case: what is left would be taken for the next request. The gateway lets no large ones in.
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                if self.path not in ("/v1/chat/completions", "/v1/completions"):
                    # With 404 the gateway would understand that the model is not here.
                    raise Refused(501, "a run in training has /v1/chat/completions and /v1/completions")
                with live.asking(parse(self.path, body)) as ask:
                    self._reply(ask)
            except Refused as error:
                self._json(error.status, _told(error))
            except OSError:
                self.close_connection = True  # whoever asked has left

        def _reply(self, ask: Ask) -> None:
            """The first piece is waited for before a word is said, so that a refusal still has its status."""
            name = f"{'chatcmpl' if ask.chat else 'cmpl'}-{uuid.uuid4().hex}"
            head = {"id": name, "created": int(time.time()), "model": ask.model}
            pieces = self._pieces(ask)
            if not ask.stream:
                self._json(200, _whole(head, ask, list(pieces)))
                return
            first = next(pieces)
            self.close_connection = True
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("connection", "close")
            self.end_headers()
            try:
                for piece in itertools.chain([first], pieces):
                    for event in _events(head, ask, piece):
                        self.wfile.write(b"data: " + event + b"\n\n")
            except Refused as error:
                self.wfile.write(b"data: " + json.dumps(_told(error)).encode() + b"\n\n")

        def _pieces(self, ask: Ask) -> Iterator[Any]:
            until = time.monotonic() + PATIENCE
            while True:
                if _hung_up(self.connection):
                    raise ConnectionAbortedError  # so that the computing ends, and others have their turn
                try:
                    piece = ask.pieces.get(timeout=LOOK_SECONDS)
                except queue.Empty:
                    if time.monotonic() < until:
                        continue
                    raise Refused(503, "the run is in the middle of a step that takes longer") from None
                if isinstance(piece, Refused):
                    raise piece
                yield piece
                if isinstance(piece, dict):
                    return
                until = time.monotonic() + MOST_SECONDS + PATIENCE

        def _json(self, status: int, value: dict[str, Any]) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            if status == 503:
                self.send_header("retry-after", "2")
            self.end_headers()
            self.wfile.write(body)

    return Handler


def _told(error: Refused) -> dict[str, Any]:
    return {"error": {"message": str(error), "type": error.kind, "param": error.param, "code": error.status}}


def _whole(head: dict[str, Any], ask: Ask, pieces: list[Any]) -> dict[str, Any]:
    text, end = "".join(pieces[:-1]), pieces[-1]
    said = {"message": {"role": "assistant", "content": text}} if ask.chat else {"text": text}
    choice = {"index": 0, **said, "logprobs": None, "finish_reason": end["finish_reason"]}
    kind = "chat.completion" if ask.chat else "text_completion"
    return {**head, "object": kind, "choices": [choice], "usage": end["usage"], "step": end["step"]}


def _events(head: dict[str, Any], ask: Ask, piece: Any) -> Iterator[bytes]:
    head = {**head, "object": "chat.completion.chunk" if ask.chat else "text_completion"}

    def event(text: str, finish: str | None) -> bytes:
        said = {"delta": {"role": "assistant", "content": text}} if ask.chat else {"text": text}
        return json.dumps({**head, "choices": [{"index": 0, **said, "finish_reason": finish}]}).encode()

    if isinstance(piece, str):
        yield event(piece, None)
        return
    yield event("", piece["finish_reason"])
    if ask.usage:
        yield json.dumps({**head, "choices": [], "usage": piece["usage"]}).encode()
    yield b"[DONE]"
