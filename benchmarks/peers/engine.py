"""An engine without a model for ``benchmarks/gateway.py``: chat completions at a given pace, over a unix socket.

``python engine.py <socket> [--port N]``: the port is for proxies that know no unix sockets. The message's text says how
many pieces the answer has and how many milliseconds lie before each: ``20 pieces, 20 ms``.
"""

import argparse
import asyncio
import re

import uvloop
from aiohttp import web

_PIECE = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"%s",'
    b'"choices":[{"index":0,"delta":{"content":" word"},"logprobs":null,"finish_reason":null}]}\n\n'
)
_USAGE = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"%s","choices":[],'
    b'"usage":{"prompt_tokens":8,"completion_tokens":%d,"total_tokens":8}}\n\n'
)


async def chat(request: web.Request) -> web.StreamResponse:
    """A stream, or an answer in one piece."""
    body = await request.json()
    found = re.fullmatch(r"(\d+) pieces, (\d+) ms", body["messages"][0]["content"])
    assert found
    pieces, gap = int(found[1]), int(found[2]) / 1000
    model = body["model"].encode()
    if not body.get("stream"):
        await asyncio.sleep(pieces * gap)
        message = {"role": "assistant", "content": " word" * pieces}
        usage = {"prompt_tokens": 8, "completion_tokens": pieces, "total_tokens": 8 + pieces}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        answer = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": body["model"]}
        return web.json_response({**answer, "choices": [choice], "usage": usage})
    response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    loop = asyncio.get_running_loop()
    began = loop.time()
    for number in range(1, pieces + 1):
        if gap:
            await asyncio.sleep(max(0.0, began + number * gap - loop.time()))
        await response.write(_PIECE % model)
    if (body.get("stream_options") or {}).get("include_usage"):
        await response.write(_USAGE % (model, pieces))
    await response.write(b"data: [DONE]\n\n")
    return response


async def serve(socket: str, port: int | None) -> None:
    """Until it is killed."""
    app = web.Application(client_max_size=16 << 20)
    app.router.add_post("/v1/chat/completions", chat)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    if port:
        await web.TCPSite(runner, "127.0.0.1", port).start()
    await web.UnixSite(runner, socket).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("socket")
    parser.add_argument("--port", type=int)
    arguments = parser.parse_args()
    uvloop.run(serve(arguments.socket, arguments.port))
