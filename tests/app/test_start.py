"""A port that is taken, a folder for sockets that cannot be had: the service says in one line what to set (case 80)."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from app import schema
from app.settings import Settings

PARTS = {"up": ["app.cli", "up"], "API": ["app.api"], "worker": ["workers.main"]}
COMMANDS = {**PARTS, "jobs": ["app.cli", "jobs", "list"]}


def refused(part: str, data_dir: Path, **settings: str) -> str:
    """What it says on its way out."""
    schema.upgrade(Settings(data_dir=data_dir))
    environment = {**os.environ, "TUNESMITH_DATA_DIR": str(data_dir), "TUNESMITH_PORT": "0", **settings}
    command = [sys.executable, "-I", "-m", *COMMANDS[part]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("folder", "why"),
    [("/proc/tunesmith", "cannot be used"), ("/dev/null/run", "cannot be used"), ("/tmp/" + "x" * 100, "too long")],
)
def test_a_folder_for_sockets_that_cannot_be_had(tmp_path: Path, part: str, folder: str, why: str) -> None:
    said = refused(part, tmp_path / "data", TUNESMITH_RUN_DIR=folder)
    assert folder in said
    assert why in said
    assert "TUNESMITH_RUN_DIR" in said


@pytest.mark.parametrize("part", COMMANDS)
def test_settings_that_cannot_be_used(tmp_path: Path, part: str) -> None:
    """Each is named, and none is repeated: one may be a password."""
    said = refused(part, tmp_path / "data", TUNESMITH_PORT="http", TUNESMITH_SLOTS="foo")
    assert "TUNESMITH_PORT: Input should be a valid integer" in said
    assert "TUNESMITH_SLOTS: 'foo' is not a slot; write e.g. train:1,serve:2,light:1" in said
    assert len(said.splitlines()) == 1


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        said = refused("up", tmp_path / "data", TUNESMITH_PORT=port)
    assert f"127.0.0.1:{port} cannot be listened on" in said
    assert "set TUNESMITH_PORT" in said
