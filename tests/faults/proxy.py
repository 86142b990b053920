"""A TCP proxy before a broker that hurts what passes: silence, delay, resets, doorbells lost or repeated."""

import asyncio
import socket
import struct
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

QUEUE = b"tunesmith"
_CHUNK = 1 << 16


class Proxy:
    """Every field may be changed at any time. One thread, one event loop."""

    def __init__(self, path: Path) -> None:
        self.silent = False  # what comes in is swallowed, now and for ever on this connection
        self.delay = 0.0  # seconds that each answer takes longer
        self.copies = 1  # of each doorbell: 0 loses it, 10 delivers it ten times
        self.doorbells = 0
        self.path = path
        self._links: set[Link] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._server = self._do(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port: int = self._server.sockets[0].getsockname()[1]

    def reset(self) -> int:
        """RST for every open connection; how many there were."""

        async def reset() -> int:
            links = list(self._links)
            for link in links:
                link.reset()
            return len(links)

        return int(self._do(reset()))

    def freeze(self) -> int:
        """Every open connection becomes half open: nobody is told, and nothing passes any more. New ones work."""

        async def freeze() -> int:
            for link in self._links:
                link.dead = True
            return len(self._links)

        return int(self._do(freeze()))

    def close(self) -> None:
        """Ends the listener and all connections."""

        async def close() -> None:
            self._server.close()
            for link in list(self._links):
                link.reset()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self._do(close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            up_reader, up_writer = await asyncio.open_unix_connection(self.path)
        except OSError:
            writer.close()
            return
        link = Link(self, writer, up_writer)
        self._links.add(link)
        try:
            ways = [asyncio.create_task(link.requests(reader)), asyncio.create_task(link.answers(up_reader))]
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
        finally:
            self._links.discard(link)
            writer.close()
            up_writer.close()


class Link:
    """One client's connection and ours to the broker."""

    def __init__(self, proxy: Proxy, client: asyncio.StreamWriter, broker: asyncio.StreamWriter) -> None:
        self.proxy, self.client, self.broker = proxy, client, broker
        self.dead = False

    def reset(self) -> None:
        """Without a goodbye."""
        self.client.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.client.transport.abort()

    async def requests(self, reader: asyncio.StreamReader) -> None:
        """From the client, command by command, so that doorbells can be lost or repeated and answers still fit."""
        while command := await read_command(reader):
            if command[0].upper() == b"LPUSH" and command[1] == QUEUE:
                self.proxy.doorbells += 1
                if self.proxy.copies == 0:
                    command = [b"LLEN", QUEUE]  # answered with a number, as LPUSH is
                else:
                    command = [*command[:2], *command[2:] * self.proxy.copies]
            await self._pass(self.broker, encode(command))

    async def answers(self, reader: asyncio.StreamReader) -> None:
        """From the broker."""
        while chunk := await reader.read(_CHUNK):
            await asyncio.sleep(self.proxy.delay)
            await self._pass(self.client, chunk)

    async def _pass(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        self.dead = self.dead or self.proxy.silent
        if not self.dead:
            writer.write(data)
            await writer.drain()


async def read_command(reader: asyncio.StreamReader) -> list[bytes]:
    """``*2\\r\\n$4\\r\\nLLEN\\r\\n…``; empty at the end."""
    line = await reader.readline()
    parts = []
    for _ in range(int(line[1:]) if line else 0):
        size = int((await reader.readline())[1:])
        parts.append((await reader.readexactly(size + 2))[:-2])
    return parts


def encode(command: list[bytes]) -> bytes:
    """The same back."""
    return b"*%d\r\n" % len(command) + b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in command)
