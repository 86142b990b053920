"""How many jobs a second are taken durably, beside what the disk alone could do.

Starts `tunesmith api` on a SQLite database of its own and posts jobs over 50 connections; each 201 means that the row
is committed and synced. Then the same number of bare ``BEGIN IMMEDIATE; INSERT; COMMIT`` runs on the same disk with the
same journal and synchronous=FULL. Client and server share the machine's cores.

    make bench-submit                       or: .venv/bin/python benchmarks/submit.py --json
"""

import argparse
import asyncio
import json
import os
import secrets
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import httpx
from rich.console import Console
from rich.table import Table

from app.broker import embedded_command, embedded_url, wait_until_ready
from app.db import journal_mode
from app.projects.bootstrap import ensure_first_key
from app.schema import upgrade
from app.settings import Settings

MAX_REQUESTS = 1000
WARM_UP = 50
# A job that names a hub model: accepted without touching any file, and never run, because there is no worker.
SPEC = {"type": "validate", "model": "hub:benchmarks/nothing", "experiment_name": "bench", "metadata": {"bench": "1"}}


@contextmanager
def service(folder: Path, port: int) -> Iterator[tuple[str, str]]:
    """The API with its broker, as processes; gives its URL and a key."""
    settings = Settings(data_dir=folder, run_dir=folder / "run", port=port, min_free_bytes=0)
    upgrade(settings)
    key = ensure_first_key(settings, lambda _: None).read_text().strip()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TUNESMITH_")} | {
        "TUNESMITH_DATA_DIR": str(folder),
        "TUNESMITH_RUN_DIR": str(folder / "run"),
        "TUNESMITH_PORT": str(port),
        "TUNESMITH_MIN_FREE_BYTES": "0",
    }
    with (folder / "log").open("wb") as log:
        broker = subprocess.Popen(embedded_command(settings), stdout=log, stderr=log)
        api = subprocess.Popen(
            [sys.executable, "-I", "-m", "app.cli", "api"], env=environment, stdout=log, stderr=log, cwd=folder
        )
    try:
        wait_until_ready(embedded_url(settings), 20)
        _wait_for(settings.base_url, api, folder / "log")
        yield settings.base_url, key
    finally:
        for process in (api, broker):
            process.terminate()
            process.wait(30)


def _wait_for(url: str, api: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and api.poll() is None:
        try:
            if httpx.get(f"{url}/readyz", trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    sys.exit(f"the API did not come up:\n{log.read_text()}")


async def post(url: str, key: str, requests: int, connections: int) -> tuple[float, list[float], int]:
    """Seconds for all, and for each; and how often the answer was 503, which is tried again as it asks for."""
    body = json.dumps(SPEC).encode()
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    connector = aiohttp.TCPConnector(limit=connections)
    busy = 0
    async with aiohttp.ClientSession(base_url=url, headers=headers, connector=connector) as client:

        async def one(times: list[float]) -> None:
            nonlocal busy
            began = time.perf_counter()
            while True:
                async with client.post("/jobs", data=body) as response:
                    text = await response.text()
                if response.status != 503:
                    break
                busy += 1
                await asyncio.sleep(float(response.headers["retry-after"]))
            if response.status != 201:
                raise RuntimeError(f"{response.status}: {text}")
            times.append(time.perf_counter() - began)

        async def lane(count: int, times: list[float]) -> None:
            for _ in range(count):
                await one(times)

        await asyncio.gather(*(lane(1, []) for _ in range(min(WARM_UP, connections))))
        times: list[float] = []
        shares = [requests // connections + (index < requests % connections) for index in range(connections)]
        began = time.perf_counter()
        await asyncio.gather(*(lane(share, times) for share in shares))
        return time.perf_counter() - began, times, busy


def bare(folder: Path, rows: int) -> tuple[float, list[float]]:
    """The floor: one durable insert after the other on the same disk."""
    text = json.dumps(SPEC)
    times: list[float] = []
    with closing(sqlite3.connect(folder / "bare.db", isolation_level=None)) as connection:
        connection.execute(f"PRAGMA journal_mode={journal_mode(sqlite3.sqlite_version_info)}")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("CREATE TABLE job (id TEXT PRIMARY KEY, spec TEXT NOT NULL)")
        began = time.perf_counter()
        for _ in range(rows):
            start = time.perf_counter()
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("INSERT INTO job VALUES (?, ?)", (secrets.token_hex(12), text))
            connection.execute("COMMIT")
            times.append(time.perf_counter() - start)
        return time.perf_counter() - began, times


def stored(folder: Path) -> int:
    """Rows that are really there."""
    with closing(sqlite3.connect(folder / "tunesmith.db")) as connection:
        count: int = connection.execute("SELECT count(*) FROM job WHERE type = 'validate'").fetchone()[0]
    return count


def summary(seconds: float, times: list[float]) -> dict[str, float]:
    """Rate and percentiles."""
    cuts = statistics.quantiles(times, n=100)
    return {
        "per_second": round(len(times) / seconds, 1),
        "p50_ms": round(1000 * cuts[49], 2),
        "p99_ms": round(1000 * cuts[98], 2),
    }


def measure(requests: int, connections: int) -> dict[str, Any]:
    """Both runs, one after the other, in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="ts-bench-") as name:
        folder = Path(name)
        with service(folder, _free_port()) as (url, key):
            seconds, times, busy = asyncio.run(post(url, key, requests, connections))
        rows = stored(folder)
        if rows != requests + min(WARM_UP, connections):
            sys.exit(f"{rows} rows are stored, which is not what was answered")
        floor = summary(*bare(folder, requests))
    posted = summary(seconds, times)
    return {
        "requests": requests,
        "connections": connections,
        "post_jobs": posted,
        "busy": busy,
        "bare_insert": floor,
        "ratio": round(posted["per_second"] / floor["per_second"], 3),
        "journal_mode": journal_mode(sqlite3.sqlite_version_info),
        "cpus": os.cpu_count(),
    }


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
    return port


def main() -> None:
    """Prints a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=MAX_REQUESTS, help=f"at most {MAX_REQUESTS}")
    parser.add_argument("--connections", type=int, default=50)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    requests = max(100, min(arguments.requests, MAX_REQUESTS))
    found = measure(requests, max(1, min(arguments.connections, requests)))
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    table = Table("", "per second", "p50 ms", "p99 ms", "ratio", title=f"{requests} durable job submissions")
    for label, key, ratio in (
        (f"POST /jobs, {found['connections']} connections", "post_jobs", f"{found['ratio']:.2f}"),
        ("BEGIN IMMEDIATE; INSERT; COMMIT, one connection", "bare_insert", "1.00"),
    ):
        row = found[key]
        table.add_row(label, f"{row['per_second']:.0f}", f"{row['p50_ms']:.1f}", f"{row['p99_ms']:.1f}", ratio)
    Console().print(table)
    print(f"SQLite journal {found['journal_mode']}, synchronous=FULL, {found['cpus']} CPUs shared by client and server")
    print(f"answered 503 and sent again: {found['busy']}")


if __name__ == "__main__":
    main()
