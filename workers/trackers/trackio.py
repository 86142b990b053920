"""Trackio: one run for a job, in Trackio's own folder (``TRACKIO_DIR``), else in the job's."""

import os
from collections.abc import Mapping
from typing import Any

from app.catalog import TrackedRun, Tracker


class Run:
    """A run of the ``trackio`` client."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One row."""
        self._run.log(dict(values), step=step)

    def close(self, status: str, summary: Mapping[str, float | str]) -> None:
        """Everything is written."""
        self._run.finish()


def start(run: TrackedRun) -> Run:
    """The job's run; a later attempt goes on with it."""
    folder = run.folder / "trackio"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TRACKIO_DIR", str(folder))  # read when it is imported
    import trackio

    project = os.environ.get("TRACKIO_PROJECT", run.service)
    return Run(trackio.init(project=project, name=run.job_id, resume="allow", config=dict(run.config), embed=False))


tracker = Tracker("trackio", start, needs="trackio", variables=("TRACKIO_",))
