"""What share of a slot's time is training that counts, when the run is killed again and again.

Starts a real worker on a data directory of its own, trains a tiny model, and kills its runner (kill -9) every
``--interval`` seconds. Useful is the time of the steps that a committed checkpoint kept, at the pace of the steps
around them; held is the time from each claim to the moment that the slot lets go. What lies between: starting the
runner, steps that were lost, writing checkpoints, and noticing the death. The cells that would take hours are worked
out from what the short ones measured, and say so.

    make bench-goodput                      or: .venv/bin/python benchmarks/goodput.py --interval 60 --kills 2 --json
"""

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastapi.testclient import TestClient
from rich.console import Console
from rich.table import Table
from sqlalchemy import select

from app.broker import embedded_command, embedded_url, wait_until_ready
from app.db import Database
from app.main import create_app
from app.models import Checkpoint, Job, JobEvent
from app.processes import processes_with_token
from app.projects.bootstrap import ensure_first_key
from app.queue import Doorbell
from app.schema import upgrade
from app.settings import Settings
from app.storage import Storage

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.workers.conftest import conversation, make_model  # noqa: E402

TEN_MINUTES = 600.0
SHARE = 0.02
AROUND = 60
"""Lines of progress, of which there are two a second."""


@dataclass(frozen=True)
class Attempt:
    """One attempt on the slot; seconds since the epoch, by this machine's one clock."""

    claimed: float
    imported: float
    """The recipe has its libraries and says its first word; a runner that had them before starts from here."""
    first_step: float
    killed: float
    released: float
    steps_lost: int
    useful: float
    """Time of the steps that a checkpoint kept, at the pace of the steps around them."""
    lost: float
    """Time since the newest checkpoint."""
    pace: float
    """Seconds a step: the median over the attempt."""

    @property
    def start(self) -> float:
        """From the claim to the end of the first step, less that step."""
        return self.first_step - self.claimed - self.pace

    @property
    def start_after_imports(self) -> float:
        """What is left of the start when the libraries are there."""
        return self.first_step - self.imported - self.pace

    @property
    def noticed(self) -> float:
        """From the kill to the moment that the slot lets go."""
        return self.released - self.killed

    @property
    def held(self) -> float:
        """Time on the slot."""
        return self.released - self.claimed


@contextmanager
def installation(folder: Path, *, warm: bool) -> Iterator[tuple[Settings, TestClient]]:
    """A worker with a training slot and a light one, its broker, and the API in this process."""
    models = folder / "models"
    settings = Settings(data_dir=folder / "data", run_dir=folder / "run", model_roots=(models,), min_free_bytes=0)
    upgrade(settings)
    key = ensure_first_key(settings, lambda _: None).read_text().strip()
    make_model(models / "tiny")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TUNESMITH_")} | {
        "TUNESMITH_DATA_DIR": str(settings.data_dir),
        "TUNESMITH_RUN_DIR": str(settings.run_dir),
        "TUNESMITH_BROKER_URL": embedded_url(settings),
        "TUNESMITH_MODEL_ROOTS": str(models),
        "TUNESMITH_SLOTS": "train:1,light:1",
        "TUNESMITH_MIN_FREE_BYTES": "0",
        "TUNESMITH_WARM_RUNNERS": "1" if warm else "0",
    }
    with (folder / "log").open("wb") as log:
        broker = subprocess.Popen(embedded_command(settings), stdout=log, stderr=log)
        try:
            wait_until_ready(embedded_url(settings), 20)
            worker = subprocess.Popen(
                [sys.executable, "-I", "-m", "workers.main"], env=environment, stdout=log, stderr=log
            )
            try:
                with TestClient(
                    create_app(settings, Doorbell(embedded_url(settings))), headers={"authorization": f"Bearer {key}"}
                ) as client:
                    yield settings, client
            finally:
                worker.terminate()
                worker.wait(150)
        finally:
            broker.terminate()
            broker.wait(30)


def submit(client: TestClient, settings: Settings, checkpoint_seconds: float) -> str:
    """A run that would go on for days."""
    rows = "".join(json.dumps({"messages": conversation(number)}) + "\n" for number in range(200))
    file = client.post("/files", files={"file": ("rows.jsonl", rows.encode())}).json()["id"]
    answer = client.post(
        "/jobs",
        json={
            "type": "train",
            "algorithm": "sft",
            "experiment_name": "goodput",
            "model": {"model_name_or_path": str(settings.model_roots[0] / "tiny"), "peft_config": {"r": 4}},
            "dataset": {"file": file},
            "training": {
                "max_steps": 5_000_000,
                "save_steps": 5_000_000,
                "logging_steps": 100,
                "checkpoint_seconds": checkpoint_seconds,
            },
            "retry": {"backoff_seconds": 0.0, "max_attempts": 20},
        },
    )
    if answer.status_code != 201:
        sys.exit(answer.text)
    return str(answer.json()["id"])


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            sys.exit(f"{what}: waited {seconds} s in vain")
        time.sleep(0.05)
    return value


def killed_attempts(settings: Settings, client: TestClient, job_id: str, interval: float, kills: int) -> list[Attempt]:
    """Kills the runner ``interval`` seconds after each claim of the training slot."""
    database = Database(settings.database)
    storage = Storage(settings.data_dir)
    attempts: list[Attempt] = []
    fence = 0

    def on_slot() -> Job | None:
        with database.read() as session:
            job = session.get_one(Job, job_id)
        if job.state in ("failed", "succeeded", "cancelled"):
            sys.exit(f"the run ended: {job.state} {job.error_detail}")
        return job if job.state == "running" and job.slot_id == "train-0" and job.fence > fence else None

    def left() -> float | None:
        with database.read() as session:
            event = session.scalar(
                select(JobEvent)
                .where(JobEvent.job_id == job_id, JobEvent.fence == fence, JobEvent.from_state == "running")
                .order_by(JobEvent.seq.desc())
            )
        return event.created_at.timestamp() if event else None

    for _ in range(kills):
        job = wait_for(on_slot, 120, "the next attempt")
        fence = job.fence
        claimed = job.claimed_at.timestamp()
        time.sleep(max(0.0, claimed + interval - time.time()))
        pids = processes_with_token(f"{settings.instance}:{job_id}:{fence}:train-0")
        killed = time.time()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        released = wait_for(left, 60, "the slot")
        with database.read() as session:
            kept = session.scalar(
                select(Checkpoint.step)
                .where(Checkpoint.job_id == job_id, Checkpoint.fence == fence)
                .order_by(Checkpoint.step.desc())
            )
        journal = storage.attempt_dir(job_id, fence) / "events.jsonl"
        attempts.append(_attempt(journal, claimed, killed, released, kept))
    client.post(f"/jobs/{job_id}/cancel")
    wait_for(lambda: client.get(f"/jobs/{job_id}").json()["status"] == "cancelled", 60, "the end")
    database.close()
    return attempts


def _attempt(journal: Path, claimed: float, killed: float, released: float, kept: int | None) -> Attempt:
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    imported = next(line["t"] for line in lines if line["kind"] == "phase")
    steps = [(line["t"], line["step"]) for line in lines if line["kind"] == "progress"]
    spans = [Span(b[0], b[0] - a[0], b[1] - a[1], b[1]) for a, b in itertools.pairwise(steps)]
    pace = statistics.median(span.pace for span in spans)
    before = steps[0][1] - 1
    kept = max(kept or before, before)
    last = steps[-1][1] + int((killed - steps[-1][0]) / pace)  # progress is told twice a second
    kept_at = next((span.end for span in reversed(spans) if span.step <= kept), steps[0][0])
    useful = (pace if kept > before else 0.0) + sum(seconds for span, seconds in usual(spans) if span.step <= kept)
    return Attempt(claimed, imported, steps[0][0], killed, released, last - kept, useful, killed - kept_at, pace)


class Span(NamedTuple):
    """From one line of progress to the next: when it ended, seconds, steps, and the step that was reached."""

    end: float
    seconds: float
    steps: int
    step: int

    @property
    def pace(self) -> float:
        """Seconds a step."""
        return self.seconds / self.steps


def usual(spans: list[Span]) -> Iterator[tuple[Span, float]]:
    """Each span with what it would have taken at the pace around it, at most what it took.

    The pace around it is the median of the half minute before and after: a span that waited for a checkpoint is longer,
    and what it took more is not useful. The machine's own pace may change over ten minutes.
    """
    for place, span in enumerate(spans):
        around = spans[max(0, place - AROUND) : place + AROUND + 1]
        yield span, min(span.seconds, span.steps * statistics.median(one.pace for one in around))


def cell(interval: float, kills: int, checkpoint_seconds: float, *, warm: bool) -> dict[str, Any]:
    """One measured cell."""
    with (
        tempfile.TemporaryDirectory(prefix="ts-goodput-") as name,
        installation(Path(name), warm=warm) as (
            settings,
            client,
        ),
    ):
        if warm:
            time.sleep(15)  # the spare runner needs that long for its imports, as it would in a service
        found = killed_attempts(settings, client, submit(client, settings, checkpoint_seconds), interval, kills)
    useful, held = sum(item.useful for item in found), sum(item.held for item in found)
    wall = found[-1].released - found[0].claimed
    return {
        "runner": "warm" if warm else "cold",
        "checkpoint_seconds": checkpoint_seconds,
        "interval": interval,
        "kills": kills,
        "goodput": round(useful / held, 4),
        "goodput_of_wall_clock": round(useful / wall, 4),
        "start_seconds": [round(item.start, 2) for item in found],
        "start_after_imports_seconds": [round(item.start_after_imports, 2) for item in found],
        "noticed_seconds": [round(item.noticed, 2) for item in found],
        "between_attempts_seconds": [
            round(later.claimed - earlier.released, 2) for earlier, later in zip(found, found[1:], strict=False)
        ],
        "lost_seconds": [round(item.lost, 2) for item in found],
        "lost_steps": [item.steps_lost for item in found],
        "step_ms": [round(1000 * item.pace, 2) for item in found],
        # What steps took beyond the pace around them: mostly waiting for checkpoints.
        "slow_share": round(
            statistics.mean(
                1 - (item.useful + item.lost) / (item.killed - item.first_step + item.pace) for item in found
            ),
            4,
        ),
    }


def worked_out(measured: dict[str, Any], checkpoint_seconds: float) -> dict[str, Any]:
    """Kills every ten minutes: restart as measured; on average half an interval between checkpoints is lost.

    Writing checkpoints is charged with 2 %, the most that the run allows itself.
    """
    # The first attempt's start also warms the disk's caches.
    starts = measured["start_seconds"][1:] or measured["start_seconds"]
    restart = statistics.mean(starts) + statistics.mean(measured["noticed_seconds"])
    share = (TEN_MINUTES - restart - checkpoint_seconds / 2) * (1 - SHARE) / TEN_MINUTES
    return {
        "runner": measured["runner"],
        "checkpoint_seconds": checkpoint_seconds,
        "restart_seconds": round(restart, 2),
        "goodput": round(share, 4),
    }


def main() -> None:
    """Prints two tables, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--interval", type=float, default=60, help="seconds from a claim to the kill")
    parser.add_argument("--kills", type=int, default=3, help="in each cell")
    parser.add_argument("--checkpoint-seconds", type=float, nargs="+", default=[20.0])
    parser.add_argument("--runner", choices=["warm", "cold", "both"], default="both")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    kinds = [True, False] if arguments.runner == "both" else [arguments.runner == "warm"]
    measured = [
        cell(arguments.interval, arguments.kills, seconds, warm=warm)
        for warm in kinds
        for seconds in arguments.checkpoint_seconds
    ]
    first = {item["runner"]: item for item in reversed(measured)}
    ten_minutes = [worked_out(item, seconds) for item in first.values() for seconds in (20.0, 300.0)]
    found = {"measured": measured, "every_ten_minutes": ten_minutes, "load": os.getloadavg(), "cpus": os.cpu_count()}
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    table = Table(
        *("runner", "checkpoint s", "goodput", "of wall clock", "start s", "noticed s", "lost s", "ms a step"),
        title=f"measured: kill -9 of the runner {arguments.interval:.0f} s after each claim, {arguments.kills} times",
    )
    for item in measured:
        lists = [
            " ".join(map(str, item[key])) for key in ("start_seconds", "noticed_seconds", "lost_seconds", "step_ms")
        ]
        table.add_row(
            item["runner"],
            f"{item['checkpoint_seconds']:g}",
            f"{item['goodput']:.1%}",
            f"{item['goodput_of_wall_clock']:.1%}",
            *lists,
        )
    Console().print(table)
    table = Table(
        *("runner", "checkpoint s", "restart s", "goodput"),
        title="worked out from the above, not measured: a kill every 10 minutes",
    )
    for item in ten_minutes:
        table.add_row(
            item["runner"], f"{item['checkpoint_seconds']:g}", f"{item['restart_seconds']}", f"{item['goodput']:.1%}"
        )
    Console().print(table)
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs")


if __name__ == "__main__":
    main()
