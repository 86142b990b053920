"""One card for both: an idle engine gives its GPU to a job, and wakes as the process that it was. No GPU is needed."""

import json
import os
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import select

from app.models import Job, Slot, now
from app.processes import processes_of_attempts
from tests.support import wait_for
from tests.workers.serving.asleep.conftest import Card, Garage, command

# Engines that refuse, hang, die and are killed, under a worker's own threads.
pytestmark = pytest.mark.fault

Cards = Callable[..., Card]
Train = Callable[..., str]
Until = Callable[[str, str], None]


# What goes wrong


def ends_instead(card: Card, garage: Garage, train: Train, until: Until) -> str:
    """The job gets its slot all the same, from an engine that ended; the next request starts another. Why it ended."""
    first = card.engine()
    until(train(), "succeeded")
    wait_for(card.asleep)
    assert garage.parking.homes() == {}
    assert card.engine() is None
    card.waking()
    card.ready()
    assert card.engine() != first
    assert card.asks("plain") == 200
    assert card.shown()["restarts"] == 0
    assert "engine_parked" not in card.codes()
    return card.said("engine_not_parked")


@pytest.mark.parametrize("mode", ["insomniac"])
def test_one_that_refuses_to_sleep_ends(card: Cards, garage: Garage, train: Train, until: Until) -> None:
    assert "refused to sleep: 500" in ends_instead(card(), garage, train, until)


@pytest.mark.parametrize("mode", ["clings"])
def test_one_whose_memory_is_not_freed_ends(card: Cards, garage: Garage, train: Train, until: Until) -> None:
    said = ends_instead(card(), garage, train, until)
    assert "GPU 0 used 72.0 GB before and 72.0 GB of 80.0 GB after; 10% may be used at most" in said


def test_where_the_driver_says_nothing_it_ends(card: Cards, garage: Garage, train: Train, until: Until) -> None:
    garage.driver.silent = True
    assert "nvidia-smi does not say" in ends_instead(card(), garage, train, until)


def test_without_room_for_its_weights_it_ends(card: Cards, garage: Garage, train: Train, until: Until) -> None:
    garage.host_memory = 10**9
    assert "1.0 GB of the host's memory are free" in ends_instead(card(), garage, train, until)


@pytest.mark.parametrize("mode", ["sleepy_head"])
def test_one_that_does_not_wake_is_replaced(card: Cards, train: Train, until: Until) -> None:
    deployed = card()
    first = deployed.engine()
    until(train(), "succeeded")
    wait_for(deployed.asleep)
    assert deployed.engine() == first
    deployed.waking()
    deployed.ready()
    wait_for(lambda: deployed.engine() not in (None, first))
    assert deployed.asks("plain") == 200
    assert "refused to wake: 500" in deployed.said("engine_not_woken")


def test_one_that_dies_in_its_sleep_is_replaced(card: Cards, garage: Garage, train: Train, until: Until) -> None:
    deployed = card()
    first = deployed.engine()
    until(train(), "succeeded")
    wait_for(deployed.asleep)
    assert first is not None
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: "engine_not_kept" in deployed.codes())
    assert garage.parking.homes() == {}
    assert processes_of_attempts(deployed.house.settings.instance) == []
    assert deployed.asleep()
    deployed.waking()
    deployed.ready()
    assert deployed.asks("plain") == 200


def test_when_the_host_runs_out_of_memory_it_ends(card: Cards, garage: Garage, train: Train, until: Until) -> None:
    deployed = card()
    until(train(), "succeeded")
    wait_for(deployed.asleep)
    assert deployed.engine() is not None
    garage.host_memory = 10**9
    wait_for(lambda: deployed.engine() is None)
    wait_for(lambda: "1.0 GB of the host's memory were left" in deployed.said("engine_not_kept"))
    assert deployed.asleep()


def test_when_the_worker_stops_nothing_is_left(card: Cards, garage: Garage, train: Train, until: Until) -> None:
    deployed = card()
    until(train(), "succeeded")
    wait_for(deployed.asleep)
    assert deployed.engine() is not None
    garage.close()
    assert deployed.asleep(), "the next worker starts it anew when somebody asks"


def test_one_that_sleeps_can_be_stopped(card: Cards, garage: Garage, train: Train, until: Until) -> None:
    deployed = card()
    until(train(), "succeeded")
    wait_for(deployed.asleep)
    assert deployed.api.delete(f"/deployments/{deployed.id}").status_code == 200
    wait_for(lambda: processes_of_attempts(deployed.house.settings.instance) == [])
    assert deployed.shown()["status"] == "stopped"
    assert garage.parking.homes() == {}


def test_one_that_sleeps_can_be_replaced(card: Cards, garage: Garage, train: Train, until: Until) -> None:
    deployed = card()
    first = deployed.engine()
    until(train(), "succeeded")
    wait_for(deployed.asleep)
    assert deployed.api.patch(f"/deployments/{deployed.id}", json={"max_model_len": 64}).status_code == 200
    wait_for(lambda: deployed.shown()["generation"] == 2 and deployed.shown()["status"] == "ready", 30)
    wait_for(lambda: garage.parking.homes() == {})
    wait_for(lambda: deployed.engine() not in (None, first))
    assert deployed.asks("plain") == 200


def test_a_request_that_comes_while_it_lies_down_wakes_it_before_the_job(
    card: Cards, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.keeper.ROUTES_LAST", 1.0)
    deployed = card()
    first = deployed.engine()
    job_id = train("hang")
    wait_for(lambda: deployed.shown()["status"] == "sleeping")
    deployed.waking()
    deployed.ready()
    assert deployed.engine() == first
    assert deployed.asks("plain") == 200
    assert "engine_woken" in deployed.codes()
    assert deployed.api.get(f"/jobs/{job_id}").json()["started_at"] is None
    assert deployed.api.post(f"/jobs/{job_id}/cancel").status_code in (200, 202)


def test_while_the_job_runs_requests_wait_and_then_it_goes_first(card: Cards, train: Train, until: Until) -> None:
    deployed = card()
    first = deployed.engine()
    job_id = train("hang")
    until(job_id, "running")
    wait_for(deployed.asleep)
    # Older, but nobody waits for its answer.
    other = train("hang", created_at=now() - timedelta(days=1))
    deployed.waking()
    deployed.waking()
    shown = deployed.api.get(f"/jobs/{deployed.job_id}").json()
    assert (shown["status"], shown["phase"], shown["queue_position"]) == ("queued", "waking", 1)
    assert deployed.api.post(f"/jobs/{job_id}/cancel").status_code in (200, 202)
    deployed.ready()
    assert deployed.engine() == first
    assert deployed.api.get(f"/jobs/{deployed.job_id}").json()["phase"] is None
    assert deployed.api.get(f"/jobs/{other}").json()["started_at"] is None
    assert deployed.api.post(f"/jobs/{other}/cancel").status_code in (200, 202)


def test_on_another_gpu_it_starts_anew(card: Cards, garage: Garage, train: Train, until: Until) -> None:
    deployed = card()
    first = deployed.engine()
    job_id = train("hang")
    until(job_id, "running")
    wait_for(deployed.asleep)
    garage.slot(1)
    deployed.waking()
    deployed.ready()
    wait_for(lambda: deployed.engine() not in (None, first))
    assert deployed.asks("plain") == 200
    assert "it slept on gpu-0 (GPU 0), the slot is gpu-1 (GPU 1)" in deployed.said("engine_not_woken")
    assert deployed.api.post(f"/jobs/{job_id}/cancel").status_code in (200, 202)


def test_one_that_does_not_yield_stays(card: Cards, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    deployed = card(yields=False)
    job_id = train()
    wait_for(lambda: deployed.api.get(f"/jobs/{job_id}").json()["hold_reason"] == "slot_busy")
    with deployed.house.database.read() as session:
        before = session.get_one(Job, deployed.job_id).hb_seq
    wait_for(lambda: _beats(deployed) > before + 8)
    assert deployed.shown()["status"] == "ready"
    assert "sleep_requested" not in deployed.codes()
    assert deployed.api.post(f"/jobs/{job_id}/cancel").status_code in (200, 202)


def _beats(deployed: Card) -> int:
    with deployed.house.database.read() as session:
        return session.get_one(Job, deployed.job_id).hb_seq


@pytest.mark.parametrize(("rest", "stays"), [(1.5, True), (9.0, False)])
def test_another_engine_starts_on_its_gpu(
    card: Cards, garage: Garage, train: Train, until: Until, rest: float, stays: bool
) -> None:
    """Which takes 0.9 of the card, and does not start where that is not free."""
    deployed = card()
    until(train(), "succeeded")
    wait_for(deployed.asleep)
    garage.driver.rest = rest
    card(name="other")
    assert deployed.asleep()
    assert (garage.parking.homes() == {deployed.job_id: "gpu-0"}) is stays
    assert ("engine_not_kept" in deployed.codes()) is not stays


# What goes well


def test_it_gives_its_gpu_to_a_job_and_wakes_as_the_same_process(
    card: Cards, garage: Garage, train: Train, until: Until, adapter: Callable[..., str], tmp_path: Path
) -> None:
    deployed = card(hot_load=True, adapters=["artifact:" + adapter("one")])
    deployed.ready("one")
    wait_for(lambda: "engine_ready" in deployed.codes())
    first, began = deployed.engine(), deployed.codes().count("job_started")
    job_id = train()
    until(job_id, "succeeded")
    wait_for(deployed.asleep)
    assert deployed.engine() == first
    assert garage.parking.homes() == {deployed.job_id: "gpu-0"}
    assert job_id in deployed.said("sleep_requested")
    assert "GPU 0 used 72.0 GB before and 1.5 GB of 80.0 GB after" in deployed.said("engine_parked")
    with garage.house.database.read() as session:
        assert session.scalars(select(Slot.job_id)).all() == [None]

    deployed.waking()
    deployed.ready("one")
    assert deployed.engine() == first
    assert deployed.asks("plain") == deployed.asks("one") == 200
    codes = deployed.codes()
    assert (codes.count("engine_ready"), codes.count("engine_woken")) == (1, 1)
    assert codes.count("job_started") == began + 1
    assert deployed.shown()["restarts"] == 0
    requests = [json.loads(line) for line in _log(deployed).read_text().splitlines()]
    assert [one["path"] for one in requests].count("/v1/load_lora_adapter") == 1, "it slept with the engine"
    until(train(), "succeeded")  # and again
    wait_for(deployed.asleep)
    assert deployed.engine() == first


def _log(deployed: Card) -> Path:
    line = command(deployed.engine() or 0).split("\0")
    return Path(next(word for word in line if word.startswith("--log=")).partition("=")[2])


def test_with_idle_timeout_it_sleeps_without_a_job(card: Cards, garage: Garage) -> None:
    deployed = card(idle_timeout=1, yields=False)
    first = deployed.engine()
    wait_for(deployed.asleep)
    assert deployed.engine() == first
    deployed.waking()
    deployed.ready()
    assert deployed.engine() == first
