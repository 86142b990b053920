"""Memory, processes or pids run out: the run fails with its reason, its worker and strangers live."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from app.db import Database
from app.models import Job, JobEvent
from app.processes import processes_of_instance
from app.settings import Settings
from tests.faults.cgroups import limited
from tests.faults.timeline import Timeline
from tests.support import wait_for

pytestmark = [pytest.mark.fault, pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")]
Until = Callable[..., Job]


@pytest.fixture
def backend() -> str:
    """It is about processes."""
    return "sqlite"


@pytest.fixture
def submit(api: TestClient, tmp_path: Path) -> Callable[..., str]:
    """``submit(mode, amount=…)``: the id of a job of ``tests/plugs/unruly.py`` that is tried again at once."""

    def submit(mode: str, **fields: Any) -> str:
        body = {"type": "unruly", "mode": mode, "marker": str(tmp_path / f"marker-{mode}"), **fields}
        answer = api.post("/jobs", json={"retry": {"backoff_seconds": 0}, **body})
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    return submit


def codes(database: Database, job_id: str) -> list[str]:
    with database.read() as session:
        return list(session.scalars(select(JobEvent.code).where(JobEvent.job_id == job_id).order_by(JobEvent.seq)))


def still_works(worker: Any, api: TestClient, until: Until) -> None:
    """The worker lives and runs the next job."""
    until(api.post("/jobs", json={"type": "sleepy"}).json()["id"], "succeeded")
    assert worker.process.poll() is None


def test_the_kernel_kills_a_runner_for_memory(
    worker: Any, submit: Any, until: Until, api: TestClient, database: Database, timeline: Timeline
) -> None:
    """Case 17. A real kill by a memory control group, which worker and runner share: told as such, tried once more."""
    with limited("memory", 512 << 20) as group:
        worker.start()
        group.take(worker.pid)
        try:
            job_id = submit("hogs", amount=2048)
            job = until(job_id, "failed")
            assert (job.error_code, job.exit_code) == ("host_oom", -9)
            assert job.error_detail is not None
            assert "QLoRA" in job.error_detail["hint"]
            started = codes(database, job_id).count("job_started")
            timeline.bound("P8", "attempts of a run that the kernel kills for memory", started, 2, "attempts")
            assert codes(database, job_id).count("host_oom") == 1
            still_works(worker, api, until)
        finally:
            worker.kill()


def test_a_fork_bomb(
    worker: Any, submit: Any, until: Until, api: TestClient, settings: Settings, timeline: Timeline
) -> None:
    """Case 20. It runs into the limit that it shares with its worker: the job fails, none of it is left."""
    with limited("pids", 120) as group:
        worker.start()
        group.take(worker.pid)
        try:
            still_works(worker, api, until)
            job_id = submit("fork_bomb")
            most = [0]

            def look() -> bool:
                most[0] = max(most[0], len(processes_of_instance(settings.instance)))
                return until(job_id, "queued", "running", "failed").state == "failed"

            wait_for(look, 60)
            job = until(job_id, "failed")
            timeline.say(f"{most[0]} processes at the most; {job.error_code}: {job.error_detail}")
            assert most[0] > 30
            assert job.error_code in ("run_failed", "crash_loop", "crashed")
            with timeline.within("P13", "a fork bomb failed → none of its processes is left", 15):
                wait_for(lambda: not processes_of_instance(settings.instance), 15)
            still_works(worker, api, until)
        finally:
            worker.kill()


STRANGER = """
import os, signal, subprocess, sys, time
from app import processes

def sleeper(token, **options):
    process = subprocess.Popen(["sleep", "600"], env={**os.environ, processes.TOKEN: token}, **options)
    while b"sleep" not in open(f"/proc/{process.pid}/cmdline", "rb").read():
        time.sleep(0.01)
    return process

def recycled(pid, token):
    for _ in range(50):
        with open("/proc/sys/kernel/ns_last_pid", "w") as file:
            file.write(str(pid - 1))
        process = sleeper(token, start_new_session=True)
        if process.pid == pid:
            return process
        process.kill()
        process.wait()
    raise SystemExit("the pid was not given out again")

ours = sleeper("ours", start_new_session=True)
assert processes.processes_with_token("ours") == [ours.pid]
listed = processes.processes_with_token("ours")
os.kill(ours.pid, signal.SIGKILL)
ours.wait()
stranger = recycled(ours.pid, "theirs")

# Listed before it died, signalled after its number had passed to somebody else.
processes._kill_holder(listed[0], "ours")
# The ladder for a process that is reaped, whose number now leads a stranger's group.
processes.kill_ladder(ours, "ours", 0.2)
assert processes.kill_now(ours, "ours")
ours.send_signal(signal.SIGTERM)
processes.kill_holders_of_slot("ours", "light-0")
time.sleep(0.1)
assert stranger.poll() is None, "a stranger was hit"

# And the other way round: whoever does carry the token is hit, whatever its number was before.
stranger.kill()
stranger.wait()
again = recycled(ours.pid, "ours")
processes._kill_holder(again.pid, "ours")
assert again.wait(10) == -signal.SIGKILL
print("all is well")
"""


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare")
@pytest.mark.skipif(not Path("/proc/sys/kernel/ns_last_pid").exists(), reason="this kernel cannot choose the next pid")
def test_a_recycled_pid_is_left_alone() -> None:
    """Case 21. In a pid namespace, where the dead runner's number is given to a stranger at once."""
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable, "-c", STRANGER]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "all is well\n"), done.stderr
