"""Spare runners: taken once, found by their attempt's token, gone with their worker, never in the way."""

import os
import signal
from collections.abc import Callable, Iterator

import pytest

from app.processes import processes_of_instance, processes_with_token
from tests.support import wait_for
from tests.workers.supervision.conftest import Attempt, backend, house, start
from workers.child import environment
from workers.supervisor import House
from workers.warm import Spares

__all__ = ["backend", "house", "start"]  # fixtures


@pytest.fixture
def spares(house: House, monkeypatch: pytest.MonkeyPatch) -> Iterator[Spares]:
    """One spare that is ready; its libraries are few, so that this takes a moment."""
    spares = Spares(house.settings.instance, environment(house.settings, None), 1)
    object.__setattr__(house, "spares", spares)
    spares.start()
    wait_for(lambda: spares.ready() == 1, 60)
    yield spares
    spares.stop()


def test_an_attempt_takes_the_spare_and_wears_its_token(
    house: House, spares: Spares, start: Callable[..., Attempt]
) -> None:
    (waiting,) = processes_of_instance(house.settings.instance)
    attempt = start("saves_itself")
    pid = attempt.runner()
    assert pid == waiting
    assert processes_with_token(attempt.token) == [pid]
    # The next one gets a new one: no runner is used twice.
    assert wait_for(lambda: [other for other in processes_of_instance(house.settings.instance) if other != pid], 20)
    house.stopping.set()
    assert attempt.end().exit_code == 75


def test_what_it_prints_goes_into_its_attempts_log(spares: Spares, start: Callable[..., Attempt]) -> None:
    attempt = start("crash")
    assert attempt.end().exit_code == 9
    assert "about to crash" in (attempt.folder / "log.txt").read_text()


def test_a_spare_that_died_is_not_missed(house: House, spares: Spares, start: Callable[..., Attempt]) -> None:
    (waiting,) = processes_of_instance(house.settings.instance)
    os.kill(waiting, signal.SIGSTOP)
    spare = spares.take()
    assert spare is not None
    os.kill(waiting, signal.SIGKILL)
    os.kill(waiting, signal.SIGCONT)
    wait_for(lambda: spare.process.poll() is not None)
    spares._spares.append(spare)  # as if it had died between the look and the taking
    attempt = start("ok")
    assert attempt.end().state == "succeeded"


def test_a_killed_runner_that_was_a_spare_is_seen_at_once(
    house: House, spares: Spares, start: Callable[..., Attempt]
) -> None:
    attempt = start("hang")
    os.kill(attempt.runner(), signal.SIGKILL)
    job = attempt.end(5)
    assert (job.state, job.exit_code) == ("queued", -9)


def test_spares_end_with_their_worker(house: House, spares: Spares) -> None:
    spares.stop()
    assert processes_of_instance(house.settings.instance) == []
