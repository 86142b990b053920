"""Jobs by the API in this process, and how often each really ran."""

import time
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient

from app.db import Database
from app.models import Job


class Submitter:
    """The API in this process, and jobs that tell how often they ran."""

    def __init__(self, client: TestClient, folder: Path, database: Database) -> None:
        self.client, self.folder, self.database = client, folder, database

    def post(self, **fields: Any) -> str:
        """A job that writes a line each time it is started."""
        name = f"tally-{time.monotonic_ns()}"
        body = {"type": "tally", "experiment_name": name, "file": str(self.folder / name), **fields}
        answer = self.client.post("/jobs", json=body)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def started(self, job_id: str) -> int:
        """How often it really ran."""
        with self.database.read() as session:
            file = Path(session.get_one(Job, job_id).spec["file"])
        return len(file.read_text().splitlines()) if file.exists() else 0

    def workers(self) -> int:
        """Those that live."""
        return sum(row["status"] != "gone" for row in self.client.get("/workers").json()["data"])

    def degraded(self) -> list[str]:
        found: list[str] = self.client.get("/readyz").json()["degraded"]
        return [reason for reason in found if reason != "no worker"]
