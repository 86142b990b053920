"""An engine that says something else than its model does is not kept, unless that was asked for."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import wait_for
from tests.workers.conftest import make_model
from tests.workers.serving.conftest import Serving

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
