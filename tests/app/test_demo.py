"""What a demo leaves behind when it is interrupted, and how the next one tidies up."""

import os
import signal
import stat
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.client import Client
from app.commands import demo, embedded


@pytest.fixture
def backend() -> str:
    return "sqlite"


@pytest.fixture
def client(api: TestClient, key: str) -> Client:
    client = Client("http://testserver", key)
    client._http.close()
    client._http = api
    return client


def test_tidy_ends_what_is_the_demos_and_nothing_else(client: Client, models: Path) -> None:
    mine = [client.submit({"type": "sleepy", "experiment_name": name})["id"] for name in demo.NAMES]
    client.call("POST", f"/jobs/{mine[0]}/pause")
    other = client.submit({"type": "sleepy", "experiment_name": "other"})["id"]
    for name in (*demo.NAMES, "other"):
        client.call("POST", "/deployments", json={"name": name, "model": str(models / "tiny")})
    demo.tidy(client, 20)
    assert [client.call("GET", f"/jobs/{job}")["status"] for job in mine] == ["cancelled", "cancelled"]
    assert client.call("GET", f"/jobs/{other}")["status"] == "queued"
    left = {row["name"]: row["status"] for row in client.call("GET", "/deployments")["data"]}
    assert left == {**dict.fromkeys(demo.NAMES, "stopped"), "other": "queued"}
    assert not demo._end_open_work(client)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_runs_the_cleaning_once(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    cleaned = []

    def work() -> None:
        with embedded.told_to_stop():
            try:
                os.kill(os.getpid(), number)
            finally:
                os.kill(os.getpid(), number)
                cleaned.append(True)

    with pytest.raises(SystemExit) as told:
        work()
    assert told.value.code == 128 + number
    assert cleaned == [True]
    assert signal.getsignal(number) is before


def test_the_log_is_private_even_when_it_was_not(tmp_path: Path) -> None:
    path = tmp_path / "demo.log"
    path.touch(0o644)
    with open(path, "wb", opener=embedded.private):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
