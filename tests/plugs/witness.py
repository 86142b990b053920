"""A tracker that writes down what it hears; ``WITNESS_MODE`` makes it fail or hang."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from app.catalog import TrackedRun, Tracker


class Witness:
    """One line a call."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if os.environ.get("WITNESS_MODE") == "fails" and step == 2:
            raise ConnectionError("the server is gone")
        while os.environ.get("WITNESS_MODE") == "hangs":
            time.sleep(0.05)
        self._write("log", step, dict(values))

    def close(self, status: str, summary: Mapping[str, float | str]) -> None:
        self._write("close", status, dict(summary))

    def _write(self, *what: object) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(what) + "\n")


def start(run: TrackedRun) -> Witness:
    witness = Witness(run.folder / "witness.jsonl")
    witness._write("open", run.job_id, run.name)
    return witness


tracker = Tracker("witness", start, variables=("WITNESS_",))
