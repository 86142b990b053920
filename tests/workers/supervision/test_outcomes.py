"""How attempts end, and what follows: limits, silence, exit statuses, results that cannot be read."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.jobs import room
from app.models import Job, JobEvent
from app.processes import processes_with_token
from tests.support import wait_for
from tests.workers.supervision.conftest import Attempt, claim
from workers.context import ATTEMPT
from workers.outcome import lineage
from workers.supervisor import House


def test_a_run_that_says_nothing_is_ended_and_tried_again(start: Callable[..., Attempt], house: House) -> None:
    attempt = start("hang", more={"limits": {"stall_seconds": 1.0}})
    job = attempt.end()
    assert (job.state, job.attempt, job.stuck) == ("queued", 1, 1)
    assert attempt.codes()[-1] == "stalled"
    job = claim(house).end()
    assert (job.state, job.error_code) == ("failed", "stalled")


@pytest.mark.fault
def test_a_frozen_runner_counts_as_silent(start: Callable[..., Attempt]) -> None:
    """Case 10 of the fault campaign."""
    attempt = start("ticks", more={"limits": {"stall_seconds": 3.0}})
    os.kill(attempt.runner(), signal.SIGSTOP)
    job = attempt.end()
    assert (job.state, job.exit_code) == ("queued", -9)
    assert attempt.codes()[-1] == "stalled"


def test_a_run_that_ticks_is_left_alone(start: Callable[..., Attempt], house: House) -> None:
    attempt = start("ticks", more={"limits": {"stall_seconds": 3.0}})  # more than a busy machine keeps it from a tick
    attempt.runner()
    assert wait_for(lambda: attempt.row().run_seconds > 6 or attempt.row().state != "running", 40)
    assert attempt.row().state == "running"
    house.stopping.set()
    assert attempt.end().state == "queued"


def test_time_in_slots_is_limited_over_all_attempts(start: Callable[..., Attempt], house: House) -> None:
    attempt = start("ticks", wall_seconds=3.0, run_seconds=2.0)
    job = attempt.end()
    assert (job.state, job.error_code) == ("failed", "wall_time_exceeded")
    assert 3.0 <= job.run_seconds < 20
    assert job.error_detail is not None
    assert "limits.wall_seconds" in job.error_detail["hint"]


@pytest.mark.parametrize(
    ("status", "code"), [(65, "bad_data"), (66, "non_finite_loss"), (69, "oom"), (77, "gated_model"), (78, "bad_spec")]
)
def test_statuses_that_say_what_is_wrong_are_final(start: Callable[..., Attempt], status: int, code: str) -> None:
    job = start("exit", more={"status": status}).end()
    assert (job.state, job.error_code, job.exit_code, job.attempt) == ("failed", code, status, 1)


def test_a_full_disk_is_a_hold_and_costs_no_attempt(start: Callable[..., Attempt]) -> None:
    attempt = start("exit", more={"status": 74})
    job = attempt.end()
    assert (job.state, job.hold_reason, job.attempt, job.exit_code) == ("queued", "disk_full", 0, 74)
    assert attempt.codes()[-1] == "hold_disk_full"


@pytest.mark.parametrize(("allowed", "state"), [([3, 4], "queued"), ([5], "failed")])
def test_only_the_statuses_that_the_spec_names_are_tried_again(
    start: Callable[..., Attempt],
    allowed: list[int],
    state: str,
) -> None:
    job = start("exit", more={"status": 3, "retry": {"exit_codes": allowed, "backoff_seconds": 2.0}}).end()
    assert job.state == state
    assert job.delay_seconds == (2.0 if state == "queued" else 0.0)


def test_two_crashes_without_a_step_gained_are_a_loop(start: Callable[..., Attempt], house: House) -> None:
    assert start("crash").end().state == "queued"
    job = claim(house).end()
    assert (job.state, job.error_code, job.attempt) == ("failed", "crash_loop", 2)
    assert job.error_detail is not None
    assert "about to crash" in job.error_detail["hint"]


def test_a_result_that_cannot_be_read_is_said_at_once(start: Callable[..., Attempt]) -> None:
    job = start("bad_result").end()
    assert (job.state, job.error_code) == ("failed", "protocol")


def test_a_runner_ends_itself_when_its_supervisor_falls_silent(
    start: Callable[..., Attempt],
    house: House,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As when the worker is stopped with SIGSTOP: it lives, its threads do not tick."""
    patience = 2 * house.settings.lease_seconds

    def mute(*_: Any) -> None:
        """No tick."""

    monkeypatch.setattr("workers.child.Child._tick", mute)
    monkeypatch.setattr("workers.child.SILENCE", "TUNESMITH_NO_SUCH_VARIABLE")
    monkeypatch.setenv("TUNESMITH_SILENCE", "1.0")
    monkeypatch.setattr("workers.child.PASSED_ON", ("PATH", "TUNESMITH_SILENCE"))
    attempt = start("hang")
    attempt.runner()
    job = attempt.end()
    assert patience > 1.0
    assert (job.state, job.exit_code) in (("queued", -9), ("queued", 70))
    assert processes_with_token(attempt.token) == []


def test_a_job_that_does_not_fit_on_the_disk_is_held_before_it_starts(
    start: Callable[..., Attempt], house: House
) -> None:
    object.__setattr__(house, "settings", house.settings.model_copy(update={"disk_reserve_bytes": 1 << 60}))
    attempt = start("ok")
    job = attempt.end()
    assert (job.state, job.hold_reason, job.attempt) == ("queued", "disk_full", 0)
    assert not attempt.folder.exists()
    with house.database.write() as session:
        assert room.release(session, house.settings) == 0
        assert room.release(session, house.settings.model_copy(update={"disk_reserve_bytes": 0})) == 0, (
            "as it was asked"
        )
        session.get_one(JobEvent, (job.id, job.next_seq)).data = {"needed_bytes": 1}
    with house.database.write() as session:
        assert room.release(session, house.settings) == 1
    assert attempt.row().hold_reason is None


_ROOT = {"pinned": "hub:org/tiny@c"}
_OTHER = {"pinned": "artifact:art-other", "base_chain": []}
_ADAPTER = {"pinned": "artifact:art-a", "base_chain": ["hub:org/tiny@c", "sft:ftjob-a"]}
_FOREIGN = {"pinned": "artifact:art-f", "base_chain": []}
_MERGED = {"pinned": "artifact:art-m", "base_chain": ["hub:org/tiny@c", "sft:ftjob-1"]}
_ON_MERGED = {"pinned": "artifact:art-b", "base_chain": ["hub:org/tiny@c", "sft:ftjob-1", "sft:ftjob-b"]}


@pytest.mark.parametrize(
    ("inputs", "chain"),
    [
        ({"adapter": _ADAPTER, "adapter.base": _ROOT, "base_model": _ROOT}, ["hub:org/tiny@c", "sft:ftjob-a"]),
        ({"adapter": _ADAPTER, "adapter.base": _ROOT, "base_model": _OTHER}, ["artifact:art-other", "sft:ftjob-a"]),
        ({"adapter": _FOREIGN, "base_model": _ROOT}, ["hub:org/tiny@c", "artifact:art-f"]),
        (
            {"adapter": _ON_MERGED, "adapter.base": _MERGED, "base_model": _MERGED},
            ["hub:org/tiny@c", "sft:ftjob-1", "sft:ftjob-b"],
        ),
        (
            {"adapter": _ON_MERGED, "adapter.base": _MERGED, "base_model": _OTHER},
            ["artifact:art-other", "sft:ftjob-b"],
        ),
        (
            {
                "adapters.0": _ADAPTER,
                "adapters.0.base": _ROOT,
                "adapters.1": _FOREIGN,
                "base_model": _OTHER,
            },
            ["artifact:art-other", "sft:ftjob-a", "artifact:art-f"],
        ),
        (
            {"models.0": _MERGED, "models.1": _OTHER, "base_model": _ROOT},
            ["hub:org/tiny@c", "sft:ftjob-1", "artifact:art-other"],
        ),
        ({"models.0": _MERGED, "models.1": _OTHER}, ["hub:org/tiny@c", "sft:ftjob-1", "artifact:art-other"]),
    ],
)
def test_a_merge_is_made_from_the_base_that_it_took(tmp_path: Path, inputs: dict[str, Any], chain: list[str]) -> None:
    (tmp_path / ATTEMPT).write_text(json.dumps({"inputs": inputs}))
    assert lineage(Job(id="job-1", type="merge"), tmp_path) == {"base_chain": chain}
