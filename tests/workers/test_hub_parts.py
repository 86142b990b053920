"""Halves of downloads outlive the process that fetched them, and end as the file that the hub has or not at all."""

import hashlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from app.errors import Code
from app.settings import PROJECT_ROOT
from tests.hub.server import HubServer
from tests.workers.conftest import TOKEN
from tests.workers.test_hub_inputs import FIELD, FILES, REPO, SECOND, UNWANTED, context, events, refused, told
from workers import parts

BYTES = FILES[SECOND]
HASH = hashlib.sha256(BYTES).hexdigest()
STAGE = """
from types import SimpleNamespace
from huggingface_hub import constants
from workers import staging
constants.DOWNLOAD_CHUNK_SIZE = 4000
staging._POLL = 0.02
nothing = lambda *_, **__: None
ctx = SimpleNamespace(stop_requested=nothing, event=nothing, progress=nothing, tick=nothing)
staging.stage("acme/base", None, "model", ctx)
"""


@pytest.fixture
def commit(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 4000)
    monkeypatch.setattr("workers.staging._POLL", 0.02)
    monkeypatch.setattr(parts, "_QUIET", 0.3)
    return hub.store.add(REPO, {**FILES, **UNWANTED})


@pytest.fixture
def blob(commit: str, tmp_path: Path) -> Path:
    """Where the bytes of the second file belong."""
    found = tmp_path / "hf" / "hub" / "models--acme--base" / "blobs" / HASH
    found.parent.mkdir(parents=True)
    return found


def kept(blob: Path) -> Path:
    return blob.with_name(blob.name + ".tunesmith.incomplete")


def half(blob: Path, data: bytes = BYTES[:20_000]) -> Path:
    """One that an earlier process left."""
    path = kept(blob)
    path.write_bytes(data)
    os.utime(path, (time.time() - 60,) * 2)
    return path


def ranges(hub: HubServer) -> list[str]:
    """Of what was fetched of the second file."""
    return [
        headers.get("range", "all")
        for method, path, headers in hub.store.requests
        if method == "GET" and path.startswith("/cdn/") and path.endswith(HASH)
    ]


def check(folder: Path, blob: Path) -> None:
    """Everything is here and right, and no half lies about."""
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    assert blob.read_bytes() == BYTES
    assert list(blob.parent.glob("*.tunesmith.incomplete")) == []
    assert list(blob.parent.glob(f"{blob.name}.*")) == []
    assert blob.stat().st_nlink == 1


def test_an_attempt_that_gave_up_is_gone_on_with(hub: HubServer, blob: Path, tmp_path: Path) -> None:
    hub.store.drop("GET", f"/cdn/{blob.name}", after=30_000)
    hub.store.fail("GET", f"/cdn/{blob.name}", 500, times=9)
    error = refused(tmp_path / "a1")
    assert (error.code, error.transient) == (Code.MODEL_UNREACHABLE, True)
    assert "what has come is not fetched again" in (error.hint or "")
    there = kept(blob).stat().st_size
    assert 20_000 <= there <= 30_000
    hub.store.faults.clear()
    hub.store.forget()
    check(context(tmp_path / "a2").input(FIELD), blob)
    assert ranges(hub) == [f"bytes={there}-"]
    (event,) = [line for line in told(tmp_path / "a2", "event") if line["code"] == "model_downloading"]
    assert (event["data"]["bytes"], event["data"]["bytes_here"]) == (len(BYTES), there)
    assert hub.store.tokens() == {f"Bearer {TOKEN}"}
    cdn = [headers for _, path, headers in hub.store.requests if path.startswith("/cdn/")]
    assert len(cdn) == 1
    assert not any("authorization" in headers for headers in cdn), "where large files lie is another machine"


def test_an_attempt_that_was_killed_is_gone_on_with(hub: HubServer, blob: Path, tmp_path: Path) -> None:
    """In the second that the library waits after a lost connection."""
    hub.store.drop("GET", f"/cdn/{blob.name}", after=30_000)
    environment = {**os.environ, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(PROJECT_ROOT)}
    with subprocess.Popen([sys.executable, "-c", STAGE], env=environment) as process:
        deadline = time.monotonic() + 60
        while not (kept(blob).exists() and kept(blob).stat().st_size >= 16_000):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
    there = kept(blob).stat().st_size
    assert 0 < there < len(BYTES)
    hub.store.forget()
    check(context(tmp_path / "a2").input(FIELD), blob)
    assert ranges(hub) == [f"bytes={there}-"]


def test_a_half_that_only_had_to_be_named(hub: HubServer, blob: Path, tmp_path: Path) -> None:
    """Its process was killed after the last byte."""
    half(blob, BYTES)
    check(context(tmp_path / "a1").input(FIELD), blob)
    assert ranges(hub) == []


@pytest.mark.parametrize("data", [b"x" * 20_000, BYTES + b"more"], ids=["other bytes", "too long"])
def test_a_half_of_something_else_is_never_the_file(hub: HubServer, blob: Path, tmp_path: Path, data: bytes) -> None:
    half(blob, data)
    check(context(tmp_path / "a1").input(FIELD), blob)
    assert ranges(hub)[-1] == "all"


def test_a_hub_that_knows_no_ranges_sends_all_of_it(
    hub: HubServer, blob: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "knows_ranges", False)
    half(blob)
    check(context(tmp_path / "a1").input(FIELD), blob)


def test_a_hub_that_refuses_the_rest_is_asked_for_all_of_it(hub: HubServer, blob: Path, tmp_path: Path) -> None:
    half(blob)
    hub.store.fail("GET", f"/cdn/{blob.name}", 416)
    check(context(tmp_path / "a1").input(FIELD), blob)
    assert ranges(hub) == ["bytes=20000-", "all"]


def test_one_that_breaks_again_is_kept_again(hub: HubServer, blob: Path, tmp_path: Path) -> None:
    half(blob)
    hub.store.drop("GET", f"/cdn/{blob.name}", after=10_000)
    hub.store.fail("GET", f"/cdn/{blob.name}", 503, times=9)
    assert refused(tmp_path / "a1").transient
    assert 20_000 < kept(blob).stat().st_size <= 30_000
    hub.store.faults.clear()
    check(context(tmp_path / "a2").input(FIELD), blob)


def test_a_half_that_somebody_writes_to_is_left_alone(hub: HubServer, blob: Path, tmp_path: Path) -> None:
    over = threading.Event()
    path = half(blob)

    def write() -> None:
        while not over.wait(0.02):
            path.touch()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        folder = context(tmp_path / "a1").input(FIELD)
    finally:
        over.set()
        writer.join()
    path.unlink(missing_ok=True)
    check(folder, blob)
    assert ranges(hub) == ["all"]


def test_a_file_that_another_process_fetches_is_left_to_it(hub: HubServer, blob: Path, tmp_path: Path) -> None:
    half(blob)
    with parts._alone(blob) as alone:
        assert alone
        waiting = threading.Thread(target=lambda: context(tmp_path / "a1").input(FIELD))
        waiting.start()
        time.sleep(1)
        assert waiting.is_alive()
        assert ranges(hub) == []
        os.replace(half(blob, BYTES), blob)
    waiting.join(30)
    assert events(tmp_path / "a1")[-1] == "model_download_complete"
    assert ranges(hub) == []


def test_the_room_that_a_half_takes_is_not_asked_for_again(
    hub: HubServer, blob: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = sum(map(len, FILES.values())) - 20_000
    monkeypatch.setattr("app.disk.free_bytes", lambda _: need + 1000)
    assert refused(tmp_path / "a1", reserve_bytes=1000).code == Code.DISK_FULL
    half(blob)
    check(context(tmp_path / "a2", reserve_bytes=1000).input(FIELD), blob)


def test_halves_that_nobody_comes_back_for_are_taken_away(hub: HubServer, blob: Path, tmp_path: Path) -> None:
    ages = {"x.12345678": 4000, "y.12345678": 0, "x.tunesmith": 4000, "y.tunesmith": 8 * 86_400}
    for name, age in ages.items():
        path = blob.with_name(f"{name}.incomplete")
        path.write_bytes(b"part")
        os.utime(path, (time.time() - age,) * 2)
    context(tmp_path / "a1").input(FIELD)
    assert sorted(path.name for path in blob.parent.glob("*.incomplete")) == [
        "x.tunesmith.incomplete",
        "y.12345678.incomplete",
    ]


def test_a_disk_without_hard_links_begins_anew(
    hub: HubServer, blob: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    hub.store.drop("GET", f"/cdn/{blob.name}", after=30_000)
    hub.store.fail("GET", f"/cdn/{blob.name}", 500, times=9)
    assert refused(tmp_path / "a1").transient
    hub.store.faults.clear()
    hub.store.forget()
    check(context(tmp_path / "a2").input(FIELD), blob)
    assert ranges(hub) == ["all"]
