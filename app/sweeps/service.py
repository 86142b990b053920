"""Sweeps: every job or none, in one transaction; which of them did best; one cancel for all."""

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.catalog import Catalog
from app.errors import AppError, BadRequest, Code, IdempotencyKeyReused, NotFound
from app.jobs import controls
from app.jobs.intake import Intake, describe, validate_spec
from app.jobs.show import shown
from app.jobs.submission import Submission, check_disk, sha256_of
from app.models import Job, Sweep, SweepPoint, new_id, now
from app.paging import Page, page_of
from app.projects.caller import Caller
from app.settings import Settings
from app.states import JobState
from app.sweeps import repository
from app.sweeps.points import points
from app.sweeps.schemas import PointOut, SweepBrief, SweepIn, SweepOut


def read(data: Any, catalog: Catalog) -> tuple[SweepIn, str, list[tuple[dict[str, Any], Intake]]]:
    """Validates a request and every job that it would make. Raises BadRequest with the field's path."""
    if not isinstance(data, dict):
        raise BadRequest("a sweep is an object", code=Code.INVALID_TYPE, hint='Start with {"spec": {…}, "matrix": …}.')
    try:
        asked = SweepIn.model_validate(data)
    except ValidationError as error:
        raise describe(error, SweepIn) from error
    try:
        validate_spec(asked.spec, catalog)
    except AppError as error:
        error.param = f"spec.{error.param}" if error.param else "spec"
        error.message = f"spec: {error.message}"
        raise
    name = asked.name or f"sweep_{now():%Y%m%d}"
    jobs = []
    for number, point in enumerate(points(asked), 1):
        body = copy.deepcopy(asked.spec)
        for path, value in point.items():
            _put(body, path, value)
        body["experiment_name"] = f"{name[:57]}_{number}"
        with _placed(point):
            jobs.append((point, validate_spec(body, catalog)))
    return asked, name, jobs


@contextlib.contextmanager
def _placed(point: Mapping[str, Any]) -> Iterator[None]:
    """What is wrong with a job is told as it stands in the request: in its matrix, or in its spec."""
    try:
        yield
    except AppError as error:
        field = error.param
        at_fault = next((path for path in point if field and field.startswith(path)), None)
        error.param = f"matrix.{at_fault}" if at_fault else f"spec.{field}" if field else "spec"
        error.message = f"{error.param}: {error.message}"
        raise


def _put(body: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    place: Any = body
    for step in parents:
        place = place.setdefault(step, {})
        if not isinstance(place, dict):
            raise BadRequest(
                f"matrix.{path}: {step} is no object", param=f"matrix.{path}", hint="Write e.g. training.learning_rate."
            )
    place[last] = value


def create(
    session: Session, settings: Settings, catalog: Catalog, caller: Caller, data: Any, idempotency_key: str | None
) -> SweepOut:
    """Stores the sweep and all its jobs, or nothing."""
    asked, name, jobs = read(data, catalog)
    fingerprint = sha256_of(data)
    if earlier := _earlier(session, caller, idempotency_key, fingerprint):
        return earlier
    check_disk(settings)
    sweep = Sweep(
        id=new_id("sweep"),
        project_id=caller.project_id,
        created_by=caller.key_id,
        name=name,
        spec=asked.spec,
        matrix=data["matrix"],
        options={"metric": asked.metric, "goal": asked.goal, "strategy": asked.strategy},
        max_parallel=asked.max_parallel,
        labels=asked.metadata,
        idem_key=idempotency_key,
        idem_sha256=fingerprint,
    )
    try:
        with session.begin_nested():
            session.add(sweep)
            session.flush()
    except IntegrityError:
        # Somebody sent the same key at the same moment and was faster.
        if earlier := _earlier(session, caller, idempotency_key, fingerprint):
            return earlier
        raise
    submission = Submission(session, settings, catalog, caller)
    for number, (point, intake) in enumerate(jobs):
        with _placed(point):
            job = submission.add(intake, [], sweep_id=sweep.id)
        session.add(SweepPoint(sweep_id=sweep.id, position=number, job_id=job.id, point=point))
    session.flush()
    return show(session, caller.project_id, sweep.id)


def _earlier(session: Session, caller: Caller, key: str | None, fingerprint: str) -> SweepOut | None:
    row = repository.by_idempotency_key(session, caller.project_id, key) if key is not None else None
    if row is None:
        return None
    if row.idem_sha256 != fingerprint:
        raise IdempotencyKeyReused(
            "this Idempotency-Key came before with another body",
            param="Idempotency-Key",
            hint="Use a new key for a new request.",
        )
    return show(session, caller.project_id, row.id)


def show(session: Session, project_id: str, sweep_id: str) -> SweepOut:
    """One sweep, its best point first. Raises NotFound."""
    row = _existing(session, project_id, sweep_id)
    found = repository.points(session, sweep_id)
    outs = {out.id: out for out in shown(session, [job for _, job in found])}
    listed = [
        PointOut(point=point.point, value=value_of(job, row.options["metric"]), job=outs[job.id])
        for point, job in found
    ]
    sign = 1 if row.options["goal"] == "minimize" else -1
    listed.sort(key=lambda item: math.inf if item.value is None else sign * item.value)
    best = listed[0].job.id if listed and listed[0].value is not None else None
    brief = _brief(row).model_dump()
    return SweepOut(**brief, status=_status([job for _, job in found]), best=best, points=listed)


def value_of(job: Job, metric: str) -> float | None:
    """A number of a finished job's result; None for one that is missing or no finite number."""
    value = (job.result or {}).get(metric)
    if job.state != JobState.SUCCEEDED or isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _status(jobs: list[Job]) -> Any:
    states = {JobState(job.state) for job in jobs}
    if JobState.RUNNING in states or (JobState.QUEUED in states and len(states) > 1):
        return "running"
    if JobState.QUEUED in states:
        return "queued"
    if JobState.SUCCEEDED in states:
        return "succeeded"  # some points may have failed: a sweep is there to find that out
    return "failed" if JobState.FAILED in states else "cancelled"


def _brief(row: Sweep) -> SweepBrief:
    return SweepBrief(
        id=row.id,
        name=row.name,
        metric=row.options["metric"],
        goal=row.options["goal"],
        max_parallel=row.max_parallel,
        metadata=row.labels,
        created_at=row.created_at,
    )


def listing(session: Session, project_id: str, limit: int, after: str | None) -> Page[SweepBrief]:
    """Newest first."""
    cursor = _existing(session, project_id, after, "after") if after else None
    rows = repository.page(session, project_id, limit, cursor)
    return page_of([_brief(row) for row in rows], limit, [row.id for row in rows])


def cancel(session: Session, project_id: str, sweep_id: str) -> tuple[SweepOut, bool]:
    """Cancels every job that is not final. True when nothing is left that still has to stop."""
    _existing(session, project_id, sweep_id)
    for _, job in repository.points(session, sweep_id):
        if not JobState(job.state).terminal:
            controls.cancel(session, project_id, job.id)
    session.flush()
    out = show(session, project_id, sweep_id)
    return out, all(JobState(job.state).terminal for _, job in repository.points(session, sweep_id))


def _existing(session: Session, project_id: str, sweep_id: str, param: str = "sweep_id") -> Sweep:
    row = repository.get(session, project_id, sweep_id)
    if row is None:
        raise NotFound(f"there is no sweep {sweep_id}", param=param)
    return row
