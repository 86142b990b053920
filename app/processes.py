"""Process hygiene: no child outlives its parent, and a whole attempt can be found and ended (stdlib only).

Three nets, from the quickest to the last: the parent-death signal, the life pipe (a pipe whose writing end only the
parent holds, so that its end, however it comes, reads as EOF), and the token ``TUNESMITH_ATTEMPT`` in the environment,
by which even a double-forked grandchild in a session of its own is found. Linux; elsewhere the process group and the
life pipe still work, the rest does nothing.
"""

import contextlib
import ctypes
import math
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from app.states import EXIT_LIFELINE_CUT

TOKEN = "TUNESMITH_ATTEMPT"
LIFE_FD = "TUNESMITH_LIFE_FD"
PARENT_PID = "TUNESMITH_PARENT_PID"
SILENCE = "TUNESMITH_SILENCE"
SPARE = "spare"

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_STEP = 0.05
_LINUX = sys.platform == "linux"
_PROC = Path("/proc")
# Loaded once, here: a child between fork and exec must not import or load anything.
_libc = ctypes.CDLL(None, use_errno=True) if _LINUX else None


def harden(death_signal: int = signal.SIGKILL) -> None:
    """The first lines of every child: die with the parent, dump no core, leave no readable file, go first on OOM.

    ``death_signal`` comes when the *thread* that spawned us ends. Exits 70 when the parent is gone already; where the
    parent told its pid in ``TUNESMITH_PARENT_PID`` that holds from the start, else from this call on.
    """
    parent = int(os.environ.get(PARENT_PID) or os.getppid())
    _prctl(_PR_SET_PDEATHSIG, death_signal)
    if os.getppid() != parent:
        os._exit(EXIT_LIFELINE_CUT)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o077)
    with contextlib.suppress(OSError):
        (_PROC / "self/oom_score_adj").write_text("500")


def become_subreaper() -> None:
    """From now on orphaned descendants become our children instead of init's."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """For ``preexec_fn`` of a single-threaded parent: SIGKILL for this child when the parent's thread ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def watch_lifeline(fd: int, on_eof: Callable[[], None], silence: float | None = None) -> threading.Thread:
    """Calls ``on_eof`` in a daemon thread once the life pipe's writing end is closed, or silent for too long.

    ``silence``: seconds; default what ``TUNESMITH_SILENCE`` says, else for ever. A stopped parent ticks no more.
    """
    patience = silence if silence is not None else float(os.environ.get(SILENCE) or 0) or None

    def watch() -> None:
        with contextlib.suppress(OSError):
            while select.select([fd], [], [], patience)[0] and os.read(fd, 4096):
                pass
        on_eof()

    thread = threading.Thread(target=watch, name="lifeline", daemon=True)
    thread.start()
    return thread


def oom_kill_count() -> int:
    """How many processes the kernel killed for memory in our control group (cgroup v2 or v1); 0 where none says so."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (_PROC / "self/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0":
                file = Path("/sys/fs/cgroup") / path.lstrip("/") / "memory.events"
            elif "memory" in controllers.split(","):
                file = Path("/sys/fs/cgroup/memory") / path.lstrip("/") / "memory.oom_control"
            else:
                continue
            if file.is_file():
                facts = dict(entry.split(" ", 1) for entry in file.read_text().splitlines())
                return int(facts.get("oom_kill", 0))
    return 0


def processes_with_token(token: str) -> list[int]:
    """Living processes, without the caller, that were started with ``TUNESMITH_ATTEMPT=<token>``."""
    return [pid for pid in _pids() if pid != os.getpid() and _has_token(pid, token)]


def living_children() -> list[int]:
    """Pids of the caller's children, adopted ones included, that are no zombies."""
    me = os.getpid()
    return [pid for pid in _pids() if (stat := _stat(pid)) and stat[1] == me and stat[0] not in "ZX"]


def exited(process: "subprocess.Popen[bytes]") -> bool:
    """Whether the process has ended; unlike ``poll`` it is not reaped, so that its pid stays ours."""
    if process.returncode is not None:
        return True
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def kill_holders(token: str) -> list[int]:
    """SIGKILL for every process with the token but the caller; returns whom it found."""
    found = processes_with_token(token)
    for pid in found:
        _kill_holder(pid, token)
    return found


def holders_of_file(path: Path) -> list[int]:
    """Living processes, without the caller, that have the file open."""
    return [pid for pid in _pids() if pid != os.getpid() and _has_open(pid, path)]


def signal_holder_of_file(pid: int, path: Path, number: signal.Signals) -> None:
    """Signals the process if it still has the file open."""
    with contextlib.suppress(OSError):
        fd = os.pidfd_open(pid)
        try:
            if _has_open(pid, path):
                signal.pidfd_send_signal(fd, number)
        finally:
            os.close(fd)


def kill_now(process: "subprocess.Popen[bytes]", token: str) -> bool:
    """One round of SIGKILL for the group and the token's holders; True when there was nobody left to kill."""
    group = _living_group(process, token)
    if group:
        _signal_group(process, token, signal.SIGKILL)
    return not kill_holders(token) and not group


def kill_ladder(
    process: "subprocess.Popen[bytes]", token: str, grace: float, *, sleep: Callable[[float], object] = time.sleep
) -> None:
    """SIGTERM to the group, ``grace`` seconds, SIGKILL, then SIGKILL for every holder of the token.

    ``process`` must lead its own group (``start_new_session=True`` or ``process_group=0``). Returns when no process of
    the group and none with the token is left, and the process is reaped. May be called again at any time.
    """
    if _living_group(process, token):
        _signal_group(process, token, signal.SIGTERM)
        for _ in range(math.ceil(grace / _STEP)):
            if not _living_group(process, token):
                break
            sleep(_STEP)
    # A process that forks while it is killed is found in the next round.
    while not kill_now(process, token):
        sleep(_STEP)
    process.wait()


def _prctl(option: int, value: int) -> None:
    if _libc is not None and _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def _pids() -> list[int]:
    # Without /proc (macOS, BSD) nobody is found: there only the process group is signalled.
    if not _LINUX:
        return []
    return [int(name) for name in os.listdir(_PROC) if name.isdigit()]


def _stat(pid: int) -> tuple[str, int, int] | None:
    """State letter, parent and process group; None when the process is gone."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return None
    # The command name stands in parentheses and may itself hold spaces and parentheses.
    state, parent, group = text.rpartition(")")[2].split()[:3]
    return state, int(parent), int(group)


def _has_token(pid: int, token: str) -> bool:
    try:
        environ = (_PROC / str(pid) / "environ").read_bytes()
    except OSError:
        return False
    return f"{TOKEN}={token}".encode() in environ.split(b"\0")


def _has_open(pid: int, path: Path) -> bool:
    folder = _PROC / str(pid) / "fd"
    with contextlib.suppress(OSError):
        wanted = path.stat()
        for name in os.listdir(folder):
            with contextlib.suppress(OSError):  # closed meanwhile
                if os.path.samestat((folder / name).stat(), wanted):
                    return True
    return False


def _living_group(process: "subprocess.Popen[bytes]", token: str) -> list[int]:
    """The group's processes that are no zombies, or [] when its number may have passed to somebody else.

    The kernel keeps the number from being given out again until the leader is reaped and the last member is gone. So
    after the reaping the group is ours as long as a member carries the token.
    """
    if not _LINUX:
        return _living_group_elsewhere(process)
    members = [pid for pid in _pids() if (stat := _stat(pid)) and stat[2] == process.pid and stat[0] not in "ZX"]
    if process.returncode is None or any(_has_token(pid, token) for pid in members):
        return members
    return []


def _living_group_elsewhere(process: "subprocess.Popen[bytes]") -> list[int]:
    if process.poll() is not None:
        return []
    return [process.pid]


def _signal_group(process: "subprocess.Popen[bytes]", token: str, number: signal.Signals) -> None:
    if _living_group(process, token):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)


def _kill_holder(pid: int, token: str) -> None:
    # The pidfd pins the process; looking at the token again after opening it rules out a pid that was given anew.
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return
    try:
        if _has_token(pid, token):
            signal.pidfd_send_signal(fd, signal.SIGKILL)
    except ProcessLookupError:
        pass
    finally:
        os.close(fd)


def processes_of_instance(instance: str) -> list[int]:
    """Living processes of an installation (``Settings.instance``): attempts, and runners that wait for one."""
    return [pid for pid in _pids() if _token_of(pid).startswith(f"{instance}:")]


def processes_of_attempts(instance: str) -> list[int]:
    """The same without the runners that wait for an attempt."""
    return [pid for pid in processes_of_instance(instance) if not _token_of(pid).startswith(f"{instance}:{SPARE}:")]


def holders_of_slot(instance: str, slot_id: str) -> list[int]:
    """Living processes of the attempts on a slot: tokens are ``<instance>:<job>:<fence>:<slot>``."""
    return [pid for pid in processes_of_instance(instance) if _token_of(pid).endswith(f":{slot_id}")]


def kill_holders_of_slot(instance: str, slot_id: str) -> list[int]:
    """SIGKILL for what a dead worker left on a slot. Returns pids."""
    killed = holders_of_slot(instance, slot_id)
    for pid in killed:
        _kill_holder(pid, _token_of(pid))
    return killed


def _token_of(pid: int) -> str:
    try:
        environ = (_PROC / str(pid) / "environ").read_bytes()
    except OSError:
        return ""
    prefix = f"{TOKEN}=".encode()
    return next(
        (item[len(prefix) :].decode(errors="replace") for item in environ.split(b"\0") if item.startswith(prefix)), ""
    )
