"""The embedded Valkey: private, durable, one on a data directory, and started again after every kind of end."""

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from app.broker import NoBroker, embedded_command, wait_until_ready
from app.queue import Doorbell
from app.settings import Settings
from app.up import Service
from tests.e2e.test_up import COMMAND, Up
from tests.faults.proxy import Proxy
from tests.faults.timeline import Timeline
from tests.faults.valkey import QUEUE, Valkey, too_old
from tests.support import wait_for

pytestmark = [pytest.mark.fault, pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux: /proc")]


@pytest.fixture
def valkey(tmp_path: Path, run_dir: Path) -> Iterator[Valkey]:
    """Not started yet."""
    valkey = Valkey(tmp_path / "data", run_dir)
    yield valkey
    valkey.stop()
    for pid in servers(valkey.settings):
        os.kill(pid, signal.SIGKILL)


def servers(settings: Settings) -> list[int]:
    """Everybody who works in the broker's folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cwd() == str(settings.data_dir / "valkey") and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def test_it_is_private_and_remembers(valkey: Valkey) -> None:
    """A socket for us alone, no port, no entry without the password; what was acknowledged outlives kill -9."""
    valkey.start()
    assert valkey.process is not None
    assert psutil.Process(valkey.process.pid).net_connections(kind="inet") == []
    assert valkey.socket.stat().st_mode & 0o777 == 0o600
    assert valkey.socket.parent.stat().st_mode & 0o777 == 0o700
    stranger = redis.Redis(unix_socket_path=str(valkey.socket), retry=Retry(NoBackoff(), 0))
    with stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()
    valkey.client.lpush(QUEUE, "bell")
    valkey.kill()
    assert valkey.socket.exists()  # stale, and in nobody's way
    assert valkey.start().waiting() == 1


@pytest.mark.parametrize("state", [pytest.param("running", marks=pytest.mark.long), "frozen"])
def test_one_that_outlived_its_parent_is_replaced(state: str, valkey: Valkey, timeline: Timeline) -> None:
    """Case 33. Never two servers on one data directory, and what the first one kept is there."""
    valkey.start()
    orphan = valkey.process
    assert orphan is not None
    valkey.client.lpush(QUEUE, "bell")
    if state == "frozen":
        os.kill(orphan.pid, signal.SIGSTOP)
    with timeline.within("P13", f"a {state} broker without a parent is replaced", 8):
        valkey.start()
    assert orphan.wait(5) != 0 or state == "running"
    assert valkey.process is not None
    assert servers(valkey.settings) == [valkey.process.pid]
    assert "still there" in valkey.said[0]
    assert str(orphan.pid) in valkey.said[0]
    assert valkey.waiting() == 1


def test_a_foreign_process_on_the_socket(valkey: Valkey) -> None:
    """Case 33. It is left alone and named; Valkey would have unlinked its socket. Stale files are in nobody's way."""
    with socket.socket(socket.AF_UNIX) as foreign:
        foreign.bind(str(valkey.socket))
        foreign.listen(0)
        for _ in range(3):  # the first connections fill its queue
            with pytest.raises(NoBroker, match=r"listens on .*TUNESMITH_RUN_DIR"):
                valkey.start()
        assert servers(valkey.settings) == []
        assert valkey.socket.exists()
    valkey.start().stop()
    valkey.socket.unlink()
    valkey.socket.write_text("somebody's notes")
    with pytest.raises(NoBroker, match="is no socket"):
        valkey.start()
    assert valkey.socket.read_text() == "somebody's notes"


def test_two_installations_with_one_run_dir(valkey: Valkey, tmp_path: Path) -> None:
    """Case 33. The second one is refused, and the first one's socket stays its own."""
    valkey.start()
    second = Valkey(tmp_path / "second", valkey.socket.parent)
    with pytest.raises(NoBroker, match=rf"pid {valkey.process.pid}\) listens on"):  # type: ignore[union-attr]
        second.start()
    second.client.close()
    assert valkey.client.ping()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a read-only disk, which needs root")
def test_a_folder_that_cannot_be_written(tmp_path: Path, run_dir: Path) -> None:
    """Case 32. Said at once, by name."""
    settings = Settings(data_dir=tmp_path / "data", run_dir=run_dir, port=0)
    folder = settings.data_dir / "valkey"
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], check=True)
    try:
        for _ in range(2):  # without a password, and with one
            with pytest.raises(NoBroker, match=r"valkey cannot be written \(Read-only file system\)"):
                embedded_command(settings)
            subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
            (folder / "password").write_text("secret")
            subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_broker_that_cannot_be_used_is_named_at_the_start(valkey: Valkey, tmp_path: Path, run_dir: Path) -> None:
    """Case 32. Wrong password, too old, no Redis at all: by ``up`` before it starts anything, never with the secret."""
    valkey.start()
    proxy = Proxy(valkey.socket)
    try:
        address = f"127.0.0.1:{proxy.port}/0"
        with pytest.raises(NoBroker, match="refuses the password in TUNESMITH_BROKER_URL"):
            wait_until_ready(f"redis://:geheim@{address}", 5)
        with pytest.raises(NoBroker, match="refuses the password in TUNESMITH_BROKER_URL"):
            wait_until_ready(f"redis://{address}", 5)
        with too_old(run_dir / "old.sock") as proxy.path:
            with pytest.raises(NoBroker, match=r"version 6\.0\.9; Redis 6\.2 or newer, or Valkey, is needed"):
                wait_until_ready(f"redis://{address}", 5)
            bell = Doorbell(f"redis://{address}")  # as in the API and in the worker, before anybody rings
            wait_for(lambda: bell.complaint is not None and "6.0.9" in bell.complaint, 10)
            bell.close()
        proxy.path = valkey.socket
        with pytest.raises(NoBroker, match="must begin with redis://") as caught:
            wait_until_ready("amqp://user:geheim@127.0.0.1/", 5)
        assert "geheim" not in str(caught.value)
        result = subprocess.run(
            [COMMAND, "up"],
            env={
                **os.environ,
                "TUNESMITH_DATA_DIR": str(tmp_path / "up"),
                "TUNESMITH_PORT": "0",
                "TUNESMITH_BROKER_URL": f"redis://:geheim@127.0.0.1:{proxy.port}/0",
            },
            capture_output=True,
            text=True,
            timeout=60,
        )
    finally:
        proxy.close()
    assert result.returncode == 1
    assert "refuses the password in TUNESMITH_BROKER_URL" in result.stderr
    assert "geheim" not in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


def test_a_damaged_journal_is_put_aside(valkey: Valkey) -> None:
    """``up`` starts with an empty broker then: it held doorbells only."""
    damage(valkey)
    said: list[str] = []
    service = Service(valkey.settings.model_copy(update={"port": 0}), said.append)
    part = service._parts[0]
    try:
        part.start()
        service._await_broker(part)
        assert valkey.waiting() == 0
        assert (valkey.settings.data_dir / "valkey" / "appendonlydir.damaged").is_dir()
        assert "ended at once" in said[0]
        assert "append only file" in said[0]
        assert part.process is not None
        assert servers(valkey.settings) == [part.process.pid]
    finally:
        part.stop(5)
        service._socket.close()
        service._lock.release()


def damage(valkey: Valkey) -> None:
    """Bytes in the middle of Valkey's journal that are no command."""
    valkey.start()
    for _ in range(50):
        valkey.client.lpush(QUEUE, "bell")
    valkey.client.shutdown()
    assert valkey.process is not None
    valkey.process.wait(10)
    (journal,) = (valkey.settings.data_dir / "valkey" / "appendonlydir").glob("*.incr.aof")
    data = bytearray(journal.read_bytes())
    data[200:260] = bytes(60)
    journal.write_bytes(data)


def test_kill_9_of_up_with_a_job_running_and_stale_files(tmp_path: Path, timeline: Timeline) -> None:
    """Case 33. Started again it goes on: one broker, and the job succeeds."""
    with tempfile.TemporaryDirectory(prefix="ts-up-") as run_dir:
        up = Up(tmp_path, Path(run_dir))
        try:
            marker = tmp_path / "marker"
            api = {"headers": {"authorization": f"Bearer {(up.data_dir / 'api_key').read_text().strip()}"}}
            spec = {"type": "sleepy", "mode": "once", "marker": str(marker)}
            job_id = httpx.post(f"{up.url}/jobs", json=spec, **api).json()["id"]
            wait_for(marker.exists, 40)
            up.process.kill()
            up.process.wait()
            timeline.say("up was killed")
            assert up.run_file.exists()
            assert (Path(run_dir) / "v.sock").exists()
            (up.data_dir / "valkey" / "valkey.pid").write_text("1")
            up.run_file.unlink()
            with timeline.within("P13", "killed → up again and the job done", 60):
                up.start()
                job = f"{up.url}/jobs/{job_id}"
                wait_for(lambda: httpx.get(job, **api).json()["status"] == "succeeded", 40)
            assert len(servers(Settings(data_dir=up.data_dir))) == 1
        finally:
            up.process.send_signal(signal.SIGTERM)
            up.process.wait(60)
        assert servers(Settings(data_dir=up.data_dir)) == []
