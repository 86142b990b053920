"""Trackers hear what a run logs, from a process of their own, and whatever happens to them the run goes on."""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.processes import processes_of_instance
from app.storage import Storage
from tests.workers.supervision.conftest import Attempt, claim
from workers.supervisor import House
from workers.trackers.tensorboard import EventFile, masked_crc

Start = Callable[..., Attempt]
WITNESS = {"steps": 3, "trackers": ["witness"]}


def heard(attempt: Attempt) -> list[Any]:
    path = attempt.folder.parent / "witness.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_tracker_hears_every_step_and_the_end(start: Start) -> None:
    attempt = start("ok", plug="chatty", more=WITNESS)
    row = attempt.end()
    assert row.state == "succeeded"
    opened, *logged, closed = heard(attempt)
    assert opened == ["open", row.id, "nap"]
    assert logged == [["log", step, {"loss": 1 / step}] for step in (1, 2, 3)], "numbers that are finite"
    assert closed[:2] == ["close", "succeeded"]
    assert closed[2]["final"] == pytest.approx(1 / 3)
    assert processes_of_instance(attempt.house.settings.instance) == []


def test_its_secrets_reach_the_tracker_alone(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WITNESS_MODE", "fails")
    row = start("ok", plug="chatty", more=WITNESS).end()
    assert row.result is not None
    assert row.result["seen"] == []


def test_a_tracker_that_fails_is_told_and_changes_nothing(
    start: Start, monkeypatch: pytest.MonkeyPatch, api: TestClient
) -> None:
    monkeypatch.setenv("WITNESS_MODE", "fails")
    attempt = start("ok", plug="chatty", more=WITNESS)
    assert attempt.end().state == "succeeded"
    assert [line[0] for line in heard(attempt)] == ["open", "log"]
    assert "the server is gone" in (attempt.folder / "tracker.log").read_text()
    trouble = json.loads((attempt.folder / "trackers.jsonl").read_text())
    assert (trouble["code"], trouble["data"]) == ("tracker_failed", {"tracker": "witness"})


def test_a_tracker_that_hangs_holds_up_no_run(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WITNESS_MODE", "hangs")
    monkeypatch.setattr("workers.tracking.GRACE", 0.3)
    attempt = start("ok", plug="chatty", more={**WITNESS, "steps": 2000})
    row = attempt.end()
    assert row.state == "succeeded"
    assert row.result is not None
    assert row.result["seconds"] < 5
    assert processes_of_instance(attempt.house.settings.instance) == []


def test_a_run_that_breaks_off_is_no_end_for_its_trackers(start: Start, house: House) -> None:
    attempt = start("interrupted", plug="chatty", more=WITNESS)
    assert attempt.end().state == "queued"
    again = claim(house)
    again.end()
    lines = heard(attempt)
    assert [line[0] for line in lines] == ["open", "log", "log", "log", "close"] * 2
    assert [line[1] for line in lines if line[0] == "close"] == ["interrupted"] * 2


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """A protobuf message, as far as events need it."""

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    place = 0
    while place < len(message):
        key = varint()
        size = {1: 8, 5: 4}.get(key & 7)
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        length = size if size is not None else varint()
        yield key >> 3, message[place : place + length]
        place += length


def events(path: Path) -> Iterator[dict[int, Any]]:
    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        assert struct.unpack("<I", data[8:12])[0] == masked_crc(data[:8])
        message, check = data[12 : 12 + length], data[12 + length : 16 + length]
        assert struct.unpack("<I", check)[0] == masked_crc(message)
        yield dict(fields(message))
        data = data[16 + length :]


def scalars(path: Path) -> dict[tuple[int, str], float]:
    found = {}
    for event in events(path):
        for number, value in fields(event.get(5, b"")):
            assert number == 1
            parts = dict(fields(value))
            found[event.get(2, 0), parts[1].decode()] = struct.unpack("<f", parts[2])[0]
    return found


def test_the_checksum_is_the_one_of_the_standard() -> None:
    # CRC-32C of "123456789" is 0xE3069283 (RFC 3720); masked: rotated right by 15, and 0xA282EAD8 added.
    crc = 0xE3069283
    assert masked_crc(b"123456789") == ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def test_an_event_file_holds_what_was_logged(tmp_path: Path) -> None:
    file = EventFile(tmp_path)
    file.log(1, {"loss": 2.5, "rewards/margins": -0.5})
    file.log(300, {"loss": 0.25})
    file.close("succeeded", {})
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("events.out.tfevents.")
    first, session, *_ = events(path)
    assert first[3] == b"brain.Event:2"
    assert (session[2], dict(fields(session[7]))) == (1, {1: 1})
    assert scalars(path) == {(1, "loss"): 2.5, (1, "rewards/margins"): -0.5, (300, "loss"): 0.25}


def test_the_real_library_reads_it(tmp_path: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    for begun in (1, 3):  # a second attempt goes on from step 2
        file = EventFile(tmp_path)
        for step in range(begun, begun + 3):
            file.log(step, {"loss": 10 * begun + step})
        file.close("interrupted", {})
    found = accumulator.EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in found] == [(1, 11), (2, 12), (3, 33), (4, 34), (5, 35)]


def test_a_run_is_seen_in_tensorboard(run_all: Callable[..., list[Attempt]], api: TestClient, storage: Storage) -> None:
    (attempt,) = run_all("sft", {"max_steps": 3}, trackers=["tensorboard"], experiment_name="seen")
    assert attempt.row().state == "succeeded"
    folder = storage.root / "outputs" / "seen" / "tensorboard"
    (path,) = folder.iterdir()
    found = scalars(path)
    logged = api.get(f"/jobs/{attempt.job.id}/metrics").json()
    for row in logged:
        for name, value in row["values"].items():
            assert found[row["step"], name] == pytest.approx(value, rel=1e-6)
