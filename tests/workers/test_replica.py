"""A replica says truthfully how its engine is, and however it ends, nothing of the engine is left."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app import processes
from workers.journal import Tail
from workers.replica import PASSED_ON

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: /proc and prctl")

FAKE_ENGINE = Path(__file__).with_name("fake_engine.py")
REPLICA = [sys.executable, "-I", "-m", "workers.replica"]


class Attempt:
    """One attempt directory with a replica in it."""

    def __init__(self, directory: Path, run_dir: Path) -> None:
        self.directory = directory
        self.socket = run_dir / f"{uuid.uuid4().hex[:8]}.sock"
        self.token = uuid.uuid4().hex
        self.replica: subprocess.Popen[bytes] | None = None
        self.lifeline = -1
        self._tail = Tail(directory / "events.jsonl")
        self._lines: list[dict[str, Any]] = []

    def prepare(self, mode: str, **settings: Any) -> "Attempt":
        """Writes attempt.json."""
        values = {
            "argv": [sys.executable, str(FAKE_ENGINE), str(self.socket), mode, f"--log={self.directory / 'requests'}"],
            "env": {"ENGINE_COLOUR": "blue"},
            "socket": str(self.socket),
            "probe_path": "/v1/completions",
            "probe_body": {"model": "m", "prompt": "Hi", "max_tokens": 1},
            "start_timeout": 20,
            "probe_seconds": 0.1,
            "probe_timeout": 0.5,
            "grace_seconds": 5,
            **settings,
        }
        (self.directory / "attempt.json").write_text(json.dumps(values))
        return self

    def start(self) -> "Attempt":
        """Starts the replica as the supervisor does."""
        read, self.lifeline = os.pipe()
        self.replica = subprocess.Popen(
            [*REPLICA, str(self.directory)],
            env={**os.environ, processes.TOKEN: self.token, processes.LIFE_FD: str(read)},
            pass_fds=[read],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(read)
        return self

    def statuses(self) -> list[dict[str, Any]]:
        """The journal so far."""
        self._lines += self._tail.read()
        return self._lines

    def reach(self, status: str, seconds: float = 20) -> dict[str, Any]:
        """Waits until the newest status is this one."""
        wait_for(lambda: self.statuses() and self.statuses()[-1]["status"] == status, seconds)
        return self.statuses()[-1]

    def exit_status(self, seconds: float = 20) -> int:
        """Waits for the replica's end."""
        assert self.replica
        return self.replica.wait(seconds)

    def close(self) -> None:
        """Ends what a failed test left."""
        with contextlib.suppress(OSError):
            os.close(self.lifeline)
        if self.replica:
            processes.kill_ladder(self.replica, self.token, 0)


def wait_for(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def attempt(tmp_path: Path) -> Iterator[Attempt]:
    # Not under tmp_path: a unix socket's path holds 107 bytes.
    with tempfile.TemporaryDirectory(prefix="ts-") as run_dir:
        attempt = Attempt(tmp_path, Path(run_dir))
        yield attempt
        attempt.close()


def assert_nothing_left(attempt: Attempt, seconds: float = 3) -> None:
    wait_for(lambda: not processes.processes_with_token(attempt.token), seconds)


def test_ready_means_that_a_token_was_completed(attempt: Attempt) -> None:
    attempt.prepare("ok").start()
    line = attempt.reach("ready")
    assert [status["status"] for status in attempt.statuses()] == ["starting", "ready"]
    assert 0 < line["seconds"] < 20
    first = json.loads((attempt.directory / "requests").read_text().splitlines()[0])
    assert first["path"] == "/v1/completions"
    assert first["body"] == {"model": "m", "prompt": "Hi", "max_tokens": 1}


def test_sigterm_stops_the_engine_and_exits_0(attempt: Attempt) -> None:
    attempt.prepare("ok").start().reach("ready")
    assert attempt.replica
    attempt.replica.terminate()
    assert attempt.exit_status() == 0
    attempt.reach("stopped")
    assert_nothing_left(attempt)
    assert not attempt.socket.exists()


def test_sigterm_during_the_start(attempt: Attempt) -> None:
    attempt.prepare("never_ready").start().reach("starting")
    wait_for(attempt.socket.exists)
    assert attempt.replica
    attempt.replica.terminate()
    assert attempt.exit_status() == 0
    assert [status["status"] for status in attempt.statuses()] == ["starting", "stopped"]
    assert_nothing_left(attempt)


def test_an_engine_that_ignores_sigterm_is_killed_after_the_grace(attempt: Attempt) -> None:
    attempt.prepare("stubborn", grace_seconds=0.5).start().reach("ready")
    assert attempt.replica
    attempt.replica.terminate()
    attempt.replica.terminate()
    assert attempt.exit_status() == 0
    assert_nothing_left(attempt)


def test_an_engine_that_exits_at_once_fails_with_its_log(attempt: Attempt) -> None:
    attempt.prepare("exits").start()
    assert attempt.exit_status() == 1
    line = attempt.reach("failed")
    assert line["reason"] == "engine_exited"
    assert line["exit_code"] == 7
    assert "the weights are damaged" in line["log_tail"]


def test_the_log_tail_is_the_last_4_kib(attempt: Attempt) -> None:
    attempt.prepare("", argv=[sys.executable, "-c", "print('ä' * 9000 + 'the end')"]).start()
    assert attempt.exit_status() == 1
    tail = attempt.reach("failed")["log_tail"]
    assert len(tail.encode()) <= 4096 + 3
    assert tail.endswith("the end\n")


def test_an_engine_that_is_not_there(attempt: Attempt) -> None:
    attempt.prepare("", argv=["/nonexistent/python", "-m", "engine"]).start()
    assert attempt.exit_status() == 1
    line = attempt.reach("failed")
    assert line["reason"] == "engine_not_startable"
    assert "/nonexistent/python" in line["log_tail"]


def test_a_socket_path_that_is_too_long(attempt: Attempt) -> None:
    attempt.prepare("ok", socket="/tmp/" + "x" * 103).start()
    assert attempt.exit_status() == 1
    assert attempt.reach("failed")["reason"] == "socket_path_too_long"


def test_a_socket_left_by_an_earlier_engine_is_replaced(attempt: Attempt) -> None:
    attempt.socket.touch()
    attempt.prepare("ok").start().reach("ready")


@pytest.mark.parametrize("mode", ["never_ready", "lies", "embeds"])
def test_never_ready_exits_3_after_the_start_timeout(attempt: Attempt, mode: str) -> None:
    """Also when /health says 200 all the time and only the completions fail."""
    attempt.prepare(mode, start_timeout=1.5).start()
    assert attempt.exit_status() == 3
    assert [status["status"] for status in attempt.statuses()] == ["starting", "failed"]
    assert attempt.statuses()[-1]["reason"] == "start_timeout"
    assert_nothing_left(attempt)


def test_a_hanging_engine_is_unhealthy_and_then_killed(attempt: Attempt) -> None:
    attempt.prepare("hangs", probe_timeout=0.2).start()
    assert attempt.exit_status() == 1
    lines = [(line["status"], line.get("misses")) for line in attempt.statuses()]
    assert lines == [
        ("starting", None),
        ("ready", None),
        ("unhealthy", 1),
        ("unhealthy", 2),
        ("unhealthy", 3),
        ("failed", None),
    ]
    assert attempt.statuses()[-1]["reason"] == "unresponsive"
    assert_nothing_left(attempt)


def test_a_busy_engine_is_left_alone(attempt: Attempt) -> None:
    attempt.prepare("busy", probe_timeout=0.1).start().reach("ready")
    busy = Path(f"{attempt.socket}.busy")
    busy.touch()
    time.sleep(2)
    busy.unlink()
    time.sleep(0.5)
    assert [line["status"] for line in attempt.statuses()] == ["starting", "ready"]


def test_an_engine_that_is_busy_for_too_long_is_killed(attempt: Attempt) -> None:
    """Health alone says little: it answers when the model hangs."""
    attempt.prepare("busy", probe_timeout=0.1, busy_seconds=1).start().reach("ready")
    Path(f"{attempt.socket}.busy").touch()
    assert attempt.exit_status() == 1
    assert attempt.reach("failed")["reason"] == "unresponsive"


def test_an_engine_that_recovers_is_ready_again(attempt: Attempt) -> None:
    attempt.prepare("flaky", probe_misses=1000).start().reach("ready")
    sick = Path(f"{attempt.socket}.sick")
    sick.touch()
    attempt.reach("unhealthy")
    sick.unlink()
    attempt.reach("ready")


def test_an_engine_that_dies_later(attempt: Attempt) -> None:
    attempt.prepare("ok").start().reach("ready")
    (engine,) = _engines(attempt)
    os.kill(engine, signal.SIGKILL)
    assert attempt.exit_status() == 1
    assert attempt.reach("failed")["exit_code"] == -signal.SIGKILL
    assert_nothing_left(attempt)


def _engines(attempt: Attempt) -> list[int]:
    """The attempt's processes but the replica and its guard."""
    found = processes.processes_with_token(attempt.token)
    return [pid for pid in found if b"workers.replica" not in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.parametrize("ending", ["sigterm", "engine dies", "lifeline"])
def test_a_leaked_child_in_a_session_of_its_own_is_killed_too(attempt: Attempt, ending: str) -> None:
    attempt.prepare("leaks").start().reach("ready")
    assert attempt.replica
    assert len(_engines(attempt)) == 2
    if ending == "sigterm":
        attempt.replica.terminate()
    elif ending == "lifeline":
        os.close(attempt.lifeline)
        attempt.lifeline = -1
    else:
        (engine,) = (pid for pid in _engines(attempt) if os.getpgid(pid) == pid and _parent(pid) == attempt.replica.pid)
        os.kill(engine, signal.SIGKILL)
    assert attempt.exit_status() == {"sigterm": 0, "engine dies": 1, "lifeline": 70}[ending]
    assert_nothing_left(attempt)


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_the_end_of_the_life_pipe_ends_everything_within_2_seconds(attempt: Attempt) -> None:
    attempt.prepare("stubborn").start().reach("ready")
    started = time.monotonic()
    os.close(attempt.lifeline)
    attempt.lifeline = -1
    assert attempt.exit_status() == 70
    assert_nothing_left(attempt)
    assert time.monotonic() - started < 2


PARENT = f"""
import os, subprocess, sys, time
sys.path.insert(0, {str(FAKE_ENGINE.parents[2])!r})
from app import processes
read, write = os.pipe()
fds, env = ([read], {{processes.LIFE_FD: str(read)}}) if sys.argv[3] == "pipe" else ([], {{}})
subprocess.Popen(
    {REPLICA!r} + [sys.argv[1]], env={{**os.environ, **env, processes.TOKEN: sys.argv[2]}}, pass_fds=fds,
    stdin=subprocess.DEVNULL, start_new_session=True,
)
time.sleep(600)
"""


@pytest.mark.parametrize("net", ["pipe", "no pipe"])
def test_kill_9_of_the_parent_leaves_no_orphan(attempt: Attempt, net: str) -> None:
    """By the life pipe, and where there is none, by the parent-death signal."""
    attempt.prepare("leaks")
    with subprocess.Popen([sys.executable, "-c", PARENT, str(attempt.directory), attempt.token, net]) as parent:
        attempt.reach("ready")
        assert len(_engines(attempt)) == 2
        parent.kill()
    assert_nothing_left(attempt, 2)


def test_a_parent_of_many_threads_dies_many_times(attempt: Attempt) -> None:
    """The kernel sends the parent-death signal once for each of its threads, some while the first is being heard."""
    attempt.prepare("leaks").start().reach("ready")
    assert attempt.replica
    until = time.monotonic() + 0.5
    while attempt.replica.poll() is None and time.monotonic() < until:
        attempt.replica.send_signal(signal.SIGHUP)
        time.sleep(0.00002)
    assert attempt.exit_status(2) == 70
    assert_nothing_left(attempt, 2)


def test_kill_9_of_the_replica_leaves_no_orphan(attempt: Attempt) -> None:
    """Not even a child of the engine, which no parent-death signal reaches."""
    attempt.prepare("leaks").start().reach("ready")
    assert attempt.replica
    attempt.replica.kill()
    assert attempt.exit_status() == -signal.SIGKILL
    assert_nothing_left(attempt)


@pytest.mark.parametrize("ending", ["stop", "lifeline", "kill"])
def test_nothing_of_the_engine_stays_in_the_temporary_folder(
    attempt: Attempt, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp = attempt.directory / "tmp"
    tmp.mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp))
    code = (
        "import tempfile, os, sys; tempfile.mkstemp();"
        f"os.execv(sys.executable, [sys.executable, {str(FAKE_ENGINE)!r}, {str(attempt.socket)!r}, 'ok'])"
    )
    attempt.prepare("", argv=[sys.executable, "-c", code]).start().reach("ready")
    assert len(list(tmp.glob("ts-*/*"))) == 1
    assert attempt.replica
    if ending == "stop":
        attempt.replica.terminate()
    elif ending == "kill":
        attempt.replica.kill()
    else:
        os.close(attempt.lifeline)
        attempt.lifeline = -1
    attempt.exit_status()
    wait_for(lambda: list(tmp.iterdir()) == [])


def test_the_ladder_of_the_supervisor_ends_all_of_it(attempt: Attempt) -> None:
    attempt.prepare("leaks").start().reach("ready")
    assert attempt.replica
    processes.kill_ladder(attempt.replica, attempt.token, 10)
    assert processes.processes_with_token(attempt.token) == []
    assert attempt.replica.returncode == 0


def test_orphans_of_a_living_engine_are_reaped(attempt: Attempt) -> None:
    """A long-lived engine whose helpers come and go must not fill the process table with zombies."""
    code = (
        "import os, sys, subprocess\n"
        f"subprocess.run([sys.executable, '-c', {DOUBLE_FORK!r}])\n"
        f"os.execv(sys.executable, [sys.executable, {str(FAKE_ENGINE)!r}, {str(attempt.socket)!r}, 'ok'])"
    )
    attempt.prepare("", argv=[sys.executable, "-c", code]).start().reach("ready")
    assert attempt.replica
    replica = attempt.replica.pid
    # The engine and the guard.
    wait_for(lambda: len(Path(f"/proc/{replica}/task/{replica}/children").read_text().split()) == 2)


DOUBLE_FORK = "import os\nif os.fork() == 0:\n  if os.fork() == 0: os._exit(0)\n  os._exit(0)\n"


def test_the_engine_sees_a_small_environment(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os, json; print(json.dumps(dict(os.environ)), flush=True); raise SystemExit(1)"
    monkeypatch.setenv("TUNESMITH_SECRET_THING", "hush")
    attempt.prepare("", argv=[sys.executable, "-c", code]).start()
    assert attempt.exit_status() == 1
    seen = json.loads(attempt.reach("failed")["log_tail"].splitlines()[0])
    assert seen.pop("ENGINE_COLOUR") == "blue"
    assert seen.pop(processes.TOKEN) == attempt.token
    assert seen.pop("SPT_NOENV") == "1"
    # LC_CTYPE is set by the interpreter itself when the locale is C.
    assert set(seen) <= {*PASSED_ON, "TMPDIR", "LC_CTYPE"}


def test_what_is_written_is_private(attempt: Attempt) -> None:
    attempt.prepare("ok").start().reach("ready")
    for name in ("events.jsonl", "log.txt"):
        assert (attempt.directory / name).stat().st_mode & 0o777 == 0o600
    assert attempt.socket.stat().st_mode & 0o077 == 0
