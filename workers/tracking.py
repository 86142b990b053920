"""The parent of the child that feeds trackers. Nothing that happens there reaches the run or the job's row."""

import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from app.catalog import Catalog
from app.models import Job
from app.processes import LIFE_FD, SILENCE, TOKEN, kill_ladder
from workers.journal import Tail
from workers.ledger import Line
from workers.tracker import TROUBLE

LOG = "tracker.log"
GRACE = 10.0
"""Seconds that trackers get for what is left when the run is over."""
log = logging.getLogger(__name__)


class Tracking:
    """One attempt's trackers, in a process of their own."""

    def __init__(self, process: "subprocess.Popen[bytes]", life: int, token: str, folder: Path) -> None:
        # Nothing is ever written to the life pipe: its end says that the run is over.
        self._process, self._life, self._token = process, life, token
        self._trouble = Tail(folder / TROUBLE)

    @classmethod
    def start(
        cls, catalog: Catalog, job: Job, folder: Path, token: str, environment: Mapping[str, str]
    ) -> "Tracking | None":
        """For a job that names trackers; None for others, and where the process cannot be started."""
        names = [name for name in job.resolved_spec.get("trackers") or [] if name in catalog.trackers]
        if not names or job.next_class is not None:
            return None
        prefixes = tuple(prefix for name in names for prefix in catalog.trackers[name].variables)
        secrets = {name: value for name, value in os.environ.items() if prefixes and name.startswith(prefixes)}
        instance, job_id, rest = token.split(":", 2)
        token = f"{instance}:{job_id}-trackers:{rest}"  # it outlives the run, and still belongs to the slot
        quiet = {name: value for name, value in environment.items() if name != SILENCE}
        read_end, life = os.pipe()
        try:
            with (folder / LOG).open("ab") as output:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-m", "workers.tracker", str(folder)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    cwd=folder,
                    env={**quiet, **secrets, TOKEN: token, LIFE_FD: str(read_end)},
                    pass_fds=[read_end],
                    start_new_session=True,
                )
        except OSError as error:
            log.warning("%s: the trackers cannot be started: %s", job.id, error)
            os.close(life)
            return None
        finally:
            os.close(read_end)
        return cls(process, life, token, folder)

    def lines(self) -> list[Line]:
        """What they have to say since the last call: that one failed."""
        return list(self._trouble.read())

    def stop(self) -> None:
        """The run is over: what is left is fed, for ``GRACE`` seconds at most. Nothing of it lives on."""
        os.close(self._life)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE)
        kill_ladder(self._process, self._token, 0)
