"""An engine that says something else than its model does is not kept, unless that was asked for."""

from collections.abc import Callable
from pathlib import Path

import pytest

from app.deployments.rollout import Rollouts
from app.queue import SilentDoorbell
from tests.support import wait_for
from tests.workers.conftest import make_model
from tests.workers.serving.conftest import Serving
from workers import parity
from workers.supervisor import House

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def model(models: Path) -> str:
    return str(make_model(models / "true"))


def test_an_engine_of_another_model_fails_the_deployment(serve: Callable[..., Serving], model: str) -> None:
    serving = serve(model=model, engine="other_model")
    wait_for(lambda: serving.shown()["status"] == "failed", 120)
    shown = serving.shown()
    assert shown["parity"]["verdict"] == "differs"
    assert shown["last_error"]["code"] == "parity_missed"
    assert "parity: warn" in shown["last_error"]["hint"]
    assert "parity_missed" in serving.codes()


def test_it_goes_on_where_that_was_asked_for(serve: Callable[..., Serving], model: str) -> None:
    serving = serve(model=model, engine="other_model", parity="warn")
    wait_for(lambda: serving.shown()["parity"], 120)
    assert serving.shown()["parity"]["verdict"] == "differs"
    assert serving.shown()["status"] == "ready"
    assert serving.asks("plain") == 200


def test_nothing_is_asked_where_it_is_off_or_nothing_can_be_read(serve: Callable[..., Serving]) -> None:
    serving = serve(engine="other_model")
    wait_for(lambda: serving.shown()["parity"], 120)
    assert serving.shown()["parity"]["verdict"] == "not_measured"
    assert serving.shown()["status"] == "ready"
    wait_for(lambda: "parity_not_measured" in serving.codes())


def test_what_the_engine_does_not_answer_was_not_measured_and_holds_nothing_up(
    serve: Callable[..., Serving], model: str, house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a question and its answer are longer than ``max_model_len``."""
    monkeypatch.setattr(parity, "QUESTIONS", ("bad_request",))
    (Path(model) / "mode.txt").write_text("moody")
    serving = serve(model=model, engine="other_model")
    found = wait_for(lambda: serving.shown()["parity"], 30)
    assert (found["verdict"], found["engine"]) == ("not_measured", "other_model")
    assert "maximum context length" in found["reason"]
    wait_for(lambda: "parity_not_measured" in serving.codes())
    assert serving.shown()["status"] == "ready"
    # What is to take over waits for its own verdict, and is not kept waiting by this one.
    rollouts = Rollouts(house.database, SilentDoorbell())
    assert serving.api.patch(f"/deployments/{serving.id}", json={"max_model_len": 64}).status_code == 200
    wait_for(lambda: rollouts.tick() or serving.shown()["generation"] == 2, 30)
    assert wait_for(lambda: serving.shown()["parity"], 10)["verdict"] == "not_measured"


def test_the_event_names_the_engine_that_runs(serve: Callable[..., Serving]) -> None:
    serving = serve(parity="off")
    serving.ready()
    wait_for(lambda: "engine_ready" in serving.codes())
    events = serving.api.get(f"/jobs/{serving.job_id}/events").json()["data"]
    (ready,) = (event for event in events if event["code"] == "engine_ready")
    assert ready["data"] == {"engine": "pretend"}
    assert "(pretend)" in ready["message"]


def test_an_engine_for_embeddings_is_ready_when_it_makes_one(serve: Callable[..., Serving], model: str) -> None:
    (Path(model) / "mode.txt").write_text("embeds")
    serving = serve(model=model, engine="other_model", task="embed")
    serving.ready()
    found = wait_for(lambda: serving.shown()["parity"])
    assert (found["verdict"], found["reason"]) == ("not_measured", "embeddings hold no tokens")
    assert serving.asks("plain") == 404
