"""The broker is away, silent, slow or emptied, doorbells are lost and repeated: jobs are taken, and run once."""

import contextlib
import os
import signal
import sqlite3
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from app.models import Job
from app.settings import Settings
from tests.faults.conftest import WorkerProcess
from tests.faults.proxy import Proxy
from tests.faults.submitter import Submitter
from tests.faults.timeline import Timeline
from tests.faults.valkey import Valkey
from tests.support import on_sqlite, wait_for

pytestmark = [pytest.mark.fault, on_sqlite]
ApiOn = Callable[[str], Submitter]
Until = Callable[..., Job]
POSTS = 200


@pytest.mark.parametrize(
    "fault", ["down", pytest.param("silent", marks=pytest.mark.long), pytest.param("slow", marks=pytest.mark.long)]
)
def test_a_post_does_not_wait_for_the_broker(
    fault: str,
    broker: Valkey,
    proxy: Proxy,
    proxy_url: str,
    api_on: ApiOn,
    timeline: Timeline,
    after_the_fault: None,
) -> None:
    """Cases 23 and 24, and answers that come 5 s late. And as soon as the broker is well, it is rung again."""
    if fault == "down":
        broker.kill()
    proxy.silent = fault == "silent"
    proxy.delay = 5.0 if fault == "slow" else 0.0
    api = api_on(broker.url if fault == "down" else proxy_url)
    wait_for(lambda: api.degraded() == ["broker is unreachable"], 10)
    took = []
    for _ in range(POSTS):
        begun = time.monotonic()
        api.post()
        took.append(1000 * (time.monotonic() - begun))
    assert api.degraded() == ["broker is unreachable"]
    timeline.say(f"median {statistics.median(took):.1f} ms, worst {max(took):.1f} ms")
    timeline.bound(
        "P2", f"POST with the broker {fault}, p99 of {POSTS}", sorted(took)[-POSTS // 100 - 1], at_most=300, unit="ms"
    )
    if fault == "down":
        broker.start()
    proxy.silent, proxy.delay = False, 0.0
    with timeline.within("P2", f"rings again after the broker was {fault}", 20):
        api.post()
        wait_for(lambda: broker.waiting() and not api.degraded(), 20)


def test_lost_and_repeated_doorbells_resets_and_half_open_connections(
    broker: Valkey,
    proxy: Proxy,
    proxy_url: str,
    api_on: ApiOn,
    worker: WorkerProcess,
    once: Callable[..., None],
    until: Until,
    timeline: Timeline,
) -> None:
    """Cases 28, 27 and 31, one after the other, without a restart of the worker."""
    api = api_on(proxy_url)
    first = api.post()
    bell = broker.doorbell()
    worker.start(TUNESMITH_BROKER_URL=proxy_url, TUNESMITH_SLOTS="train:1")
    once(api, first)
    broker.heard(bell, 10)

    proxy.copies, proxy.doorbells = 10, 0
    jobs = [api.post() for _ in range(3)]
    once(api, *jobs)
    assert proxy.doorbells > 0
    timeline.say(f"{proxy.doorbells} doorbells, each delivered ten times, for 3 jobs")
    wait_for(lambda: not broker.waiting(), 10)

    proxy.copies, proxy.doorbells = 0, 0
    begun = time.monotonic()
    lost = api.post()
    until(lost, "running", "succeeded")
    timeline.bound("P3", "a job starts with every doorbell lost", time.monotonic() - begun, at_most=20)
    assert proxy.doorbells > 0
    once(api, lost)
    proxy.copies = 1

    timeline.say(f"{_resets(proxy, seconds=2)} connections were reset")
    with timeline.within("P3", "the worker hears again after resets", 30):
        broker.heard(bell, 30)

    assert proxy.freeze() > 0
    with timeline.within("P3", "the worker hears again after half-open connections", 30):
        time.sleep(1.1)  # what the broker sent just before has run out
        broker.heard(bell, 30)
    worker.ends_well(broker.password)


def _resets(proxy: Proxy, seconds: float) -> int:
    """RST for every connection every 300 ms; how many there were."""
    found, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        found += proxy.reset()
        time.sleep(0.3)
    return found


@pytest.mark.long
def test_a_minute_of_resets_and_answers_that_come_late(
    broker: Valkey,
    proxy: Proxy,
    proxy_url: str,
    api_on: ApiOn,
    worker: WorkerProcess,
    once: Callable[..., None],
    until: Until,
    timeline: Timeline,
) -> None:
    """Cases 27 and 31, the long form: 60 s of resets, a minute of answers that are 5 s late, 10 jobs without a bell."""
    api = api_on(proxy_url)
    first = api.post()
    bell = broker.doorbell()
    worker.start(TUNESMITH_BROKER_URL=proxy_url, TUNESMITH_SLOTS="train:1")
    once(api, first)

    jobs = [api.post(seconds=1) for _ in range(5)]
    timeline.say(f"{_resets(proxy, seconds=60)} connections were reset")
    with timeline.within("P3", "the worker hears again after a minute of resets", 30):
        broker.heard(bell, 30)
    once(api, *jobs)

    proxy.delay = 5.0
    late = api.post()
    once(api, late)
    time.sleep(60)
    proxy.delay = 0.0
    with timeline.within("P3", "the worker hears again after a minute of answers 5 s late", 30):
        broker.heard(bell, 30)

    proxy.copies = 0
    waits = []
    for _ in range(10):
        begun = time.monotonic()
        job_id = api.post()
        until(job_id, "running", "succeeded")
        waits.append(time.monotonic() - begun)
        once(api, job_id)
    timeline.bound("P3", "the longest of 10 waits with every doorbell lost", max(waits), at_most=20)
    worker.ends_well(broker.password)


@pytest.mark.parametrize("queued", [8, pytest.param(20, marks=pytest.mark.long)])
def test_a_broker_that_comes_back_empty_and_is_emptied_again(
    broker: Valkey,
    api_on: ApiOn,
    worker: WorkerProcess,
    once: Callable[..., None],
    until: Until,
    timeline: Timeline,
    tmp_path: Path,
    queued: int,
) -> None:
    """Cases 25 and 26: kill -9 with jobs queued and one running, and FLUSHALL when half of them are done."""
    api = api_on(broker.url)
    release = tmp_path / "release"
    running = api.post(until=str(release))
    worker.start(TUNESMITH_BROKER_URL=broker.url, TUNESMITH_SLOTS="train:2")
    wait_for(lambda: api.started(running), 40)
    jobs = [api.post() for _ in range(queued)]
    until(jobs[queued // 8], "succeeded")
    broker.kill(forget=True)
    timeline.say("the broker was killed")
    until(jobs[queued // 4], "succeeded")
    broker.start()
    timeline.say("it is back, empty")
    until(jobs[queued // 2 - 1], "succeeded")
    broker.client.flushall()
    timeline.say("FLUSHALL")
    once(api, *jobs)
    assert until(running, "running").fence == 1
    release.touch()
    once(api, running)
    timeline.count("P3", "jobs that ran once although the broker lost everything, twice", queued + 1, of=queued + 1)
    worker.ends_well(broker.password)


def test_a_doorbell_that_dies_in_a_worker(
    broker: Valkey,
    api_on: ApiOn,
    worker: WorkerProcess,
    once: Callable[..., None],
    timeline: Timeline,
) -> None:
    """Case 29. SIGSTOP, publish, kill -9: the message is nowhere any more, the job runs."""
    api = api_on(broker.url)
    first = api.post()
    worker.start(TUNESMITH_BROKER_URL=broker.url, TUNESMITH_SLOTS="train:1")
    once(api, first)
    lost = wait_for(lambda: _swallowed(worker, broker, api), 60)
    worker.kill()
    assert (broker.waiting(), broker.client.hlen("unacked")) == (0, 0)
    begun = time.monotonic()
    worker.start(TUNESMITH_BROKER_URL=broker.url, TUNESMITH_SLOTS="train:1")
    once(api, lost)
    timeline.bound("P3", "worker started → the job is done whose doorbell died", time.monotonic() - begun, at_most=20)
    worker.ends_well(broker.password)


def _swallowed(worker: WorkerProcess, broker: Valkey, api: Submitter) -> str | None:
    """Freezes the worker while it listens, and submits a job: its doorbell went to the frozen one. Else None."""
    os.kill(worker.pid, signal.SIGSTOP)
    if broker.listened_to() and _may_write(api):
        job_id = api.post()
        with contextlib.suppress(AssertionError):
            wait_for(lambda: not broker.listened_to() and not broker.waiting(), 0.5)
            return job_id
    os.kill(worker.pid, signal.SIGCONT)
    return None


def _may_write(api: Submitter) -> bool:
    """False while a frozen process holds SQLite's lock."""
    connection = sqlite3.connect(str(api.database.engine.url.database), timeout=0)
    try:
        connection.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError:
        return False
    finally:
        connection.close()
    return True


IMPATIENT = """
import workers.main as main
from app.settings import Settings
make = main.make_celery
def impatient(url):
    celery = make(url)
    celery.conf.broker_transport_options["visibility_timeout"] = 2
    celery.conf.broker_transport_options["unacked_restore_interval"] = 1
    return celery
main.make_celery = impatient
settings = Settings()
raise SystemExit(main.run(settings, settings.broker_url))
"""


class ImpatientWorker(WorkerProcess):
    """Its messages are delivered again after 2 s without an acknowledgement, not after an hour."""

    command = (sys.executable, "-I", "-c", IMPATIENT)


@pytest.mark.parametrize("seconds", [5, pytest.param(30, marks=pytest.mark.long)])
def test_three_workers_and_a_visibility_timeout_far_shorter_than_the_job(
    seconds: float,
    broker: Valkey,
    api_on: ApiOn,
    settings: Settings,
    once: Callable[..., None],
    tmp_path: Path,
    after_the_fault: None,
) -> None:
    """Case 30. Two of the three could run it; one does, once."""
    workers = [ImpatientWorker(settings, broker.url, tmp_path / f"{slots[:5]}.log") for slots in PLACES]
    try:
        for impatient, slots in zip(workers, PLACES, strict=True):
            impatient.start(TUNESMITH_SLOTS=slots)
        api = api_on(broker.url)
        wait_for(lambda: api.workers() == 3, 40)
        once(api, api.post(seconds=seconds))
        assert [impatient.stop() for impatient in workers] == [0, 0, 0]
    finally:
        for impatient in workers:
            if impatient.process is not None and impatient.process.poll() is None:
                impatient.kill()


PLACES = ("train:1", "gpu:1", "light:1")
