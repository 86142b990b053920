"""The real vLLM behind a service whose API is restarted and whose worker is killed, while a client goes on asking."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from app.client import Client
from app.processes import processes_of_attempts
from app.settings import Settings
from tests.e2e.real_service import service
from tests.support import wait_for
from tests.workers.conftest import make_servable_model

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(Settings().engine_python is None, reason="needs vLLM: make setup, or TUNESMITH_SERVE_PYTHON"),
    pytest.mark.timeout(600),
]
QUESTION: list[Any] = [{"role": "user", "content": "42"}]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", model_roots=(tmp_path,), port=0)


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    with service(settings) as client:
        yield client


def part(settings: Settings, words: str) -> int:
    """Pid of the part of the service whose command line holds ``words``; 0 while there is none."""
    mark = f"TUNESMITH_DATA_DIR={settings.data_dir}".encode()
    for process in psutil.process_iter(["cmdline", "status"]):
        if words not in " ".join(process.info["cmdline"] or ()) or process.info["status"] == psutil.STATUS_ZOMBIE:
            continue
        try:
            if mark in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0"):
                return process.pid
        except OSError:
            continue
    return 0


class Talk(threading.Thread):
    """Asks again and again; remembers when an answer came, and what went wrong."""

    def __init__(self, client: Client) -> None:
        super().__init__()
        from openai import OpenAI

        self._openai = OpenAI(base_url=f"{client.url}/v1", api_key=client.key, max_retries=0, timeout=60)
        self._over = threading.Event()
        self.answered: list[float] = []
        self.failed: list[str] = []

    def run(self) -> None:
        while not self._over.is_set():
            try:
                self._openai.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=8, temperature=0)
                self.answered.append(time.monotonic())
            except Exception as error:  # each one counts
                self.failed.append(repr(error))
                self._over.wait(0.1)

    def end(self) -> None:
        self._over.set()
        self.join(90)
        self._openai.close()


def test_an_api_that_is_restarted_and_a_worker_that_is_killed(client: Client, settings: Settings) -> None:
    base = make_servable_model(settings.model_roots[0] / "base")
    body = {"name": "tiny", "model": str(base), "parity": "off"}
    began = time.monotonic()
    deployment = client.call("POST", "/deployments", json=body)["id"]

    def status() -> str:
        return str(client.call("GET", f"/deployments/{deployment}")["status"])

    wait_for(lambda: status() in ("ready", "failed"), 300)
    assert status() == "ready"
    cold = time.monotonic() - began

    talk = Talk(client)
    talk.start()
    try:
        wait_for(lambda: len(talk.answered) >= 5, 60)
        api = part(settings, "app.api")
        os.kill(api, signal.SIGTERM)
        wait_for(lambda: part(settings, "app.api") not in (0, api), 60)
        so_far = len(talk.answered)
        wait_for(lambda: len(talk.answered) >= so_far + 5, 60)
        assert talk.failed == [], "the listening socket stays open: who asks meanwhile only waits"

        before = set(processes_of_attempts(settings.instance))
        worker = part(settings, "workers.main")
        killed = time.monotonic()
        os.kill(worker, signal.SIGKILL)
        wait_for(lambda: not before & set(processes_of_attempts(settings.instance)), 15)
        gone = time.monotonic() - killed
        wait_for(lambda: talk.answered[-1] > killed + gone + 1, cold + 60)
        back = talk.answered[-1] - killed
    finally:
        talk.end()
    assert talk.failed, "without an engine there are no answers"
    print(f"\ncold start {cold:.1f} s; worker killed: its engine gone in {gone:.1f} s, answers after {back:.1f} s")
    assert status() == "ready"
    client.call("DELETE", f"/deployments/{deployment}")
    wait_for(lambda: not processes_of_attempts(settings.instance), 60)
