"""The least that a proxy can do, for ``benchmarks/gateway.py``: bytes in, bytes out, nothing looked at.

``python bare_proxy.py <socket> <port>``
"""

import asyncio
import sys

import aiohttp
import uvloop
from aiohttp import web


async def serve(socket: str, port: int) -> None:
    """Until it is killed."""
    connector = aiohttp.UnixConnector(socket, limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:

        async def passed(request: web.Request) -> web.StreamResponse:
            body = await request.read()
            headers = {"content-type": "application/json"}
            async with session.post(f"http://engine{request.path}", data=body, headers=headers) as upstream:
                kind = upstream.headers["content-type"]
                response = web.StreamResponse(status=upstream.status, headers={"content-type": kind})
                await response.prepare(request)
                async for data in upstream.content.iter_any():
                    await response.write(data)
                return response

        app = web.Application(client_max_size=16 << 20)
        app.router.add_post("/{path:.*}", passed)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1], int(sys.argv[2])))
