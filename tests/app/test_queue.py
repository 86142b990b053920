"""The doorbell rings over a real broker, and costs nothing where there is none."""

import socket
import time

import pytest

from app.broker import NoBroker, embedded_command, wait_until_ready
from app.queue import RING_TASK, Doorbell, make_celery
from app.settings import Settings
from tests.support import wait_for


def test_a_ring_arrives(broker_url: str) -> None:
    celery = make_celery(broker_url)
    queue = f"test-{time.time_ns()}"
    celery.conf.task_default_queue = queue
    bell = Doorbell(broker_url)
    bell._celery.conf.task_default_queue = queue  # a queue of this test alone
    bell.ring()
    bell.close()
    assert bell.reachable
    with celery.connection_for_read() as connection, connection.SimpleQueue(queue) as inbox:
        message = inbox.get(timeout=10)
        message.ack()
        assert message.headers["task"] == RING_TASK
        inbox.queue.delete()
    celery.close()


def test_a_broker_that_is_away_costs_a_caller_nothing() -> None:
    bell = Doorbell("redis://127.0.0.1:1/0")
    begun = time.monotonic()
    for _ in range(1000):
        bell.ring()
    assert time.monotonic() - begun < 1
    wait_for(lambda: not bell.reachable)
    bell.close()


def test_a_broker_that_never_answers_costs_a_caller_nothing() -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        bell = Doorbell(f"redis://127.0.0.1:{mute.getsockname()[1]}/0")
        begun = time.monotonic()
        for _ in range(1000):
            bell.ring()
        assert time.monotonic() - begun < 1
        bell.close()
        assert time.monotonic() - begun < 5


def test_the_embedded_broker_is_private(tmp_path: object, run_dir: object) -> None:
    settings = Settings(data_dir=tmp_path, run_dir=run_dir)  # type: ignore[arg-type]
    config = settings.data_dir / "valkey" / "valkey.conf"
    embedded_command(settings)
    embedded_command(settings)
    lines = config.read_text().splitlines()
    assert {"port 0", "unixsocketperm 600", "appendonly yes", "maxmemory-policy noeviction"} <= set(lines)
    assert config.stat().st_mode & 0o777 == 0o600
    password = (settings.data_dir / "valkey" / "password").read_text()
    assert len(password) >= 32
    assert f"requirepass {password}" in lines


def test_a_broker_that_cannot_be_used_is_named(valkey_url: str) -> None:
    wait_until_ready(valkey_url, 5)
    with pytest.raises(NoBroker, match="does not answer"):
        wait_until_ready("redis://127.0.0.1:1/0", 0.1)
    scheme, _, rest = valkey_url.partition(":")
    with pytest.raises(NoBroker, match=r"password|not answer"):
        wait_until_ready(f"{scheme}://:wrong@{rest.partition('@')[2]}", 0.1)


def test_doorbells_that_nobody_hears_do_not_pile_up(valkey_url: str) -> None:
    """A hundred wake every worker; the reconcilers ring for as long as a job waits, which may be weeks."""
    queue = f"test-{time.time_ns()}"
    bell = Doorbell(valkey_url)
    bell._celery.conf.task_default_queue = queue
    client = bell._celery.connection_for_write().default_channel.client
    client.lpush(queue, *range(99))
    for _ in range(3):
        bell.ring()
        wait_for(lambda: not bell._asked)
    bell.close()
    assert client.llen(queue) == 100
    client.delete(queue)
