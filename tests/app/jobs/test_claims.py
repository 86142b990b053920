"""Who gets which slots: what fits, several GPUs, shared and reserved ones, the fair share. On every database."""

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select, update

from app.db import Database
from app.jobs import claims
from app.models import Job, Slot, Worker, now
from tests.conftest import BACKENDS
from tests.machines import Machine

Add = Callable[..., str]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_memory_that_a_gpu_must_have(machine: Any, train: Add) -> None:
    worker = machine()
    worker.slot("gpu-0", gpu=0, vram_gb=24.0)
    worker.slot("gpu-1", gpu=1, vram_gb=85.9)
    worker.slot("gpu-2", gpu=2)
    worker.slot("train-0", "train")
    large, small = train(min_vram_gb=80), train()
    assert worker.ask("gpu-0") == small
    assert worker.ask("gpu-2") is None  # nobody knows what it has
    assert worker.ask("train-0") is None
    assert worker.ask("gpu-1") == large
    assert train(min_vram_gb=24)
    assert worker.ask("gpu-2") is None


def test_without_a_gpu_jobs_of_one_gpu_or_none_run_on_the_cpu(machine: Any, train: Add) -> None:
    worker = machine()
    worker.slot("train-0", "train")
    worker.slot("train-1", "train")
    first, second = train(gpus=1), train(gpus=0)
    assert (worker.ask("train-0"), worker.ask("train-1")) == (first, second)


@pytest.mark.parametrize("slot", ["gpu", "train"])
def test_a_job_of_two_takes_both_slots_and_gives_both_back(
    machine: Any, train: Add, slot: str, history: Any, row: Callable[[str], Job]
) -> None:
    worker = machine()
    for number in range(3):
        worker.slot(f"{slot}-{number}", slot, **({"gpu": number, "vram_gb": 80} if slot == "gpu" else {}))
    pair, single, late = train(gpus=2), train(), train()
    assert worker.ask(f"{slot}-1") == pair
    assert worker.held() == {f"{slot}-0": pair, f"{slot}-1": pair, f"{slot}-2": None}
    assert row(pair).slot_id == f"{slot}-1"
    assert worker.ask(f"{slot}-0") is None  # its thread has nothing to do while the slot is taken
    assert worker.ask(f"{slot}-2") == single
    worker.end(pair)
    assert worker.held() == {f"{slot}-0": None, f"{slot}-1": None, f"{slot}-2": single}
    assert worker.ask(f"{slot}-0") == late
    assert history(pair)[1].data["slots"] == [f"{slot}-1", f"{slot}-0"]


def test_the_slots_of_a_job_have_its_fence(machine: Any, train: Add, database: Database) -> None:
    worker = machine(gpus=2)
    pair = train(gpus=2, fence=7)
    assert worker.ask("gpu-0") == pair
    with database.read() as session:
        job = session.get_one(Job, pair)
        assert [slot.slot_id for slot in claims.slots_of(session, job)] == ["gpu-0", "gpu-1"]
        assert {slot.fence for slot in session.scalars(select(Slot))} == {8}


def test_a_large_job_is_not_overtaken_for_ever(machine: Any, train: Add) -> None:
    """While it is next, what becomes free stays free for it."""
    worker = machine(gpus=3)
    small = [train(), train(), train()]
    assert [worker.ask(f"gpu-{number}") for number in range(3)] == small
    large = train(gpus=3)
    crowd = [train() for _ in range(5)]
    for number, job_id in enumerate(small):
        worker.end(job_id)
        started = [worker.ask(f"gpu-{other}") for other in range(number + 1)]
        assert not set(crowd) & set(started)
    assert set(worker.held().values()) == {large}


def test_only_the_slots_of_one_worker_are_kept(machine: Any, train: Add) -> None:
    """The one with the most idle devices; on the others life goes on."""
    near, far = machine("near", gpus=4), machine("far", gpus=2)
    busy = [train(), train(), train()]
    assert [near.ask("gpu-0"), near.ask("gpu-1"), far.ask("gpu-0")] == busy
    large = train(gpus=4)
    small = train()
    assert near.ask("gpu-2") is None
    assert far.ask("gpu-1") == small
    near.end(busy[0])
    near.end(busy[1])
    assert near.ask("gpu-3") == large


def test_what_cannot_be_kept_is_not(machine: Any, train: Add) -> None:
    """A slot that the large job could not use, or that no worker has enough of, does not wait for it."""
    worker = machine(gpus=2)
    worker.slot("gpu-9", gpu=9, vram_gb=10)
    first = train()
    assert worker.ask("gpu-0") == first
    train(gpus=2, min_vram_gb=40)
    train(gpus=9)
    small = train()
    assert worker.ask("gpu-1") is None
    assert worker.ask("gpu-9") == small


def test_a_dead_worker_is_not_waited_for(machine: Any, train: Add, database: Database) -> None:
    dead, worker = machine("dead", gpus=4), machine("w", gpus=2)
    first = train()
    assert worker.ask("gpu-0") == first
    train(gpus=2)
    small = train()
    assert worker.ask("gpu-1") == small  # the other one has room at once
    worker.end(small)
    with database.write() as session:
        session.execute(update(Worker).where(Worker.id == dead.name).values(seen_at=now() - timedelta(minutes=5)))
    train()
    assert worker.ask("gpu-1") is None


# Shared GPUs


def test_two_jobs_share_a_gpu_when_their_estimates_fit(machine: Any, train: Add) -> None:
    worker = machine(gpus=1, share=3, vram=80)
    one, two, much, three = train(memory_gb=30), train(memory_gb=30), train(memory_gb=13), train(memory_gb=12)
    assert worker.ask("gpu-0.1") == one
    assert worker.ask("gpu-0.0") == two
    assert worker.ask("gpu-0.2") is None  # 73 is more than 0.9 of 80, and nobody overtakes the one who waits for it
    worker.end(two)
    assert worker.ask("gpu-0.2") == much
    assert worker.ask("gpu-0.0") == three


@pytest.mark.parametrize("first", [{"memory_gb": 10}, {"memory_gb": None}, {"memory_gb": 10, "slot_class": "serve"}])
def test_without_an_estimate_a_job_has_its_gpu_alone(machine: Any, train: Add, first: dict[str, Any]) -> None:
    worker = machine(gpus=1, share=2)
    first_id = train(**first)
    assert worker.ask("gpu-0.0") == first_id
    alone = first != {"memory_gb": 10}
    assert list(worker.held().values()) == [first_id, first_id if alone else None]
    lonely = train()
    late = train(memory_gb=10)
    assert worker.ask("gpu-0.1") is None
    worker.end(first_id)
    assert worker.ask("gpu-0.1") == lonely
    assert set(worker.held().values()) == {lonely}
    worker.end(lonely)
    assert worker.ask("gpu-0.0") == late


def test_several_gpus_are_taken_whole(machine: Any, train: Add) -> None:
    worker = machine(gpus=2, share=2)
    shares = train(memory_gb=10)
    assert worker.ask("gpu-1.0") == shares
    pair, late = train(gpus=2, memory_gb=10), train(memory_gb=1)
    assert worker.ask("gpu-0.0") is None
    assert worker.ask("gpu-1.1") is None
    worker.end(shares)
    assert worker.ask("gpu-0.1") == pair
    assert set(worker.held().values()) == {pair}
    worker.end(pair)
    assert worker.ask("gpu-0.0") == late


def test_a_gpu_of_unknown_size_is_not_shared(machine: Any, train: Add) -> None:
    worker = machine(gpus=1, share=2, vram=None)
    first = train(memory_gb=1)
    assert worker.ask("gpu-0.0") == first
    train(memory_gb=1)
    assert worker.ask("gpu-0.1") is None


# Reserved slots


def test_a_reserved_gpu_is_for_engines_which_take_it_first(machine: Any, train: Add) -> None:
    worker = machine(gpus=2)
    worker.slot("gpu-2", gpu=2, vram_gb=80, reserved=True)
    engine, run, second = train(slot_class="serve"), train(), train(slot_class="serve")
    assert worker.ask("gpu-0") == run  # the engine has a place of its own
    assert worker.ask("gpu-2") == engine
    assert worker.ask("gpu-1") == second
    worker.end(engine)
    train()
    assert worker.ask("gpu-2") is None


# The fair share


def test_the_fair_share_counts_slots(machine: Any, train: Add) -> None:
    worker = machine(gpus=6)
    wide = train(project_id="a", gpus=3)
    many = [train(project_id="b"), train(project_id="b")]
    assert worker.ask("gpu-0") == wide
    assert [worker.ask("gpu-3"), worker.ask("gpu-4")] == many
    more_a, more_b = train(project_id="a"), train(project_id="b")
    assert worker.ask("gpu-5") == more_b  # two slots against three, though two jobs against one
    worker.end(wide)
    assert worker.ask("gpu-0") == more_a


def test_three_projects_take_turns_first_in_first_out(machine: Any, train: Add, database: Database) -> None:
    worker = machine(gpus=9)
    jobs = {train(project_id=project): project for project in "aaaabbbbc"}
    ids = list(jobs)
    with database.read() as session:
        rows = list(session.scalars(select(Job)))
        foretold = claims.queue_positions(session, rows)
    started = [worker.ask(f"gpu-{number}") for number in range(9)]
    assert [jobs[str(job_id)] for job_id in started] == list("abcababab")
    assert [job_id for job_id in started if jobs[str(job_id)] == "a"] == ids[:4]
    assert [foretold[str(job_id)] for job_id in started] == list(range(1, 10))


def test_light_jobs_take_one_slot_whatever_they_say(machine: Any, add: Add) -> None:
    """What is fetched and tokenised for a run of four GPUs needs none of them."""
    worker = machine()
    worker.slot("light-0", "light")
    worker.slot("light-1", "light")
    first = add(gpus=4, min_vram_gb=80)
    second = add(created_at=now() + timedelta(seconds=1))
    assert (worker.ask("light-0"), worker.ask("light-1")) == (first, second)


# Places in the queue


def test_places_follow_the_claims(machine: Any, train: Add, database: Database) -> None:
    """With projects that are busy already, priorities, and jobs of several GPUs."""
    worker = machine(gpus=12)
    running = [train(project_id="a", gpus=2), train(project_id="b")]
    assert [worker.ask("gpu-0"), worker.ask("gpu-2")] == running
    for project, columns in [
        ("a", {}),
        ("a", {"priority": 5}),
        ("b", {"gpus": 3}),
        ("b", {}),
        ("c", {}),
        ("c", {"slot_class": "serve"}),
    ]:
        train(project_id=project, **columns)
    train(project_id="c", hold_reason="no_capacity", gpus=99)
    train(project_id="c", not_before=now() + timedelta(hours=1))
    with database.read() as session:
        foretold = claims.queue_positions(session, list(session.scalars(select(Job))))
    started = [job_id for number in range(12) if (job_id := worker.ask(f"gpu-{number}"))]
    assert len(started) == 6
    assert [foretold[job_id] for job_id in started] == list(range(1, 7))
    assert len(foretold) == 6


def test_a_job_that_was_made_room_for_goes_first(machine: Any, train: Add, database: Database) -> None:
    worker = machine(gpus=4)
    mine = [train(project_id="a") for _ in range(3)]
    assert [worker.ask(f"gpu-{number}") for number in range(3)] == mine
    left = train(project_id="b")
    urgent = train(project_id="a", priority=9)
    with database.write() as session:
        session.get_one(Job, left).preempt_for = urgent
    with database.read() as session:
        assert claims.queue_positions(session, list(session.scalars(select(Job)))) == {urgent: 1, left: 2}
    assert worker.ask("gpu-3") == urgent
    worker.end(mine[0])
    assert worker.ask("gpu-0") == left
    with database.read() as session:
        assert session.get_one(Job, left).preempt_for is None


def test_threads_of_two_workers_never_have_a_slot_twice(
    machine: Any, train: Add, database: Database, history: Any
) -> None:
    """Eight threads, jobs of one, two and three GPUs: each job has its slots, all are run, nobody waits for ever."""
    workers = [machine(name, gpus=4) for name in ("a", "b")]
    ids = [train(gpus=1 + number % 3, project_id=f"p{number % 4}") for number in range(24)]
    faults: list[str] = []
    left = set(ids)

    def serve(worker: Machine, slot_id: str) -> None:
        while left and not faults:
            job_id = worker.ask(slot_id)
            if job_id is None:
                time.sleep(0.005)
                continue
            with database.read() as session:
                job = session.get_one(Job, job_id)
                slots = claims.slots_of(session, job)
            if len(slots) != job.gpus or slots[0].slot_id != slot_id:
                faults.append(f"{job_id} of {job.gpus} has {[slot.slot_id for slot in slots]}")
            worker.end(job_id)
            left.discard(job_id)

    threads = [threading.Thread(target=serve, args=(worker, f"gpu-{gpu}")) for worker in workers for gpu in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not faults
    assert not left
    assert not any(job_id for worker in workers for job_id in worker.held().values())
    for job_id in ids:
        assert [event.code for event in history(job_id)] == ["job_queued", "job_started", "x"]
