"""Named places where a test lets a process die: ``TUNESMITH_CRASHPOINT=name`` or ``name:n`` for the n-th time.

Without that variable ``reached`` is a function that does nothing. Several points are separated by commas.
"""

import os
import signal
import threading
from collections import Counter

POINTS = frozenset(
    {
        "submit.before_commit",
        "submit.after_commit",
        "claim.before_commit",
        "claim.after_commit",
        "spawn.before",
        "spawn.after",
        "beat.before",
        "checkpoint.before_complete",
        "checkpoint.after_complete",
        "checkpoint.before_row",
        "checkpoint.thinned",
        "publish.before_manifest",
        "publish.before_rename",
        "publish.after_rename",
        "succeed.before_commit",
        "succeed.after_commit",
        "requeue.before_commit",
        "requeue.after_commit",
        "reap.before_commit",
        "reap.after_commit",
        "cancel.before_commit",
        "cancel.after_commit",
        "deploy.before_commit",
        "migrate.revision",
        "migrate.after_upgrade",
        "upload.before_rename",
        "upload.after_rename",
    }
)
VARIABLE = "TUNESMITH_CRASHPOINT"


def _parse(text: str) -> dict[str, int]:
    wanted: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        name, _, count = part.partition(":")
        if name not in POINTS:
            raise ValueError(f"{VARIABLE}: there is no crash point {name!r}")
        wanted[name] = int(count or 1)
    return wanted


_wanted = _parse(os.environ.get(VARIABLE, ""))
_seen: Counter[str] = Counter()
_lock = threading.Lock()


def _count(name: str) -> None:
    with _lock:
        _seen[name] += 1
        if _seen[name] == _wanted.get(name):
            os.kill(os.getpid(), signal.SIGKILL)


def _nothing(name: str) -> None:
    """What a process without the variable calls."""


reached = _count if _wanted else _nothing
