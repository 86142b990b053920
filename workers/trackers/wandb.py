"""Weights & Biases: one run for a job; offline, into the job's folder, where there is no key."""

import os
from collections.abc import Mapping
from typing import Any

from app.catalog import TrackedRun, Tracker


class Run:
    """A run of the ``wandb`` client."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One row of its history."""
        self._run.log(dict(values), step=step)

    def close(self, status: str, summary: Mapping[str, float | str]) -> None:
        """The run's summary; an attempt that goes on later leaves the run open for more."""
        self._run.summary.update({**summary, "status": status})
        self._run.finish(exit_code=0 if status in ("succeeded", "interrupted") else 1)


def start(run: TrackedRun) -> Run:
    """The job's run; a later attempt goes on with it."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read when it is imported
    import wandb

    folder = run.folder / "wandb"
    folder.mkdir(parents=True, exist_ok=True)
    online = bool(os.environ.get("WANDB_API_KEY"))
    return Run(
        wandb.init(
            project=os.environ.get("WANDB_PROJECT", run.service),
            id=run.job_id,
            name=run.name,
            resume="allow",
            dir=str(folder),
            config=dict(run.config),
            mode=os.environ.get("WANDB_MODE", "online" if online else "offline"),
            settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
        )
    )


tracker = Tracker("wandb", start, needs="wandb", variables=("WANDB_",))
