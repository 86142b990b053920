"""A real API process on a socket that the test keeps open, as ``tunesmith up`` does."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx

from app.settings import Settings
from app.up import LISTEN_FD
from tests.support import wait_for


class ApiProcess:
    """``python -m app.api``. Clients that come while it is down wait in the socket's queue."""

    def __init__(self, settings: Settings, log: Path, broker_url: str = "redis://127.0.0.1:1/0") -> None:
        self._log = log
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._environment = {
            **os.environ,
            "TUNESMITH_DATA_DIR": str(settings.data_dir),
            "TUNESMITH_RUN_DIR": str(settings.run_dir),
            "TUNESMITH_DATABASE_URL": settings.database,
            "TUNESMITH_BROKER_URL": broker_url,
            "TUNESMITH_PLUGIN_PACKAGES": "tests.plugs",
            "TUNESMITH_MIN_FREE_BYTES": str(settings.min_free_bytes),
            "TUNESMITH_MAX_UPLOAD_BYTES": str(settings.max_upload_bytes),
            "TUNESMITH_BALLAST_BYTES": str(settings.ballast_bytes),
            "TUNESMITH_HEARTBEAT_SECONDS": str(settings.heartbeat_seconds),
            "TUNESMITH_LEASE_SECONDS": str(settings.lease_seconds),
            LISTEN_FD: str(self._socket.fileno()),
        }
        self.process: subprocess.Popen[bytes] | None = None

    def spawn(self, prefix: Sequence[str] = (), **environment: str) -> "ApiProcess":
        """Returns at once; ``prefix`` is a command that runs it, such as strace."""
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-I", "-m", "app.api"],
                env={**self._environment, **environment},
                pass_fds=[self._socket.fileno()],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self

    def start(self, prefix: Sequence[str] = (), **environment: str) -> "ApiProcess":
        """Returns when it answers."""
        self.spawn(prefix, **environment)
        wait_for(self._answers, 60)
        return self

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log()
        try:
            return self.get("/healthz").status_code == 200
        except httpx.TransportError:
            return False

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> httpx.Response:
        """Over a connection of its own."""
        return httpx.get(f"{self.url}{path}", headers=headers, timeout=60, trust_env=False)

    @property
    def pid(self) -> int:
        """Its number; of the command that runs it, where there is one."""
        assert self.process is not None
        return self.process.pid

    def log(self) -> str:
        """What it said."""
        return self._log.read_text(errors="replace")

    def kill(self) -> None:
        """kill -9, of its whole session."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)

    def terminate(self) -> None:
        """SIGTERM; returns at once."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)

    def ended(self, seconds: float = 30) -> int:
        """Its exit status, once it is gone."""
        assert self.process is not None
        return self.process.wait(seconds)

    def close(self) -> None:
        """Leaves nothing behind."""
        if self.process is not None and self.process.poll() is None:
            self.kill()
        self._socket.close()
