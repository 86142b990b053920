"""Trackers through their real clients, without a server; each is skipped where its client is not installed."""

import json
import sqlite3
import struct
from pathlib import Path
from typing import Any

import pytest

from app.catalog import TrackedRun
from app.discovery import discover

LOSSES = [(1, 1.0), (2, 0.5), (2, 0.25), (3, 0.125)]
"""Step 2 is made twice: the first attempt broke off behind its last checkpoint."""


def track(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An attempt that breaks off, and one that goes on; returns the job's folder."""
    for variable in ("WANDB_API_KEY", "MLFLOW_TRACKING_URI", "TRACKIO_DIR"):
        monkeypatch.delenv(variable, raising=False)
    tracker = discover(["workers.trackers"]).trackers[name]
    assert tracker.installed
    config = {"training": {"learning_rate": 1e-3}, "then": ["merge"], "metadata": {}}
    run = TrackedRun("ftjob-1", "tunesmith", "numbers", config, root)
    for losses, status in ((LOSSES[:2], "interrupted"), (LOSSES[2:], "succeeded")):
        sink = tracker.open(run)
        for step, loss in losses:
            sink.log(step, {"loss": loss, "rewards/margins": -loss})
        sink.close(status, {"final_loss": 0.125, "device": "cpu"})
    return root / name


def test_mlflow_has_one_run_with_its_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow: Any = pytest.importorskip("mlflow", reason="mlflow is not installed")
    folder = track("mlflow", tmp_path, monkeypatch)
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    run = client.get_run((folder / "run_id").read_text())
    assert (run.info.status, run.info.run_name) == ("FINISHED", "numbers")
    assert run.data.params == {"training.learning_rate": "0.001", "then": '["merge"]'}
    assert run.data.tags["job"] == "ftjob-1"
    for name, sign in (("loss", 1), ("rewards/margins", -1)):
        history = client.get_metric_history(run.info.run_id, name)
        assert [(metric.step, metric.value) for metric in history] == [(step, sign * loss) for step, loss in LOSSES]


def test_trackio_has_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio", reason="trackio is not installed")
    monkeypatch.setenv("TRACKIO_DIR", "")  # what the tracker sets is taken back after the test
    folder = track("trackio", tmp_path, monkeypatch)
    with sqlite3.connect(folder / "tunesmith.db") as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    assert [(name, step, json.loads(values)["loss"]) for name, step, values in rows] == [
        ("ftjob-1", step, loss) for step, loss in LOSSES
    ]


def test_wandb_keeps_its_runs_offline_without_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    folder = track("wandb", tmp_path, monkeypatch)
    files = sorted(folder.glob("wandb/offline-run-*/run-ftjob-1.wandb"))
    assert len(files) == 2
    assert [row for file in files for row in _history(file)] == LOSSES


def _history(path: Path) -> list[tuple[int, float]]:
    """Step and loss of each history record of a ``.wandb`` file."""
    records = pytest.importorskip("wandb.proto.wandb_internal_pb2", reason="wandb is not installed")
    found = []
    for data in _records(path.read_bytes()):
        record = records.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            found.append((int(record.history.step.num), float(items["loss"])))
    return found


def _records(data: bytes) -> list[bytes]:
    """LevelDB's log format: blocks of 32 KiB, records in parts (first, middle, last, or whole)."""
    found, part, place = [], b"", 7
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        part += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            found.append(part)
            part = b""
    return found
