"""A seeded soak (case 85): a whole service under a stream of jobs, and one random fault every few seconds.

    make soak MINUTES=10 SEED=1

Three workers, an API and a broker are real processes on a data directory of their own (as root on a tmpfs of its own,
so that it can be filled). The dice are seeded: the same seed throws the same faults in the same order. At the end the
faults stop, and the question is asked that matters: did every accepted job come to its end, and to the right one?
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
from fastapi.testclient import TestClient
from sqlalchemy import select

from app.db import Database
from app.main import create_app
from app.models import Artifact
from app.queue import SilentDoorbell
from tests.faults import oracle
from tests.faults.installation import Installation
from tests.plugs.steady import expected

STEPS = 12
_KINDS = ("ok", "checkpoint", "crash", "steady", "steady", "steady", "pipeline")
_FINAL = ("succeeded", "failed", "cancelled")


class Load:
    """Submits jobs, cancels some, and remembers what was promised."""

    def __init__(self, installation: Installation, dice: random.Random, say: Callable[[str], None]) -> None:
        self._installation = installation
        self._dice = dice
        self._say = say
        self._client = httpx2.Client(
            base_url=installation.url, headers={"authorization": f"Bearer {installation.key}"}, timeout=20
        )
        self.accepted: dict[str, str] = {}
        """Id and kind of every job that was answered with 201."""
        self.cancelled: set[str] = set()
        """Cancellations that were answered with 200 or 202."""
        self._count = 0
        self.refused = 0
        self._file = ""

    def prepare(self) -> None:
        """The one file that every run reads."""
        row = {"messages": [{"role": "user", "content": "7"}, {"role": "assistant", "content": "seven"}]}
        content = json.dumps(row).encode() + b"\n"
        answer = self._persist(lambda: self._client.post("/files", files={"file": ("d.jsonl", content)}))
        self._file = str(answer["id"])

    def submit(self) -> None:
        """One more job, asked for again and again with the same key until there is an answer."""
        self._count += 1
        kind = self._dice.choice(_KINDS)
        name = f"{kind}{self._count}"
        headers = {"idempotency-key": name}
        path, body = "/jobs", self._body(kind, name)
        if kind == "pipeline":
            first, second = (self._body("steady", f"{name}-{step}") for step in ("a", "b"))
            path, body = "/pipelines", {"jobs": {"a": first, "b": {**second, "after": ["a"]}}}
        answer = self._persist(lambda: self._client.post(path, json=body, headers=headers))
        jobs = [step["job"] for step in answer["steps"]] if kind == "pipeline" else [answer]
        for job in jobs:
            self.accepted[job["id"]] = "steady" if kind == "pipeline" else kind

    def _body(self, kind: str, name: str) -> dict[str, Any]:
        if kind != "steady":
            marker = str(self._installation.folder / f"marker-{name}")
            return {"type": "sleepy", "experiment_name": name, "mode": kind, "marker": marker}
        return {
            "type": "train",
            "algorithm": "steady",
            "experiment_name": name,
            "model": {"model_name_or_path": str(self._installation.model)},
            "dataset": {"file": self._file},
            "training": {"max_steps": STEPS, "save_steps": 3},
            "retry": {"max_attempts": 20, "backoff_seconds": 0.5},
        }

    def cancel(self) -> None:
        """One that may still be waiting or running."""
        job_id = self._dice.choice(sorted(self.accepted)) if self.accepted else None
        if job_id is None:
            return
        with suppress(httpx2.HTTPError):
            answer = self._client.post(f"/jobs/{job_id}/cancel")
            if answer.status_code in (200, 202):
                self.cancelled.add(job_id)
                self._say(f"cancelled {job_id}: {answer.status_code}")

    def _persist(self, send: Callable[[], Any], seconds: float = 90) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while True:
            with suppress(httpx2.HTTPError):
                answer = send()
                if answer.status_code == 201:
                    found: dict[str, Any] = answer.json()
                    return found
                # Full or busy is an answer too; anything else is a fault of the service.
                assert answer.status_code in (503, 507), f"{answer.status_code}: {answer.text}"
                self.refused += 1
            assert time.monotonic() < deadline, "no answer for too long"
            time.sleep(0.3)

    def states(self) -> dict[str, str]:
        """Of every accepted job."""
        found: dict[str, str] = {}
        for job_id in self.accepted:
            answer = self._client.get(f"/jobs/{job_id}")
            assert answer.status_code == 200, f"{job_id} was accepted and is gone: {answer.text}"
            found[job_id] = answer.json()["status"]
        return found


def faults(installation: Installation) -> dict[str, Callable[[random.Random], str]]:
    """What may happen; each returns what it did."""
    found = {
        "kill worker": lambda dice: installation.kill_worker(dice.randrange(3)),
        "stop worker": lambda dice: installation.stop_worker(dice.randrange(3)),
        "freeze worker": lambda dice: installation.freeze_worker(dice.randrange(3), dice.uniform(1, 8)),
        "kill runner": lambda dice: installation.kill_runner(dice),
        "freeze runner": lambda dice: installation.freeze_runner(dice, dice.uniform(0.5, 3)),
        "kill API": lambda dice: installation.kill_api(),
        "restart API": lambda dice: installation.restart_api(),
        "kill broker": lambda dice: installation.kill_broker(),
        "slow broker": lambda dice: installation.freeze_broker(dice.uniform(1, 4)),
        "flush broker": lambda dice: installation.flush_broker(),
        "lock database": lambda dice: installation.lock_database(dice.uniform(1, 6)),
    }
    if installation.clocks:
        found["set clock"] = lambda dice: installation.set_clock(dice.randrange(4), dice.choice((-1, 0, 1)))
    if installation.has_own_disk:
        found["fill disk"] = lambda dice: installation.fill_disk(dice.uniform(1, 4))
    return found


def soak(minutes: float, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs the soak; raises AssertionError for a promise that was broken. What happened, as numbers."""
    begun = time.monotonic()
    stamped = lambda text: say(f"{time.monotonic() - begun:8.1f} s  {text}")  # noqa: E731
    with tempfile.TemporaryDirectory(prefix="ts-soak-") as name, Installation(Path(name)) as installation:
        load = Load(installation, random.Random(seed), stamped)
        load.prepare()
        done = threading.Event()
        broken: list[BaseException] = []
        pace = random.Random(seed + 1)

        def work() -> None:
            try:
                while not done.wait(pace.uniform(0.5, 2.0)):
                    load.submit()
                    if pace.random() < 0.1:
                        load.cancel()
            except BaseException as error:  # told at the end
                broken.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        dice = random.Random(seed + 2)
        menu, thrown = faults(installation), Counter[str]()
        try:
            while time.monotonic() - begun < minutes * 60 and not broken:
                time.sleep(dice.uniform(2, 10))
                fault = dice.choice(sorted(menu))
                stamped(f"{fault}: {menu[fault](dice)}")
                thrown[fault] += 1
        finally:
            done.set()
            thread.join()
        if broken:
            raise broken[0]
        installation.heal()
        stamped(f"no more faults; {len(load.accepted)} jobs were accepted")
        states = _until_all_end(load, 180)
        stamped(f"all at their end: {dict(Counter(states.values()))}")
        found = _judge(installation, load, states)
    return {"minutes": minutes, "seed": seed, "faults": dict(thrown), "refused": load.refused, **found}


def _until_all_end(load: Load, seconds: float) -> dict[str, str]:
    deadline = time.monotonic() + seconds
    while True:
        with suppress(httpx2.HTTPError):
            states = load.states()
            open_jobs = [job_id for job_id, state in states.items() if state not in _FINAL]
            if not open_jobs:
                return states
        assert time.monotonic() < deadline, f"these jobs never ended: {open_jobs}"
        time.sleep(0.5)


def _judge(installation: Installation, load: Load, states: dict[str, str]) -> dict[str, Any]:
    """The right ends: results as of a run that nothing disturbed; nothing succeeded after its cancellation."""
    installation.stop_everything()
    database = Database(installation.settings.database)
    with database.read() as session:
        artifacts = session.scalars(select(Artifact)).all()
    kept = {artifact.job_id: artifact for artifact in artifacts}
    for job_id, kind in load.accepted.items():
        state = states[job_id]
        assert not (job_id in load.cancelled and state == "succeeded"), f"{job_id} succeeded after its cancellation"
        if kind == "steady" and state == "succeeded":
            folder = installation.storage.artifact_dir(kept[job_id].id)
            assert (folder / "config.json").read_text() == expected(kept[job_id].name, STEPS), f"{job_id}: wrong result"
        if kind in ("ok", "checkpoint", "steady") and job_id not in load.cancelled:
            assert state in ("succeeded", "cancelled"), f"{job_id} ({kind}) {state}: {installation.error_of(job_id)}"
    with TestClient(
        create_app(installation.settings, SilentDoorbell()), headers={"authorization": f"Bearer {installation.key}"}
    ) as client:
        oracle.check(installation.settings, database, client, [installation.key.split("_", 2)[2]])
    database.close()
    return {"accepted": len(load.accepted), "ends": dict(Counter(states.values()))}


def main() -> None:
    """Exit status 0 when every promise was kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    say: Callable[[str], None] = (lambda _: None) if arguments.json else (lambda text: print(text, flush=True))
    try:
        found = soak(arguments.minutes, arguments.seed, say)
    except (AssertionError, subprocess.SubprocessError) as error:
        sys.exit(f"soak: broken: {error}")
    print(json.dumps(found) if arguments.json else f"soak: kept: {found}")


if __name__ == "__main__":
    main()
