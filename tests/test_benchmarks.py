"""Benchmarks that start the service still run; what they measure is not looked at here."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app.processes import TOKEN, processes_with_token

pytestmark = pytest.mark.e2e
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(name: str, path: Path, *options: str) -> Any:
    """Its figures. Nothing that it started may be left; peers on the PATH are left out."""
    token = f"benchmark-{path.name}"
    environment = {**os.environ, "PATH": os.defpath, TOKEN: token}
    command = [sys.executable, str(BENCHMARKS / name), *options, "--json"]
    done = subprocess.run(command, cwd=path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert processes_with_token(token) == []
    return json.loads(done.stdout)


def test_the_gateways(tmp_path: Path) -> None:
    found = run("gateway.py", tmp_path, "--seconds", "1", "--requests", "400")
    loads = [*found["closed"].values(), *found["open"].values()]
    assert len(loads) == 7
    for load in loads:
        assert load.keys() == {"direct", "bare proxy", "gateway"}
        assert all(row["errors"] == 0 < row["pieces_per_second"] for row in load.values())
        assert all(0 < row["p50_ms"] <= row["p99_ms"] for row in load.values())
    assert (found["memory"]["requests"], found["memory"]["errors"]) == (400, 0)
    assert "litellm" in found["skipped"]
