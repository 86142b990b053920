"""A replica whose engine sleeps does not take it for dead."""

import json
import time

import pytest

from tests.workers.test_replica import Attempt, attempt, wait_for  # noqa: F401
from workers.replica import UnixConnection


def post(attempt: Attempt, path: str) -> int:  # noqa: F811
    """The status of a request to the engine."""
    connection = UnixConnection(str(attempt.socket), 5)
    connection.request("POST", path, "{}")
    status = connection.getresponse().status
    connection.close()
    return status


def completions(attempt: Attempt) -> int:  # noqa: F811
    """How many the engine was asked for."""
    lines = (attempt.directory / "requests").read_text().splitlines()
    return sum(json.loads(line).get("path") == "/v1/completions" for line in lines)


def test_an_engine_that_sleeps_is_left_alone_and_wakes(attempt: Attempt) -> None:  # noqa: F811
    """Also what it was asked just before, and what takes longer than an engine may be busy."""
    attempt.prepare("ok", sleep_mode=True, probe_timeout=0.1, busy_seconds=0.5).start().reach("ready")
    asked = completions(attempt)
    assert post(attempt, "/sleep?level=1&mode=wait") == 200
    time.sleep(2)
    assert completions(attempt) <= asked + 3, "at most those on their way"
    assert post(attempt, "/wake_up") == 200
    woken = completions(attempt)
    wait_for(lambda: completions(attempt) > woken + 3)
    assert [line["status"] for line in attempt.statuses()] == ["starting", "ready"]


@pytest.mark.parametrize("mode", ["hangs"])
def test_one_that_could_sleep_and_hangs_is_killed(attempt: Attempt, mode: str) -> None:  # noqa: F811
    attempt.prepare(mode, sleep_mode=True, probe_timeout=0.2).start()
    assert attempt.exit_status() == 1
    assert attempt.reach("failed")["reason"] == "unresponsive"
