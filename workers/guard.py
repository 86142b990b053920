"""The last net of a worker: waits for its end, however it comes, and kills what its attempts left (stdlib only).

A runner gets its parent-death signal when the worker is killed, and the parent of an engine ends its engine. What a run
forked gets no signal: without this it would compute on until the next worker starts on the slot.

Run as ``python -I -m workers.guard <data dir> <instance> <slot>…`` with the reading end of a pipe as standard input,
whose writing end only the worker holds.
"""

import contextlib
import fcntl
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from app.processes import holders_of_slot, kill_holders_of_slot

PATIENCE = 2.0
"""For whoever ends in order: the parent of an engine tidies up after it, and needs 1.5 s at most."""
_LONGEST = 10.0
_STEP = 0.05


def lock_file(data_dir: Path, slot_id: str) -> Path:
    """What the owner of a slot holds locked; the sub-slots of a GPU have one owner."""
    return data_dir / "slots" / f"slot-{slot_id.partition('.')[0]}"


def post(data_dir: Path, instance: str, slots: Sequence[str]) -> "subprocess.Popen[bytes]":
    """Starts the guard of this process. Keep what is returned: the guard acts when it is gone."""
    return subprocess.Popen(
        [sys.executable, "-I", "-m", "workers.guard", str(data_dir), instance, *slots],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def main(argv: list[str]) -> None:
    """Until the worker is gone, and until nothing is left of it."""
    # Service managers and terminals tell every process of a worker to stop; this one is needed until the very end.
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    data_dir, instance, slots = Path(argv[1]), argv[2], argv[3:]
    sys.stdin.buffer.read()
    _within(PATIENCE, lambda: not any(holders_of_slot(instance, slot) for slot in slots))
    for slot in slots:
        _clear(data_dir, instance, slot)


def _clear(data_dir: Path, instance: str, slot: str) -> None:
    """Kills what is left on a slot that is nobody's; whoever has it by now saw to that when it took it."""
    with contextlib.suppress(OSError), lock_file(data_dir, slot).open("a") as lock:
        # Held meanwhile: what the next owner starts on the slot cannot be told from what the last one left.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _within(_LONGEST, lambda: not kill_holders_of_slot(instance, slot))


def _within(seconds: float, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(_STEP)


if __name__ == "__main__":
    main(sys.argv)
