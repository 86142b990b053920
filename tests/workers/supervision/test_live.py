"""A run in training is a model: asked through the gateway by its name, while it trains."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.jobs.live import live_socket
from app.models import Job
from app.settings import Settings
from tests.support import wait_for
from tests.workers.supervision.conftest import Attempt
from workers.supervisor import House

HELLO = [{"role": "user", "content": "17"}]


@pytest.fixture
def ended(run_all: Callable[..., list[Attempt]]) -> Iterator[Callable[..., threading.Event]]:
    """``ended(**training)``: starts a run named ``numbers``; set once it is over."""
    threads: list[threading.Thread] = []

    def start(**training: Any) -> threading.Event:
        over = threading.Event()

        def go() -> None:
            try:
                run_all("sft", {"learning_rate": 1e-3, **training}, experiment_name="numbers")
            finally:
                over.set()

        threads.append(threading.Thread(target=go))
        threads[-1].start()
        return over

    yield start
    for thread in threads:
        thread.join(120)


@pytest.mark.timeout(300)
def test_a_run_answers_through_the_gateway_while_it_trains(
    ended: Callable[..., threading.Event], api: TestClient, settings: Settings
) -> None:
    over = ended(max_steps=400)

    def answer() -> dict[str, Any] | None:
        assert not over.is_set(), "the run was over before it answered"
        asked = {"model": "numbers:ckpt-live", "messages": HELLO, "max_tokens": 3}
        reply = api.post("/v1/chat/completions", json=asked)
        if reply.status_code == 200:
            found: dict[str, Any] = reply.json()
            return found
        assert reply.status_code in (404, 503), reply.text
        assert reply.json()["error"]["code"] in ("model_not_found", "model_not_ready")
        return None

    first = wait_for(answer, 120)
    assert first["model"] == "numbers:ckpt-live"
    listed = {model["id"]: model for model in api.get("/v1/models").json()["data"]}
    job_id = listed["numbers:ckpt-live"]["root"]
    assert listed["numbers:ckpt-live"]["status"] == "training"
    later = api.post("/v1/completions", json={"model": f"{job_id}:ckpt-live", "prompt": "17", "max_tokens": 2}).json()
    assert later["step"] > first["step"]
    body = {"model": "numbers:ckpt-live", "messages": HELLO, "max_tokens": 3, "stream": True}
    assert api.post("/v1/chat/completions", json=body).text.endswith("data: [DONE]\n\n")
    refused = api.post(
        "/v1/chat/completions", json={**body, "tools": [{"type": "function", "function": {"name": "f"}}]}
    )
    assert refused.status_code == 400
    assert over.wait(120)
    assert api.get(f"/jobs/{job_id}").json()["status"] == "succeeded"
    assert not live_socket(settings, job_id).exists()
    gone = api.post("/v1/chat/completions", json={"model": "numbers:ckpt-live", "messages": HELLO})
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")
    assert "while it trains" in gone.json()["error"]["hint"]


def test_a_run_that_has_not_begun_its_steps_is_not_ready(start: Any, api: TestClient, house: House) -> None:
    attempt = start("hang")
    with house.database.write() as session:
        job = session.get_one(Job, attempt.job.id)
        job.type, job.algorithm = "train", "sft"
    answer = api.post("/v1/chat/completions", json={"model": f"{attempt.job.id}:ckpt-live", "messages": HELLO})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_not_ready")
    assert "retry-after" in answer.headers
