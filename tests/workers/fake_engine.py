"""A serving engine without a model, for tests: HTTP over a unix socket, and ways to misbehave (stdlib only).

``python fake_engine.py <socket> <mode> [--log FILE] [--served NAME]``. Modes: ok, exits (at once), never_ready,
hangs (every completion after the first, and then /health too), busy (completions wait while the file
``<socket>.busy`` exists), lies (/health 200, completions 500), leaks (a double-forked child in a session of its own),
stubborn (ignores SIGTERM), flaky (completions 500 while the file ``<socket>.sick`` exists),
dies_mid_stream (closes a stream after two chunks), dies_unheard (after its head), bad_request,
slow_stream (a chunk every 50 ms, for ever),
dies (at the 10th completion), embeds (has /v1/embeddings and no completions),
insomniac (refuses to sleep), clings (sleeps, and frees no memory), sleepy_head (sleeps, and does not wake),
moody (as ok, but a word in the prompt picks one of these modes).

``--also``: it has /v1/embeddings, /v1/responses and /v1/messages too.
It loads LoRA adapters as vLLM does: a folder with a file ``refuse`` is refused, one with a file ``idle`` changes no
answer, and a name that is neither served nor loaded is 404. ``GET /metrics`` tells what runs, as vLLM's does; it is
``<socket>.running`` requests if that file exists.

It sleeps as vLLM does: ``POST /sleep``, ``POST /wake_up``, ``GET /is_sleeping``; what is asked meanwhile waits.
While it sleeps, the file ``<socket>.asleep`` exists: its GPU's memory is free.

``--log`` gets one JSON line per request, and a line ``{"aborted": path}`` when a client went away in a stream.
"""

import argparse
import json
import os
import signal
import socketserver
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

OTHERS = ("/v1/embeddings", "/v1/responses", "/v1/messages")
WORDS = ["Hello", " there", ",", " friend", "."]


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """One thread per connection, so that a hanging request hangs alone."""

    daemon_threads = True
    request_queue_size = 64
    mode = "ok"
    served = "m"
    also = False
    log: Path | None = None
    completions = 0
    path = ""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.adapters: dict[str, Path] = {}
        self.awake = threading.Event()
        self.awake.set()

    def note(self, **line: Any) -> None:
        """Appends to the log."""
        if self.log:
            with self.log.open("a") as file:
                file.write(json.dumps(line) + "\n")


class Handler(BaseHTTPRequestHandler):
    """The four routes of an engine."""

    protocol_version = "HTTP/1.1"
    server: Server

    def address_string(self) -> str:
        """A unix socket's client has no address."""
        return "unix"

    def do_GET(self) -> None:
        """/health and /v1/models."""
        if self.path == "/health":
            if self.server.mode == "hangs" and self.server.completions > 1:
                time.sleep(3600)
            self._json(503 if self.server.mode == "never_ready" else 200, {})
        elif self.path == "/v1/models":
            self._json(200, {"object": "list", "data": [{"id": self.server.served, "object": "model"}]})
        elif self.path == "/is_sleeping":
            self._json(200, {"is_sleeping": not self.server.awake.is_set()})
        elif self.path == "/metrics":
            counted = Path(self.server.path + ".running")
            running = counted.read_text() if counted.exists() else "0"
            text = f'# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{{model_name="m"}} {running}\n'
            self._send(200, "text/plain", text.encode())
        else:
            self._json(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        """/v1/completions and /v1/chat/completions."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.note(path=self.path, body=body, headers={k.lower(): v for k, v in self.headers.items()})
        if self.server.mode == "embeds" and self.path != "/v1/embeddings":
            return self._json(404, {"detail": "Not Found"})
        if (self.server.also and self.path in OTHERS) or self.server.mode == "embeds":
            return self._other(body)
        if self.path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            return self._adapters(body)
        if self.path.startswith("/sleep?") or self.path == "/wake_up":
            return self._sleeps()
        if self.path not in ("/v1/completions", "/v1/chat/completions"):
            return self._json(404, {"detail": "Not Found"})
        if body.get("model") not in (self.server.served, *self.server.adapters):
            return self._error(404, f"The model `{body.get('model')}` does not exist.")
        self.server.awake.wait()
        mode = self._mode(body)
        self.server.completions += 1
        if mode == "dies" and self.server.completions >= 10:
            print("a kernel fell over", flush=True)
            os._exit(9)
        if mode == "lies" or (mode == "flaky" and Path(self.server.path + ".sick").exists()):
            return self._error(500, "the model fell over in /opt/secret/path.py")
        if mode == "bad_request":
            return self._error(400, "This model's maximum context length is 16 tokens.")
        if mode == "hangs" and self.server.completions > 1:
            time.sleep(3600)
        while mode == "busy" and Path(self.server.path + ".busy").exists():
            time.sleep(0.02)
        if body.get("stream"):
            return self._stream(body, mode)
        return self._json(200, self._answer(body))

    def _sleeps(self) -> None:
        sleeps, mode, file = self.path != "/wake_up", self.server.mode, Path(self.server.path + ".asleep")
        if (sleeps and mode == "insomniac") or (not sleeps and mode == "sleepy_head"):
            return self._error(500, "not now")
        if not sleeps:
            file.unlink(missing_ok=True)
            self.server.awake.set()
            return self._json(200, {"status": "awake"})
        self.server.awake.clear()
        if mode != "clings":
            file.touch()
        return self._json(200, {"status": "sleeping", "level": 1})

    def _adapters(self, body: dict[str, Any]) -> None:
        name, loaded = body["lora_name"], self.server.adapters
        if self.path == "/v1/unload_lora_adapter":
            known = loaded.pop(name, None)
            return self._json(200, {}) if known else self._error(404, f"The lora adapter '{name}' cannot be found.")
        folder = Path(body["lora_path"])
        if name in loaded or not (folder / "adapter_config.json").is_file():
            return self._error(400, f"The lora adapter '{name}' cannot be loaded.")
        if (folder / "refuse").exists():
            return self._error(500, "expected target modules in something else")
        loaded[name] = folder
        return self._json(200, {})

    def _mode(self, body: dict[str, Any]) -> str:
        if self.server.mode != "moody":
            return self.server.mode
        text = json.dumps(body.get("messages") or body.get("prompt"))
        moods = ("dies_mid_stream", "dies_unheard", "bad_request", "slow_stream", "lies")
        return next((mood for mood in moods if mood in text), "ok")

    def _other(self, body: dict[str, Any]) -> None:
        """The other routes, each as small as its clients can read it."""
        usage = {"input_tokens": 4, "output_tokens": 2, "total_tokens": 6}
        model = body["model"]
        if self.path == "/v1/embeddings":
            data = [{"object": "embedding", "index": 0, "embedding": [0.5, -0.5]}]
            counts = {"prompt_tokens": 4, "total_tokens": 4}
            return self._json(200, {"object": "list", "model": model, "data": data, "usage": counts})
        if self.path == "/v1/responses":
            text = {"type": "output_text", "text": "Hello", "annotations": []}
            output = {"id": "m1", "type": "message", "role": "assistant", "status": "completed", "content": [text]}
            answer = {"id": "resp_1", "object": "response", "created_at": 1, "status": "completed", "model": model}
            answer |= {"output": [output], "usage": usage}
            delta = {"type": "response.output_text.delta", "delta": "Hello", "item_id": "m1"}
            events = [delta, {"type": "response.completed", "response": answer}]
        else:
            answer = {"id": "msg_1", "type": "message", "role": "assistant", "model": model, "usage": usage}
            answer |= {"content": [{"type": "text", "text": "Hello"}], "stop_reason": "end_turn"}
            counted = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 2}}
            begun = {**answer, "usage": {"input_tokens": 4, "output_tokens": 0}}
            events = [{"type": "message_start", "message": begun}, counted, {"type": "message_stop"}]
        if not body.get("stream"):
            return self._json(200, answer)
        self._begin_stream()
        for event in events:
            if "breaks" in json.dumps(body) and event is not events[0]:
                time.sleep(0.2)  # else the break may overtake the event before it
                self.close_connection = True
                return None
            self._chunk(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n")
            if "slow_stream" in json.dumps(body):
                return self._for_ever(
                    {"type": "content_block_delta", "delta": {"type": "text_delta", "text": " again"}}
                )
        self.wfile.write(b"0\r\n\r\n")
        return None

    def _for_ever(self, event: dict[str, Any]) -> None:
        try:
            while True:
                self._chunk(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n")
                time.sleep(0.05)
        except OSError:
            self.server.note(aborted=self.path)
            self.close_connection = True

    def _begin_stream(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        chat = "chat" in self.path
        text = "".join(WORDS)
        choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        if body.get("logprobs") and not chat:
            folder = self.server.adapters.get(body["model"])
            changed = folder is not None and not (folder / "idle").exists()
            values = [-0.25 if changed else -0.5] * len(WORDS)
            choice["logprobs"] = {"tokens": WORDS, "token_logprobs": values}
        return {
            "id": "cmpl-1",
            "object": "chat.completion" if chat else "text_completion",
            "created": 1,
            "model": body["model"],
            "choices": [{"index": 0, "finish_reason": "stop", **choice}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8},
        }

    def _stream(self, body: dict[str, Any], mode: str) -> None:
        chat = "chat" in self.path
        self._begin_stream()
        try:
            words = iter(WORDS) if mode != "slow_stream" else iter(lambda: " again", None)
            for number, word in enumerate(words):
                if mode == "dies_unheard":
                    self.close_connection = True
                    return
                if mode == "dies_mid_stream" and number == 2:
                    time.sleep(0.2)  # else the break may overtake the words before it
                    self.close_connection = True
                    return
                delta = {"delta": {"content": word}} if chat else {"text": word}
                event = {
                    "id": "cmpl-1",
                    "object": "chat.completion.chunk" if chat else "text_completion",
                    "created": 1,
                    "model": body["model"],
                    "choices": [{"index": 0, "finish_reason": None, **delta}],
                }
                self._chunk(f"data: {json.dumps(event)}\n\n")
                if mode == "slow_stream":
                    time.sleep(0.05)
            if (body.get("stream_options") or {}).get("include_usage"):
                usage = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
                self._chunk(f"data: {json.dumps({**event, 'choices': [], 'usage': usage})}\n\n")
            self._chunk("data: [DONE]\n\n")
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.server.note(aborted=self.path)
            self.close_connection = True

    def _chunk(self, text: str) -> None:
        data = text.encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _error(self, status: int, message: str) -> None:
        error = {"message": message, "type": "BadRequestError", "param": None, "code": status}
        self._json(status, {"error": error})

    def _json(self, status: int, value: dict[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(value).encode())

    def _send(self, status: int, kind: str, data: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """To stdout, as an engine does."""
        print(format % args, flush=True)


def leak() -> None:
    """A grandchild in a session of its own, whose parent is gone: what a process group does not reach."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while True:
                time.sleep(3600)
        os._exit(0)


def main() -> None:
    """Serves until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("socket")
    parser.add_argument("mode")
    parser.add_argument("--log", type=Path)
    parser.add_argument("--served", default="m")
    parser.add_argument("--also", action="store_true")
    arguments = parser.parse_args()
    print(f"fake engine, mode {arguments.mode}", flush=True)
    if arguments.mode == "exits":
        print("the weights are damaged", flush=True)
        sys.exit(7)
    if arguments.mode == "leaks":
        leak()
    if arguments.mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    server = Server(arguments.socket, Handler)
    server.mode, server.served, server.log = arguments.mode, arguments.served, arguments.log
    server.path, server.also = arguments.socket, arguments.also
    threading.Thread(target=server.serve_forever, daemon=True).start()
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
