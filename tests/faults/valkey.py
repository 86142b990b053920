"""A broker that a test may kill, and one that is too old."""

import contextlib
import shutil
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from app.broker import embedded_command, embedded_url, only_server, wait_until_ready
from app.settings import Settings
from tests.support import wait_for

QUEUE = "tunesmith"


class Valkey:
    """The embedded Valkey on a data directory of its own."""

    def __init__(self, data_dir: Path, run_dir: Path) -> None:
        self.settings = Settings(data_dir=data_dir, run_dir=run_dir)
        self.said: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None
        self.client = redis.Redis(
            unix_socket_path=str(self.socket), password=self.password, retry=Retry(NoBackoff(), 1)
        )

    @property
    def socket(self) -> Path:
        return self.settings.sockets / "v.sock"

    @property
    def url(self) -> str:
        return embedded_url(self.settings)

    @property
    def password(self) -> str:
        return self.url.partition("://:")[2].partition("@")[0]

    def start(self, **options: bool) -> "Valkey":
        command = embedded_command(self.settings)
        with only_server(self.settings, self.said.append, **options) as fds:
            self.process = subprocess.Popen(command, pass_fds=fds, stdout=subprocess.DEVNULL)
        wait_until_ready(self.url, 20, self.process)
        return self

    def kill(self, *, forget: bool = False) -> None:
        """kill -9; ``forget``: what it kept is lost as well."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)
        if forget:
            shutil.rmtree(self.settings.data_dir / "valkey" / "appendonlydir")

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()
        self.client.close()

    def waiting(self) -> int:
        """Doorbells that nobody took yet."""
        return int(self.client.llen(QUEUE))

    def doorbell(self) -> bytes:
        """A message as the API sends it, found in the queue."""
        message: bytes = wait_for(lambda: self.client.lindex(QUEUE, 0), 10)
        return message

    def listened_to(self) -> bool:
        """Whether somebody waits for a doorbell at this moment."""
        return any(client["cmd"] == "brpop" and "b" in client["flags"] for client in self.client.client_list())

    def heard(self, message: bytes, seconds: float) -> None:
        """Waits until a doorbell, put into the queue itself, is taken out of it."""
        self.client.lpush(QUEUE, message)
        wait_for(lambda: not self.waiting(), seconds)


class _Old(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        while line := self.rfile.readline():
            parts = []
            for _ in range(int(line[1:])):
                size = int(self.rfile.readline()[1:])
                parts.append(self.rfile.read(size + 2)[:-2].upper())
            self.wfile.write(self.answer(parts))

    def answer(self, command: list[bytes]) -> bytes:
        if command[0] == b"INFO":
            info = b"# Server\r\nredis_version:6.0.9\r\nredis_mode:standalone\r\n"
            return b"$%d\r\n%b\r\n" % (len(info), info)
        if command[0] == b"PING":
            return b"+PONG\r\n"
        if command[0] in (b"BRPOP", b"GET"):
            return b"*-1\r\n"
        if command[0] in (b"LLEN", b"LPUSH", b"SADD", b"PUBLISH", b"SUBSCRIBE", b"DEL", b"ZREM", b"HDEL"):
            return b":0\r\n"
        if command[0] == b"HELLO":
            return b"%2\r\n$7\r\nversion\r\n$5\r\n6.0.9\r\n$5\r\nproto\r\n:3\r\n"
        if command[0] in (b"ZRANGE", b"EVAL", b"EVALSHA"):
            return b"-ERR syntax error\r\n"
        return b"+OK\r\n"


@contextlib.contextmanager
def too_old(path: Path) -> Iterator[Path]:
    """A server on a unix socket that says it is Redis 6.0.9."""
    with socketserver.ThreadingUnixStreamServer(str(path), _Old) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield path
        server.shutdown()
