"""A runner that needs no network has none, where the machine allows it; else its result says so."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from unittest.mock import Mock

import pytest

from app.catalog import Catalog
from app.models import Job
from tests.workers.supervision.conftest import Attempt
from workers import isolation
from workers.child import goes_offline
from workers.operations import import_model, merge
from workers.supervisor import House

LEAVE = "import os; from workers.isolation import leave_network; print(leave_network(), os.getuid())"
# The last line gives it its own /proc back, which a process that was started by this user has.
OTHER = """
import ctypes, os, workers.isolation
os.setgroups([])
os.setresgid(1234, 1234, 1234)
os.setresuid(1234, 1234, 1234)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
"""
ALLOWED = "none" in subprocess.run([sys.executable, "-c", LEAVE], capture_output=True, text=True).stdout
needs_namespaces = pytest.mark.skipif(not ALLOWED, reason="this machine gives no process a network of its own")


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        yield listener


@needs_namespaces
def test_it_reaches_nobody(house: House, start: Callable[..., Attempt], listener: socket.socket) -> None:
    """A spare that waits is not taken: its threads would keep the network."""
    spares = Mock()
    object.__setattr__(house, "spares", spares)
    job = start("", more={"port": listener.getsockname()[1]}, plug="lonely").end()
    assert job.state == "succeeded", job.error_detail
    result = job.result or {}
    assert (result["network"], result["reached"], result["hub_offline"]) == ("none", False, "1")
    with pytest.raises(BlockingIOError):
        listener.accept()
    spares.take.assert_not_called()


@needs_namespaces
@pytest.mark.parametrize("root", [True, False])
def test_root_and_others_leave_the_network_and_keep_their_name_and_files(root: bool) -> None:
    if not root and os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    done = subprocess.run([sys.executable, "-c", LEAVE if root else OTHER + LEAVE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["none", str(os.geteuid() if root else 1234)]


def test_a_machine_that_refuses_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation.ctypes, "CDLL", lambda *_, **__: Mock(unshare=Mock(return_value=-1)))
    assert isolation.leave_network() == "open"


def test_only_what_has_nothing_to_fetch_goes_offline() -> None:
    catalog = Catalog(operations={"import": import_model.operation, "merge": merge.operation})
    here, there = {"path": {"path": "/models/a"}}, {"path": {"hub": "org/a"}}
    assert goes_offline(catalog, Job(type="import"), here)
    assert not goes_offline(catalog, Job(type="import"), there)
    assert not goes_offline(catalog, Job(type="merge"), here)
    assert not goes_offline(catalog, Job(type="train"), here)
