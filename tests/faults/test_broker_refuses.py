"""The broker answers and is of no use: wrong password, too old, full, or full of rubbish."""

import base64
import contextlib
import json
import os
import pickle
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.models import Job
from tests.faults.conftest import WorkerProcess
from tests.faults.proxy import Proxy
from tests.faults.submitter import Submitter
from tests.faults.timeline import Timeline
from tests.faults.valkey import Valkey, too_old
from tests.support import on_sqlite, wait_for

pytestmark = [pytest.mark.fault, on_sqlite]
ApiOn = Callable[[str], Submitter]
Until = Callable[..., Job]


def test_a_worker_on_brokers_that_cannot_be_used(
    broker: Valkey,
    proxy: Proxy,
    proxy_url: str,
    api_on: ApiOn,
    worker: WorkerProcess,
    once: Callable[..., None],
    timeline: Timeline,
) -> None:
    """Case 32. ``/readyz`` says what is wrong, jobs run without a bell, and each fault ends without a restart."""
    api = api_on(proxy_url)
    first = api.post()
    bell = broker.doorbell()
    broker.client.config_set("requirepass", "another")
    worker.start(TUNESMITH_BROKER_URL=proxy_url, TUNESMITH_SLOTS="train:1")
    proxy.reset()
    once(api, first, _complains(api, "broker refuses the password in TUNESMITH_BROKER_URL"))
    assert "doorbell: broker refuses the password in TUNESMITH_BROKER_URL" in worker.log()
    broker.client.config_set("requirepass", broker.password)

    broker.client.config_set("maxmemory", 1)
    proxy.reset()
    second = _complains(api, "broker is out of memory")
    broker.client.config_set("maxmemory", 0)

    with too_old(broker.settings.sockets / "old.sock") as proxy.path:
        proxy.reset()
        last = _complains(api, "broker is version 6.0.9; Redis 6.2 or newer, or Valkey, is needed")
    proxy.path = broker.socket
    proxy.reset()
    with timeline.within("P3", "the worker hears again on a broker that is well", 30):
        broker.heard(bell, 30)
    once(api, second, last, api.post())
    wait_for(lambda: not api.degraded(), 15)
    lines = len(worker.log().splitlines())
    timeline.say(f"{lines} lines in the worker's log")
    assert lines < 100
    worker.ends_well(broker.password)


def _complains(api: Submitter, reason: str) -> str:
    """Submits a job, by which the broker is looked at; its id, once ``/readyz`` gives the reason."""
    job_id = api.post()
    wait_for(lambda: api.degraded() == [reason], 15)
    return job_id


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk, which needs root")
def test_a_broker_on_a_full_disk(tmp_path: Path, api_on: ApiOn, after_the_fault: None) -> None:
    """Case 32. Valkey refuses to write then; jobs are taken, ``/readyz`` says it, and it ends when there is room."""
    folder = tmp_path / "small"
    with small_disk(folder, "8m"), tempfile.TemporaryDirectory(prefix="ts-b-") as run_dir:
        broker = Valkey(folder, Path(run_dir)).start()
        try:
            api = api_on(broker.url)
            with (folder / "filler").open("wb") as file, contextlib.suppress(OSError):
                while file.write(bytes(1 << 16)):
                    file.flush()
            wait_for(lambda: api.post() and api.degraded() == ["broker cannot write to its disk"], 15)
            (folder / "filler").unlink()
            wait_for(lambda: api.post() and not api.degraded(), 15)
        finally:
            broker.stop()


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of its own."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


class Canary:
    """Whoever unpickles it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


def poison(bell: bytes, canary: Path) -> dict[str, bytes]:
    """Messages that nobody of ours would send, made from a good one."""
    good = json.loads(bell)

    def changed(body: bytes, content_type: str = "application/json", **headers: Any) -> bytes:
        message = {**good, "body": base64.b64encode(body).decode(), "content-type": content_type}
        return json.dumps({**message, "headers": {**good["headers"], **headers}}).encode()

    pickled = pickle.dumps(((Canary(canary),), {}, {}))
    yaml = f"!!python/object/apply:builtins.open [{canary}, w]".encode()
    return {
        "pickle": changed(pickled, "application/x-python-serialize"),
        "pickle, said to be JSON": changed(pickled),
        "YAML": changed(yaml, "application/x-yaml"),
        "unknown content type": changed(b"x", "application/x-nobody-knows"),
        "unknown task": changed(b"[[], {}, {}]", task="os.system", id="x" * 36),
        "arguments": changed(b'[["rm -rf /"], {"url": "http://127.0.0.1"}, {}]'),
        "huge": changed(json.dumps([["A" * (32 << 20)], {}, {}]).encode(), task="nobody.knows"),
        "not base64": json.dumps({**good, "body": "%%%"}).encode(),
        "no headers": json.dumps({**good, "headers": {}}).encode(),
        "no properties": json.dumps({**good, "properties": {}}).encode(),
        "no body": json.dumps({name: good[name] for name in ("headers", "properties")}).encode(),
        "not JSON": b"\x80\x04not json" * 100_000,
        "nothing": b"",
        "a number": b"42",
        "a list": b"[1, 2]",
        "null": b"null",
        "deep": b"[" * 100_000,
    }


def test_poisoned_messages(
    broker: Valkey,
    api_on: ApiOn,
    worker: WorkerProcess,
    once: Callable[..., None],
    until: Until,
    timeline: Timeline,
    tmp_path: Path,
) -> None:
    """Case 34. Pushed straight into the queue while a job runs: none is executed, the worker lives and hears on."""
    api = api_on(broker.url)
    release, canary = tmp_path / "release", tmp_path / "canary"
    running = api.post(until=str(release))
    bell = broker.doorbell()
    worker.start(TUNESMITH_BROKER_URL=broker.url, TUNESMITH_SLOTS="train:1")
    wait_for(lambda: api.started(running), 40)
    for name, message in poison(bell, canary).items():
        begun = time.monotonic()
        broker.heard(message, 30)
        timeline.say(f"{name}: gone after {time.monotonic() - begun:.2f} s")
    with timeline.within("P3", "the worker hears again after the last of them", 30):
        broker.heard(bell, 30)
        wait_for(lambda: not broker.client.hlen("unacked"), 30)
    assert not canary.exists()
    assert until(running, "running").fence == 1
    release.touch()
    once(api, running)
    lines = worker.log().splitlines()
    timeline.say(f"{len(lines)} lines in the worker's log, the longest of {max(map(len, lines))} characters")
    assert max(map(len, lines)) < 20_000
    worker.ends_well(broker.password)
