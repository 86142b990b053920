"""What the gateway adds to an engine's first byte, and what it costs, beside the least that a proxy can do.

An engine without a model (a process of its own, on a unix socket) sends 20 pieces, one every 20 ms. It is asked
directly, through `tunesmith api`, through a bare aiohttp proxy and, where the command `litellm` is on the PATH, through
LiteLLM's proxy: by 1 to 64 clients that each ask again when they have their answer, and at 100 and 200 requests a
second however long the answers take. Then 10,000 short answers show whether the gateway's memory grows. All share the
machine's cores.

    make bench-gateway                      or: .venv/bin/python benchmarks/gateway.py --seconds 4 --json
"""

import argparse
import asyncio
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import psutil
import uvloop
from rich.console import Console
from rich.table import Table

from app.db import Database
from app.deployments import replicas
from app.models import DEFAULT_PROJECT, Deployment, DeploymentReplica, new_id
from app.projects.bootstrap import ensure_first_key
from app.schema import upgrade
from app.settings import Settings

PEERS = Path(__file__).parent / "peers"
MODEL = "bench"
PIECES, GAP_MS = 20, 20
CLIENTS = (1, 4, 16, 40, 64)
"""40 clients are 2,000 pieces a second."""
RATES = (100, 200)
MEMORY_REQUESTS = 10_000
SETTLED = 2_000
"""Requests after which pools and caches are full."""


@dataclass(frozen=True)
class Way:
    """One way to the engine."""

    name: str
    url: str
    process: psutil.Process
    headers: Mapping[str, str] = field(default_factory=dict)
    socket: str | None = None


@contextmanager
def child(command: list[str], log: Path, **more: Any) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that ends with the block."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, **more)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[bytes]", log: Path, seconds: float = 90) -> None:
    """Until something answers. Exits with its log if it does not."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if condition():
                return
        except (OSError, httpx.TransportError):
            pass
        time.sleep(0.1)
    sys.exit(f"{log.name} did not come up:\n{log.read_text()[-4000:]}")


def free_port() -> int:
    """Of this machine alone."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
    return port


def listens(port: int) -> bool:
    """Whether somebody takes connections there."""
    with socket.create_connection(("127.0.0.1", port), timeout=1):
        return True


@contextmanager
def gateway(folder: Path, engine_socket: str) -> Iterator[Way]:
    """`tunesmith api` with a deployment that leads to the engine."""
    port = free_port()
    settings = Settings(data_dir=folder / "data", run_dir=folder / "run", port=port, min_free_bytes=0)
    upgrade(settings)
    key = ensure_first_key(settings, lambda _: None).read_text().strip()
    database = Database(settings.database)
    with database.write() as session:
        row = Deployment(id=new_id("dep"), project_id=DEFAULT_PROJECT, name=MODEL, model="none", status="ready")
        session.add(row)
        session.flush()
        replica = session.get_one(DeploymentReplica, replicas.add(session, row, row.generation, "none", None, {}))
        replica.status, replica.socket = row.status, engine_socket
    database.close()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TUNESMITH_")} | {
        "TUNESMITH_DATA_DIR": str(settings.data_dir),
        "TUNESMITH_RUN_DIR": str(folder / "run"),
        "TUNESMITH_PORT": str(port),
        "TUNESMITH_MIN_FREE_BYTES": "0",
    }
    command = [sys.executable, "-I", "-m", "app.cli", "api"]
    with child(command, folder / "gateway.log", env=environment, cwd=folder) as process:
        url = settings.base_url
        wait_for(
            lambda: httpx.get(f"{url}/readyz", trust_env=False).status_code == 200, process, folder / "gateway.log"
        )
        yield Way("gateway", url, psutil.Process(process.pid), {"authorization": f"Bearer {key}"})


@contextmanager
def bare_proxy(folder: Path, engine_socket: str) -> Iterator[Way]:
    """The least that a proxy can do."""
    port = free_port()
    command = [sys.executable, str(PEERS / "bare_proxy.py"), engine_socket, str(port)]
    with child(command, folder / "bare.log") as process:
        wait_for(lambda: listens(port), process, folder / "bare.log")
        yield Way("bare proxy", f"http://127.0.0.1:{port}", psutil.Process(process.pid))


@contextmanager
def litellm(folder: Path, engine_port: int, binary: str) -> Iterator[Way]:
    """LiteLLM's proxy with one model; it knows no unix sockets."""
    port, key = free_port(), "sk-bench"
    parameters = {"model": f"openai/{MODEL}", "api_base": f"http://127.0.0.1:{engine_port}/v1", "api_key": "none"}
    config = {"model_list": [{"model_name": MODEL, "litellm_params": parameters}]}
    (folder / "litellm.yaml").write_text(json.dumps({**config, "general_settings": {"master_key": key}}))
    command = [binary, "--config", str(folder / "litellm.yaml"), "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    with child(command, folder / "litellm.log", env=environment, cwd=folder) as process:
        wait_for(lambda: listens(port), process, folder / "litellm.log")
        yield Way(
            "LiteLLM", f"http://127.0.0.1:{port}", psutil.Process(process.pid), {"authorization": f"Bearer {key}"}
        )


@dataclass
class Load:
    """What one load came to."""

    first: list[float] = field(default_factory=list)
    pieces: int = 0
    errors: int = 0

    def figures(self, seconds: float, cpu: float) -> dict[str, float]:
        """Milliseconds to the first piece, pieces a second, share of a core."""
        cuts = statistics.quantiles(self.first, n=100) if len(self.first) > 1 else [0.0] * 99
        return {
            "p50_ms": round(1000 * cuts[49], 2),
            "p99_ms": round(1000 * cuts[98], 2),
            "pieces_per_second": round(self.pieces / seconds, 1),
            "requests": len(self.first),
            "errors": self.errors,
            "cpu": round(cpu / seconds, 3),
        }


@asynccontextmanager
async def session_for(way: Way) -> AsyncIterator[aiohttp.ClientSession]:
    """Connections without a limit."""
    connector = aiohttp.UnixConnector(way.socket, limit=0) if way.socket else aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(connector=connector, headers=way.headers, timeout=timeout) as session:
        yield session


async def ask(session: aiohttp.ClientSession, url: str, pieces: int, gap: int, load: Load, due: float) -> None:
    """One stream; its first piece is timed from when it was due, so that a client that lags hides nothing."""
    message = {"role": "user", "content": f"{pieces} pieces, {gap} ms"}
    body = {"model": MODEL, "messages": [message], "stream": True, "max_tokens": pieces}
    got, tail = 0, b""
    try:
        async with session.post(f"{url}/v1/chat/completions", json=body) as response:
            async for data in response.content.iter_any():
                if not got:
                    load.first.append(time.perf_counter() - due)
                got += data.count(b'" word"')
                tail = (tail + data)[-32:]
            good = response.status == 200 and got == pieces and tail.endswith(b"data: [DONE]\n\n")
    except (aiohttp.ClientError, TimeoutError, OSError):
        good = False
    load.pieces += got
    load.errors += not good


async def measured(way: Way, run: Callable[[aiohttp.ClientSession, Load], Awaitable[None]]) -> dict[str, float]:
    """A load on warm connections."""
    async with session_for(way) as session:
        await asyncio.gather(*(ask(session, way.url, 2, 1, Load(), 0) for _ in range(16)))
        load = Load()
        times = way.process.cpu_times()
        began = time.perf_counter()
        await run(session, load)
        seconds = time.perf_counter() - began
        spent = way.process.cpu_times()
        return load.figures(seconds, spent.user + spent.system - times.user - times.system)


async def closed(way: Way, clients: int, seconds: float) -> dict[str, float]:
    """So many clients, each asking again at once."""

    async def run(session: aiohttp.ClientSession, load: Load) -> None:
        end = time.perf_counter() + seconds

        async def lane(number: int) -> None:
            await asyncio.sleep(number * PIECES * GAP_MS / 1000 / clients)  # not all in step
            while (now := time.perf_counter()) < end:
                await ask(session, way.url, PIECES, GAP_MS, load, now)

        await asyncio.gather(*(lane(number) for number in range(clients)))

    return await measured(way, run)


async def opened(way: Way, rate: int, seconds: float) -> dict[str, float]:
    """So many requests a second, however long they take."""

    async def run(session: aiohttp.ClientSession, load: Load) -> None:
        began = time.perf_counter()
        running = set()
        for number in range(round(rate * seconds)):
            due = began + number / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            running.add(asyncio.create_task(ask(session, way.url, PIECES, GAP_MS, load, due)))
        await asyncio.gather(*running)

    return await measured(way, run)


async def memory(way: Way, requests: int) -> dict[str, Any]:
    """Resident memory after every tenth of so many short answers, in MB."""
    sizes: list[float] = []
    load = Load()
    began = time.perf_counter()
    async with session_for(way) as session:
        for _ in range(10):
            share = requests // 10

            async def lane(count: int) -> None:
                for _ in range(count):
                    await ask(session, way.url, 5, 0, load, time.perf_counter())

            await asyncio.gather(*(lane(share // 20) for _ in range(20)))
            sizes.append(round(way.process.memory_info().rss / 1e6, 1))
    settled = sizes[max(0, SETTLED * 10 // requests - 1)] if requests >= SETTLED else sizes[0]
    return {
        "requests": len(load.first),
        "errors": load.errors,
        "per_second": round(len(load.first) / (time.perf_counter() - began), 1),
        "rss_mb": sizes,
        "growth_mb": round(sizes[-1] - settled, 1),
    }


async def measure(ways: list[Way], seconds: float, requests: int) -> dict[str, Any]:
    """All loads; for each load one way after the other."""
    found: dict[str, Any] = {"closed": {}, "open": {}}
    for clients in CLIENTS:
        found["closed"][clients] = {way.name: await closed(way, clients, seconds / 2) for way in ways}
    for rate in RATES:
        found["open"][rate] = {way.name: await opened(way, rate, seconds) for way in ways}
    found["memory"] = await memory(next(way for way in ways if way.name == "gateway"), requests)
    return found


def run(seconds: float, requests: int) -> dict[str, Any]:
    """Starts everything, measures, ends everything."""
    with tempfile.TemporaryDirectory(prefix="ts-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        engine_socket, port = str(folder / "engine.sock"), free_port()
        command = [sys.executable, str(PEERS / "engine.py"), engine_socket, f"--port={port}"]
        engine = stack.enter_context(child(command, folder / "engine.log"))
        wait_for(Path(engine_socket).exists, engine, folder / "engine.log")
        ways = [
            Way("direct", "http://engine", psutil.Process(engine.pid), socket=engine_socket),
            stack.enter_context(bare_proxy(folder, engine_socket)),
            stack.enter_context(gateway(folder, engine_socket)),
        ]
        binary = shutil.which("litellm")
        skipped = None
        if binary:
            ways.append(stack.enter_context(litellm(folder, port, binary)))
        else:
            skipped = "LiteLLM's proxy: there is no command litellm on the PATH"
        found = uvloop.run(measure(ways, seconds, requests))
    return {"cpus": os.cpu_count(), "pieces": PIECES, "gap_ms": GAP_MS, "skipped": skipped, **found}


def show(found: dict[str, Any]) -> None:
    """For people: what each way adds to the direct one."""
    console = Console(width=max(100, Console().width))
    for kind, title, unit in (("closed", "clients, each asking again", "clients"), ("open", "requests a second", "/s")):
        table = Table(
            unit, "way", "p50 ms", "p99 ms", "added p50", "added p99", "pieces/s", "of direct", "CPU", "errors"
        )
        table.title = title
        for size, by_way in found[kind].items():
            direct = by_way["direct"]
            for name, row in by_way.items():
                table.add_row(
                    str(size),
                    name,
                    f"{row['p50_ms']:.1f}",
                    f"{row['p99_ms']:.1f}",
                    f"{row['p50_ms'] - direct['p50_ms']:+.1f}",
                    f"{row['p99_ms'] - direct['p99_ms']:+.1f}",
                    f"{row['pieces_per_second']:.0f}",
                    f"{row['pieces_per_second'] / direct['pieces_per_second']:.1%}",
                    f"{row['cpu']:.0%}",
                    f"{row['errors']:.0f}",
                )
        console.print(table)
    kept = found["memory"]
    print(
        f"{kept['requests']} short streams, {kept['per_second']}/s, {kept['errors']} errors; "
        f"RSS in MB: {kept['rss_mb']}"
    )
    print(f"growth after the first {SETTLED}: {kept['growth_mb']} MB. {found['cpus']} CPUs shared by all.")
    if found["skipped"]:
        print(f"skipped: {found['skipped']}")


def main() -> None:
    """Prints tables, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=10, help="of each load")
    parser.add_argument("--requests", type=int, default=MEMORY_REQUESTS, help="for the memory")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = run(max(1.0, arguments.seconds), max(200, arguments.requests))
    print(json.dumps(found, indent=2)) if arguments.json else show(found)


if __name__ == "__main__":
    main()
