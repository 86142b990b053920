"""A whole service of real processes, for tests that ask it over HTTP."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from app.client import Client
from app.processes import processes_of_instance
from app.running import running_service
from app.settings import Settings
from tests.support import wait_for


@contextmanager
def service(settings: Settings, **environment: str) -> Iterator[Client]:
    """``tunesmith up`` for these settings, and a client of it; nothing of it is left afterwards."""
    settings.data_dir.mkdir(exist_ok=True)
    log = settings.data_dir / "up.log"
    whole = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(settings.data_dir.parent),
        "TUNESMITH_DATA_DIR": str(settings.data_dir),
        "TUNESMITH_MODEL_ROOTS": ":".join(str(root) for root in settings.model_roots),
        "TUNESMITH_PORT": "0",
        **environment,
    }
    with log.open("ab") as output:
        command = [sys.executable, "-I", "-m", "app.cli", "up"]
        process = subprocess.Popen(command, env=whole, stdout=output, stderr=output)
    try:
        wait_for(lambda: running_service(settings) or process.poll() is not None, 60)
        assert process.poll() is None, log.read_text()
        with Client.find(settings) as found:
            yield found
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)
    assert not processes_of_instance(settings.instance), "the service left processes behind"


def succeeded(client: Client, job: dict[str, Any]) -> dict[str, Any]:
    """The job once it is final; its log when it failed."""
    for _ in client.follow(job["id"]):
        pass
    final: dict[str, Any] = client.call("GET", f"/jobs/{job['id']}")
    log = client.call("GET", f"/jobs/{job['id']}/logs")
    assert final["status"] == "succeeded", f"{final['error']}\n{log}"
    return final
