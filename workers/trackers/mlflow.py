"""MLflow: one run for a job, on the server of ``MLFLOW_TRACKING_URI``, else in a database in the job's folder."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.catalog import TrackedRun, Tracker

RUN_ID = "run_id"
_LONGEST = 500
_AT_ONCE = 100


class Run:
    """A run of the ``mlflow`` client."""

    def __init__(self, client: Any, run_id: str) -> None:
        self._client, self._id = client, run_id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Every number of the step."""
        for name, value in values.items():
            self._client.log_metric(self._id, name, value, step=step)

    def close(self, status: str, summary: Mapping[str, float | str]) -> None:
        """The run's tags; one that goes on later stays open."""
        for name, value in summary.items():
            self._client.set_tag(self._id, name, value)
        if status != "interrupted":
            self._client.set_terminated(self._id, {"succeeded": "FINISHED"}.get(status, "FAILED"))


def start(run: TrackedRun) -> Run:
    """The job's run; a later attempt goes on with it."""
    from mlflow import MlflowClient

    folder = run.folder / "mlflow"
    folder.mkdir(parents=True, exist_ok=True)
    client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}")
    record = folder / RUN_ID
    if record.exists():
        run_id = record.read_text()
        client.update_run(run_id, status="RUNNING")
        return Run(client, run_id)
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", run.service)
    experiment = client.get_experiment_by_name(name)
    number = experiment.experiment_id if experiment else client.create_experiment(name, _artifacts(folder))
    made = client.create_run(number, tags={"job": run.job_id}, run_name=run.name)
    for key, value in list(_flat(run.config))[:_AT_ONCE]:
        client.log_param(made.info.run_id, key, value)
    record.write_text(made.info.run_id)
    return Run(client, made.info.run_id)


def _artifacts(folder: Path) -> str | None:
    return None if os.environ.get("MLFLOW_TRACKING_URI") else (folder / "artifacts").as_uri()


def _flat(config: Mapping[str, Any], prefix: str = "") -> Any:
    """``training.learning_rate`` and its value, for every leaf."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", (value if isinstance(value, str) else json.dumps(value))[:_LONGEST]


tracker = Tracker("mlflow", start, needs="mlflow", variables=("MLFLOW_",))
