"""``tunesmith jobs`` and ``submit``."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from app.client import Client, ServiceError
from app.commands.embedded import service_for
from app.commands.show import as_json, err, finished, follow, label, out, service, table

group = typer.Typer(help="Submitted work.", no_args_is_help=True)
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]
Follow = Annotated[bool, typer.Option("--follow", help="Wait, with a live bar.")]


def submit(
    path: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A job spec, YAML or JSON.")],
    follow_: Follow = False,
    json: AsJson = False,
) -> None:
    """Submits a job spec as it is."""
    media = "application/json" if path.suffix == ".json" else "application/yaml"
    with service_for() as client:
        submitted(client, client.submit_text(path.read_bytes(), media), follow_, json)


def submitted(
    client: Client, job: dict[str, Any], wait: bool, json: bool, report: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Shows a job that was submitted; waits for it if that was asked for, or if the service is only here for it.

    ``report`` prints what it found out, for people. Exits 1 unless the job succeeded.
    """
    if not (wait or client.embedded):
        as_json(job) if json else out.print(f"{job['id']}  {job['status']}  {job['experiment_name']}", markup=False)
        return job
    try:
        if json:
            for _ in client.follow(job["id"]):
                pass
            job = client.call("GET", f"/jobs/{job['id']}")
            as_json(job)
        else:
            job = follow(client, job["id"], job["algorithm"] or job["type"])
    except KeyboardInterrupt:
        _let_go(client, job["id"])
        raise
    except ServiceError as error:
        if error.status in (0, 503):  # e.g. another command's service, which ended with that command
            error.hint = f"The job is kept: tunesmith up, then tunesmith jobs follow {job['id']}"
        raise
    if report and not json:
        report(job)
    finished(client, job)
    if not json:
        left = [client.call("GET", f"/artifacts/{artifact_id}") for artifact_id in job["artifact_ids"]]
        names = ", ".join(f"{label(artifact)} ({artifact['id']})" for artifact in left)
        out.print(f"{job['id']} succeeded: {names or 'no artifacts'}", markup=False)
    return job


def _let_go(client: Client, job_id: str) -> None:
    """Ctrl-C: a job of a service that stays goes on; one of ours is put on hold, or it would begin again by itself."""
    if not client.embedded:
        err.print(f"{job_id} goes on; tunesmith jobs follow {job_id}, or tunesmith jobs cancel {job_id}", markup=False)
        return
    with contextlib.suppress(ServiceError):
        client.call("POST", f"/jobs/{job_id}/pause")
    err.print(f"{job_id} is on hold; go on with tunesmith up and tunesmith jobs resume {job_id}", markup=False)


@group.command("list")
def list_jobs(limit: int = 20, status: str | None = None, json: AsJson = False) -> None:
    """Jobs, newest first."""
    with service() as client:
        query = {"limit": limit, **({"status": status} if status else {})}
        answer = client.call("GET", "/jobs", params=query)
    columns = ["id", "type", "algorithm", "status", "experiment_name", "created_at"]
    as_json(answer) if json else table(answer["data"], columns)


@group.command()
def show(job_id: str) -> None:
    """One job, as JSON."""
    with service() as client:
        as_json(client.call("GET", f"/jobs/{job_id}"))


@group.command("follow")
def follow_job(job_id: str) -> None:
    """A live bar until the job is final; exits 0 only if it succeeded."""
    with service() as client:
        finished(client, follow(client, job_id, "job"))


@group.command()
def logs(job_id: str, tail_bytes: int = 65536) -> None:
    """The end of a job's log."""
    with service() as client:
        print(client.call("GET", f"/jobs/{job_id}/logs", params={"tail_bytes": tail_bytes}))


@group.command()
def cancel(job_id: str) -> None:
    """Cancels a job."""
    _control(job_id, "cancel")


@group.command()
def pause(job_id: str) -> None:
    """Puts a job on hold; one that runs saves a checkpoint first."""
    _control(job_id, "pause")


@group.command()
def resume(job_id: str) -> None:
    """Takes a job off hold; it goes on from its last checkpoint."""
    _control(job_id, "resume")


@group.command()
def retry(job_id: str) -> None:
    """Runs a failed or cancelled job again, as a new one."""
    _control(job_id, "retry")


def _control(job_id: str, verb: str) -> None:
    with service() as client:
        job = client.call("POST", f"/jobs/{job_id}/{verb}")
    out.print(f"{job['id']} is {job['status']}", markup=False)
