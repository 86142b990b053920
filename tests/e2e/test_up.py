"""``tunesmith up``: three real processes that come back when they die, and go when they are told to."""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support import wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: /proc")]
COMMAND = shutil.which("tunesmith", path=str(Path(sys.executable).parent)) or "tunesmith"


class Up:
    """The service of a data directory of its own."""

    def __init__(self, folder: Path, run_dir: Path) -> None:
        self.data_dir = folder / "data"
        self.log = folder / "up.log"
        self.environment = {
            **os.environ,
            "TUNESMITH_DATA_DIR": str(self.data_dir),
            "TUNESMITH_RUN_DIR": str(run_dir),
            "TUNESMITH_PORT": "0",
            "TUNESMITH_PLUGIN_PACKAGES": "tests.plugs",
            "TUNESMITH_SLOTS": "light:1",
            "TUNESMITH_HEARTBEAT_SECONDS": "0.3",
            "TUNESMITH_LEASE_SECONDS": "3",
            "TUNESMITH_GRACE_SECONDS": "10",
            "NO_COLOR": "1",
        }
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [COMMAND, "up"], env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        wait_for(self.run_file.exists, 40)
        wait_for(self.ready, 40)

    @property
    def run_file(self) -> Path:
        return self.data_dir / "service.json"

    @property
    def url(self) -> str:
        return str(json.loads(self.run_file.read_bytes())["url"])

    def ready(self) -> bool:
        """The API answers and a worker lives."""
        try:
            answer = httpx.get(f"{self.url}/readyz", timeout=5)
        except httpx.TransportError:
            return False
        return answer.status_code == 200 and not answer.json()["degraded"]

    def part(self, words: str) -> int:
        """Pid of the one child of ``up`` whose command line holds ``words``; 0 while there is none."""
        found = [
            child.pid
            for child in psutil.Process(self.process.pid).children()
            if words in " ".join(child.cmdline()) and child.status() != psutil.STATUS_ZOMBIE
        ]
        return found[0] if len(found) == 1 else 0

    def everybody(self) -> set[int]:
        """Every living process that was started for this data directory."""
        mark = f"TUNESMITH_DATA_DIR={self.data_dir}".encode()
        broker = str(self.data_dir / "valkey")  # it gets none of our environment and renames itself
        found = set()
        for process in psutil.process_iter():
            try:
                environ = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
                if mark in environ or process.cwd() == broker or self._is_attempt(environ):
                    found.add(process.pid)
            except (OSError, psutil.Error):
                continue
        return found

    def _is_attempt(self, environ: list[bytes]) -> bool:
        token = f"TUNESMITH_ATTEMPT={self.instance}:".encode()
        return any(item.startswith(token) for item in environ)

    @property
    def instance(self) -> str:
        from app.settings import Settings  # noqa: PLC0415

        return Settings(data_dir=self.data_dir).instance

    def cli(self, *arguments: str, check: bool = True) -> Any:
        """A command of the CLI with ``--json``: its answer."""
        result = subprocess.run([COMMAND, *arguments], env=self.environment, capture_output=True, text=True, timeout=90)
        assert not check or result.returncode == 0, result.stderr
        return json.loads(result.stdout) if result.returncode == 0 else result

    def submit(self, folder: Path, **fields: Any) -> dict[str, Any]:
        spec = folder / "spec.json"
        spec.write_text(json.dumps({"type": "sleepy", **fields}))
        job: dict[str, Any] = self.cli("submit", str(spec), "--json")
        return job

    def finished(self, job_id: str) -> dict[str, Any]:
        """The job, once it is final."""

        def look() -> dict[str, Any] | None:
            job: dict[str, Any] = self.cli("jobs", "show", job_id)
            return job if job["status"] in ("succeeded", "failed", "cancelled") else None

        job = wait_for(look, 60)
        assert job is not None
        return job


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with tempfile.TemporaryDirectory(prefix="ts-up-") as run_dir:
        up = Up(tmp_path_factory.mktemp("up"), Path(run_dir))
        yield up
        if up.process.poll() is None:
            up.process.send_signal(signal.SIGTERM)
            up.process.wait(60)


def test_the_first_start_leaves_a_key_that_only_we_can_read(up: Up) -> None:
    path = up.data_dir / "api_key"
    key = path.read_text().strip()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert re.fullmatch(r"ts_[0-9a-f]{12}_[\w-]{40,}", key)
    assert up.log.read_text().count(key) == 1
    about = json.loads(up.run_file.read_bytes())
    assert (about["pid"], about["key_file"]) == (up.process.pid, str(path))
    assert stat.S_IMODE(up.run_file.stat().st_mode) == 0o600
    assert httpx.get(f"{up.url}/jobs").status_code == 401
    assert httpx.get(f"{up.url}/jobs", headers={"authorization": f"Bearer {key}"}).status_code == 200
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path.parent)
        assert key not in subprocess.run(["grep", "-ra", key, "tunesmith.db"], capture_output=True, text=True).stdout


def test_nobody_but_the_api_listens_on_a_port(up: Up) -> None:
    ports = {
        connection.laddr.port
        for pid in up.everybody()
        for connection in psutil.Process(pid).net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert ports == {int(up.url.rpartition(":")[2])}


def test_a_second_up_is_refused(up: Up) -> None:
    result = subprocess.run([COMMAND, "up"], env=up.environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "already up" in result.stderr
    assert up.ready()


def test_a_job_by_the_command_line(up: Up, tmp_path: Path) -> None:
    job = up.submit(tmp_path, mode="ok", metadata={"a": "b"})
    assert job["status"] == "queued"
    job = up.finished(job["id"])
    assert (job["status"], job["result"]["answer"]) == ("succeeded", 42)
    assert up.cli("jobs", "list", "--json")["data"][0]["id"] == job["id"]
    spec = tmp_path / "again.yaml"
    spec.write_text("type: sleepy\nmode: refuse\n")
    failed = up.cli("submit", str(spec), "--follow", check=False)
    assert failed.returncode == 1
    assert "row 3 makes no sense" in failed.stderr
    assert "Mend row 3." in failed.stderr
    good = tmp_path / "good.yaml"
    good.write_text("type: sleepy\n")
    assert up.cli("submit", str(good), "--follow", "--json")["status"] == "succeeded"


@pytest.mark.fault
@pytest.mark.parametrize("words", ["app.api", "valkey", "workers.main"])
def test_a_part_that_is_killed_comes_back(up: Up, tmp_path: Path, words: str) -> None:
    """And the job that ran, or was sent meanwhile, succeeds."""
    marker = tmp_path / "marker"
    mode = "once" if words == "workers.main" else "ok"
    if words == "workers.main":
        job = up.submit(tmp_path, mode=mode, marker=str(marker))
        runner = int(wait_for(lambda: marker.exists() and marker.read_text(), 40))
    pid = wait_for(lambda: up.part(words))
    os.kill(pid, signal.SIGKILL)
    if words == "workers.main":
        wait_for(lambda: not psutil.pid_exists(runner) or psutil.Process(runner).status() == "zombie", 15)
    else:
        job = up.submit(tmp_path, mode=mode)  # the listening socket is up's own: clients only wait
    assert up.finished(job["id"])["status"] == "succeeded"
    assert wait_for(lambda: up.part(words), 40) != pid
    wait_for(up.ready, 40)
    assert "starts again in" in up.log.read_text()


@pytest.mark.fault
def test_sigterm_ends_everything_and_the_next_start_goes_on(up: Up, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    job = up.submit(tmp_path, mode="once", marker=str(marker), seconds=600)
    waiting = up.submit(tmp_path, mode="ok")
    wait_for(marker.exists, 40)
    up.process.send_signal(signal.SIGTERM)
    assert up.process.wait(60) == 0
    assert up.everybody() == set()
    assert not up.run_file.exists()
    refused = up.cli("jobs", "show", job["id"], check=False)
    assert refused.returncode == 1
    assert "tunesmith up" in refused.stderr
    up.start()
    assert up.finished(job["id"])["status"] == "succeeded"
    assert up.finished(waiting["id"])["status"] == "succeeded"
    assert up.log.read_text().count("shown once") == 1


@pytest.mark.fault
def test_kill_9_of_up_leaves_nothing(up: Up, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    up.submit(tmp_path, mode="stubborn", marker=str(marker))
    wait_for(marker.exists, 40)
    # up, API, worker and its guard, broker, runner, and one that waits
    wait_for(lambda: len(up.everybody()) == 7, 40)
    up.process.kill()
    up.process.wait()
    wait_for(lambda: not up.everybody(), 15)


@pytest.mark.fault
def test_a_closed_terminal_ends_everything(up: Up) -> None:
    if up.process.poll() is not None:
        up.start()
    up.process.send_signal(signal.SIGHUP)
    assert up.process.wait(60) == 0
    assert up.everybody() == set()
    assert not up.run_file.exists()
