"""A runner without a network: what reads a foreign file must not be able to tell anybody.

A network namespace of its own holds no interface but a loopback that is down: no host, no name server, not even
``127.0.0.1`` is reached. Sockets that are files (Redis, PostgreSQL) are reached by path as before; their doors are the
rights of those files. Linux; where the machine does not allow it (a container without ``CAP_SYS_ADMIN`` whose seccomp
profile forbids user namespaces) the run goes on with the network, and its result says so.
"""

import contextlib
import ctypes
import os
import sys
from pathlib import Path
from typing import Literal

Network = Literal["none", "open"]
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000
_SELF = Path("/proc/self")


def leave_network() -> Network:
    """Takes the network from this process and from all that it starts; "open" where the machine does not allow it.

    Call it before the first thread: threads that live already keep the network, and a user namespace is refused.
    """
    if sys.platform != "linux":
        return "open"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) == 0:  # root: its rights on files stay as they are
        return "none"
    user, group = os.geteuid(), os.getegid()
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) != 0:
        return "open"
    # Without a map we would be nobody in our own eyes; on the disk we are who we were in any case.
    with contextlib.suppress(OSError):
        (_SELF / "setgroups").write_text("deny")
        (_SELF / "uid_map").write_text(f"{user} {user} 1")
        (_SELF / "gid_map").write_text(f"{group} {group} 1")
    return "none"
