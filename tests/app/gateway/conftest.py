"""Engines, gateways and clients of these tests."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import openai  # noqa: TID253  (slow to import, which only matters in the service)
import pytest

from tests.app.gateway.doubles import Engine, Gateway


@pytest.fixture
def engine() -> Iterator[Engine]:
    # Not under tmp_path: a unix socket's path holds 107 bytes.
    with tempfile.TemporaryDirectory(prefix="ts-") as folder:
        engine = Engine(Path(folder))
        yield engine
        with contextlib.suppress(FileNotFoundError):
            engine.stop()


@pytest.fixture
def gateway(engine: Engine) -> Iterator[Gateway]:
    gateway = Gateway(engine)
    yield gateway
    gateway.close()


@pytest.fixture(scope="module")
def shared() -> Iterator[Gateway]:
    """One for all requests that reach no engine."""
    with tempfile.TemporaryDirectory(prefix="ts-") as folder:
        gateway = Gateway(Engine(Path(folder)))
        yield gateway
        gateway.close()
        gateway.engine.stop()


@pytest.fixture
def client(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=gateway.url + "/v1", api_key="k", max_retries=0, timeout=20) as client:
        yield client
