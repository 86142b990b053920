"""Every child of an attempt can be found and ended, whatever it does to get away."""

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app import processes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: /proc and prctl")

SLEEP = "import time; print('up', flush=True); time.sleep(600)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + SLEEP
# The leader goes away at once and leaves a grandchild in a session of its own.
DOUBLE_FORK = f"""
import os, sys
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        {STUBBORN}
    os._exit(0)
os.wait()
"""
# The leader goes away at once; a child that has wiped its environment stays in the group beside one that has not.
GROUP_WITHOUT_LEADER = f"""
import os, sys
if os.fork() == 0:
    os.execve(sys.executable, [sys.executable, "-c", {SLEEP!r}], {{}})
if os.fork() == 0:
    {SLEEP}
"""


def wait_for(condition: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.fixture
def token() -> Iterator[str]:
    token = uuid.uuid4().hex
    yield token
    for pid in processes.processes_with_token(token):
        os.kill(pid, signal.SIGKILL)


def start(code: str, token: str, ups: int = 1) -> "subprocess.Popen[bytes]":
    """A process of its own session that carries the token; returns once ``ups`` of its processes are up."""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, processes.TOKEN: token},
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    with process.stdout as output:
        for _ in range(ups):
            assert output.readline() == b"up\n"
    return process


def test_a_token_finds_exactly_its_own_processes(token: str) -> None:
    process = start(SLEEP, token)
    other = start(SLEEP, token + "x")
    assert processes.processes_with_token(token) == [process.pid]
    assert processes.processes_with_token(token[:-1]) == []
    processes.kill_ladder(other, token + "x", 0)
    processes.kill_ladder(process, token, 0)
    assert processes.processes_with_token(token) == []


def test_a_zombie_is_not_found(token: str) -> None:
    process = start(SLEEP, token)
    process.kill()
    wait_for(lambda: not alive(process.pid))
    assert processes.processes_with_token(token) == []
    processes.kill_ladder(process, token, 5)
    assert process.returncode == -signal.SIGKILL


def test_sigterm_is_enough_for_a_polite_process(token: str) -> None:
    process = start(SLEEP, token)
    started = time.monotonic()
    processes.kill_ladder(process, token, 60)
    assert process.returncode == -signal.SIGTERM
    assert time.monotonic() - started < 5


def test_who_ignores_sigterm_is_killed_after_the_grace(token: str) -> None:
    process = start(STUBBORN, token)
    slept: list[float] = []
    processes.kill_ladder(process, token, 3.0, sleep=slept.append)
    assert process.returncode == -signal.SIGKILL
    assert sum(slept) >= 2.99


def test_a_double_forked_grandchild_in_its_own_session_is_killed(token: str) -> None:
    process = start(DOUBLE_FORK, token)
    wait_for(lambda: processes.exited(process))
    (stray,) = processes.processes_with_token(token)
    processes.kill_ladder(process, token, 0.1)
    wait_for(lambda: not alive(stray))


@pytest.mark.parametrize("reaped", [False, True])
def test_a_group_is_killed_after_its_leader_has_gone(token: str, reaped: bool) -> None:
    process = start(GROUP_WITHOUT_LEADER, token, ups=2)
    if reaped:
        process.wait()
    else:
        wait_for(lambda: processes.exited(process))
    group = [int(path.name) for path in Path("/proc").glob("[0-9]*") if _group(int(path.name)) == process.pid]
    members = [pid for pid in group if pid != process.pid]
    assert len(members) == 2
    assert len(processes.processes_with_token(token)) == 1
    processes.kill_ladder(process, token, 5)
    wait_for(lambda: not any(alive(pid) for pid in members))


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def test_the_ladder_may_be_climbed_twice_and_from_two_threads(token: str) -> None:
    process = start(STUBBORN, token)
    threads = [threading.Thread(target=processes.kill_ladder, args=(process, token, 0.2)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    processes.kill_ladder(process, token, 60)
    assert process.returncode == -signal.SIGKILL


def test_the_group_of_somebody_else_is_left_alone(token: str) -> None:
    """After the reaping the number may belong to another group: without the token in it, nobody is signalled."""
    innocent = start(SLEEP, token + "-other")
    finished = subprocess.Popen(["true"])
    finished.wait()
    finished.pid = innocent.pid
    processes.kill_ladder(finished, token, 0.1)
    assert innocent.poll() is None
    processes.kill_ladder(innocent, token + "-other", 0)


def test_exited_leaves_the_process_unreaped() -> None:
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(5)"])
    wait_for(lambda: processes.exited(process))
    assert process.returncode is None
    assert process.wait() == 5
    assert processes.exited(process)


def test_the_lifeline_notices_the_end_and_nothing_else() -> None:
    read, write = os.pipe()
    cut = threading.Event()
    thread = processes.watch_lifeline(read, cut.set)
    os.write(write, b"{}\n")
    assert not cut.wait(0.2)
    os.close(write)
    assert cut.wait(5)
    thread.join(5)
    os.close(read)


HARDENED = """
import os, resource, sys
from app import processes
processes.harden()
umask = os.umask(0)
print(resource.getrlimit(resource.RLIMIT_CORE), oct(umask), open('/proc/self/oom_score_adj').read().strip(), flush=True)
sys.stdin.read()
import time; time.sleep(600)
"""


def test_a_hardened_process_dumps_no_core_and_dies_with_its_parent() -> None:
    middle = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys, time\n"
            f"child = subprocess.Popen([sys.executable, '-c', {HARDENED!r}], stdin=subprocess.DEVNULL)\n"
            "print(child.pid, flush=True)\n"
            "time.sleep(600)",
        ],
        stdout=subprocess.PIPE,
    )
    assert middle.stdout is not None
    with middle.stdout as output:
        child = int(output.readline())
        assert output.readline().decode().startswith("(0, 0) 0o77 ")
    assert alive(child)
    middle.kill()
    middle.wait()
    wait_for(lambda: not alive(child))


def test_a_child_whose_parent_is_gone_already_exits_70() -> None:
    env = {**os.environ, processes.PARENT_PID: "1073741824"}
    assert subprocess.run([sys.executable, "-c", HARDENED], env=env, check=False).returncode == 70
