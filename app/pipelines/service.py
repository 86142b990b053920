"""Pipelines: all jobs or none, in one transaction; what they are doing; one cancel, one retry for all."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.artifacts import references
from app.catalog import Catalog
from app.errors import AppError, BadRequest, Code, Conflict, IdempotencyKeyReused, NotFound
from app.jobs import controls, kinds
from app.jobs.intake import Intake, describe, validate_spec
from app.jobs.show import shown
from app.jobs.submission import Submission, check_disk, set_at, sha256_of
from app.models import Job, Pipeline, PipelineStep, new_id, now
from app.paging import Page, page_of
from app.pipelines import graph, repository
from app.pipelines.schemas import PipelineBrief, PipelineIn, PipelineOut, PipelineStatus, StepOut
from app.projects.caller import Caller
from app.settings import Settings
from app.states import JobState

_OF_A_JOB = ("ftjob-", "job-")
_PUBLISHERS = ("deploy", "push_to_hub")


@dataclass(frozen=True)
class Step:
    """A step as it was asked for."""

    name: str
    body: dict[str, Any]
    intake: Intake
    after: list[str] = field(default_factory=list)
    named: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Field → kind of the field, and the step that it names."""
    warnings: list[str] = field(default_factory=list)

    def edges(self) -> dict[str, str]:
        """Field → the step that it waits for."""
        return {
            **{path: other for path, (_, other) in self.named.items()},
            **{f"after.{i}": s for i, s in enumerate(self.after)},
        }


def read(data: Any, catalog: Catalog) -> tuple[PipelineIn, list[Step]]:
    """Validates a request: every spec, every name, no cycle, kinds that fit. Raises BadRequest with the full path."""
    if not isinstance(data, dict):
        raise BadRequest("a pipeline is an object", code=Code.INVALID_TYPE, hint='Start with {"jobs": {…}}.')
    try:
        asked = PipelineIn.model_validate(data)
    except ValidationError as error:
        raise describe(error, PipelineIn) from error
    steps = {name: _step(name, body, catalog) for name, body in asked.jobs.items()}
    order = graph.order({name: step.edges() for name, step in steps.items()})
    for step in steps.values():
        for path, (kind, other) in step.named.items():
            source = steps[other].intake.spec
            left = kinds.left_by(source.type, getattr(source, "algorithm", None), source.model_dump(mode="json"))
            with _within(step.name):
                kinds.check(step.intake.spec, path, kind, f"job:{other}", left, source.type)
    for publisher, exam in graph.heedless(
        {name: step.edges() for name, step in steps.items()},
        [name for name, step in steps.items() if step.intake.spec.type in _PUBLISHERS],
        [name for name, step in steps.items() if getattr(step.intake.spec, "gate", None) is not None],
    ):
        steps[publisher].warnings.append(
            f"does not wait for {exam}, and comes out whatever its gate says; after: [{exam}] makes it wait"
        )
    return asked, [steps[name] for name in order]


def _step(name: str, body: dict[str, Any], catalog: Catalog) -> Step:
    body = dict(body)
    after = body.pop("after", [])
    if not isinstance(after, list) or not all(isinstance(item, str) for item in after):
        raise BadRequest(
            f"jobs.{name}.after: must be a list of step names", param=f"jobs.{name}.after", code=Code.INVALID_TYPE
        )
    with _within(name):
        intake = validate_spec(body, catalog)
    named = {
        path: (kind, value.removeprefix("job:"))
        for path, kind, value in references.references(intake.spec)
        if value.startswith("job:") and not value.removeprefix("job:").startswith(_OF_A_JOB)
    }
    return Step(name, body, intake, after, named)


class _within:
    """Errors of a step name it: ``model.peft_config.r`` becomes ``jobs.sft.model.peft_config.r``."""

    def __init__(self, step: str) -> None:
        self._prefix = f"jobs.{step}."

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, AppError):
            where = self._prefix + (error.param or "")
            error.message = self._prefix + error.message if error.param else f"{where.rstrip('.')}: {error.message}"
            error.param = where.rstrip(".")


def create(
    session: Session,
    settings: Settings,
    catalog: Catalog,
    caller: Caller,
    data: Any,
    idempotency_key: str | None,
) -> PipelineOut:
    """Stores the pipeline and all its jobs, or nothing."""
    asked, steps = read(data, catalog)
    fingerprint = sha256_of(data)
    if earlier := _earlier(session, caller, idempotency_key, fingerprint):
        return earlier
    check_disk(settings)
    pipeline = Pipeline(
        id=new_id("pipe"),
        project_id=caller.project_id,
        created_by=caller.key_id,
        name=asked.name or f"pipeline_{now():%Y%m%d}",
        spec=data,
        labels=asked.metadata,
        idem_key=idempotency_key,
        idem_sha256=fingerprint,
    )
    try:
        with session.begin_nested():
            session.add(pipeline)
            session.flush()
    except IntegrityError:
        # Somebody sent the same key at the same moment and was faster.
        if earlier := _earlier(session, caller, idempotency_key, fingerprint):
            return earlier
        raise
    submission = Submission(session, settings, catalog, caller)
    made: dict[str, str] = {}
    positions = {name: place for place, name in enumerate(asked.jobs)}
    for step in steps:
        body = copy.deepcopy(step.body)
        if asked.name is not None:
            body.setdefault("experiment_name", f"{asked.name}_{step.name}"[:63])
        for path, (_, other) in step.named.items():
            set_at(body, path, f"job:{made[other]}")
        with _within(step.name):
            intake = validate_spec(body, catalog)
            intake.warnings.extend(step.warnings)
            job = submission.add(intake, [made[other] for other in step.after], pipeline_id=pipeline.id)
        made[step.name] = job.id
        session.add(PipelineStep(pipeline_id=pipeline.id, name=step.name, position=positions[step.name], job_id=job.id))
        session.flush()
    return show(session, caller.project_id, pipeline.id)


def _earlier(session: Session, caller: Caller, key: str | None, fingerprint: str) -> PipelineOut | None:
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


def show(session: Session, project_id: str, pipeline_id: str) -> PipelineOut:
    """One pipeline with the newest job of each step. Raises NotFound."""
    row = _existing(session, project_id, pipeline_id)
    jobs = repository.jobs(session, [row.id])[row.id]
    outs = {out.id: out for out in shown(session, jobs)}
    steps = repository.steps(session, [row.id])[row.id]
    names = {step.job_id: step.name for step in steps}
    return PipelineOut(
        id=row.id,
        name=row.name,
        status=status_of(jobs),
        steps=[
            StepOut(
                name=step.name,
                depends_on=sorted({names[parent] for parent in outs[step.job_id].depends_on if parent in names}),
                job=outs[step.job_id],
            )
            for step in steps
        ],
        follow_ups=[out for out in outs.values() if out.id not in names],
        metadata=row.labels,
        created_at=row.created_at,
        finished_at=max((job.finished_at for job in jobs if job.finished_at), default=None)
        if all(JobState(job.state).terminal for job in jobs)
        else None,
    )


def listing(session: Session, project_id: str, limit: int, after: str | None) -> Page[PipelineBrief]:
    """Newest first."""
    cursor = _existing(session, project_id, after, "after") if after else None
    rows = repository.page(session, project_id, limit, cursor)
    ids = [row.id for row in rows]
    steps, jobs = repository.steps(session, ids), repository.jobs(session, ids)
    briefs = [
        PipelineBrief(
            id=row.id,
            name=row.name,
            status=status_of(jobs[row.id]),
            jobs={step.name: step.job_id for step in steps[row.id]},
            metadata=row.labels,
            created_at=row.created_at,
        )
        for row in rows
    ]
    return page_of(briefs, limit, ids)


def status_of(jobs: Sequence[Job]) -> PipelineStatus:
    """One word for all of them: what still moves comes first, then what went wrong."""
    states = {JobState(job.state) for job in jobs}
    if JobState.RUNNING in states:
        return "running"
    if JobState.QUEUED in states:
        waiting = [job for job in jobs if job.state == JobState.QUEUED]
        if all(job.paused_at is not None or job.blocked_by for job in waiting) and any(
            job.paused_at for job in waiting
        ):
            return "paused"
        return "running" if len(states) > 1 else "queued"
    if JobState.FAILED in states:
        return "failed"
    return "cancelled" if JobState.CANCELLED in states else "succeeded"


def cancel(session: Session, project_id: str, pipeline_id: str) -> tuple[PipelineOut, bool]:
    """Cancels whatever is not final. True when nothing is left that still has to stop."""
    _existing(session, project_id, pipeline_id)
    for job in repository.jobs(session, [pipeline_id])[pipeline_id]:
        session.refresh(job)  # cancelling one cancels those that wait for it
        if not JobState(job.state).terminal:
            controls.cancel(session, project_id, job.id)
    session.flush()
    out = show(session, project_id, pipeline_id)
    return out, all(JobState(job.state).terminal for job in repository.jobs(session, [pipeline_id])[pipeline_id])


def retry(session: Session, settings: Settings, catalog: Catalog, caller: Caller, pipeline_id: str) -> PipelineOut:
    """Makes every job anew that failed or was cancelled, and what fell with it; what succeeded is used again."""
    _existing(session, caller.project_id, pipeline_id)
    submission = Submission(session, settings, catalog, caller)
    again = 0
    for job in repository.jobs(session, [pipeline_id])[pipeline_id]:
        fallen = job.state in (JobState.FAILED, JobState.CANCELLED) and job.error_code != "dependency_failed"
        if fallen:
            controls.retry(session, caller.project_id, job.id, submission.again)
            again += 1
    if not again:
        raise Conflict(
            "nothing in this pipeline failed or was cancelled",
            param="pipeline_id",
            hint="POST /pipelines starts another.",
        )
    return show(session, caller.project_id, pipeline_id)


def _existing(session: Session, project_id: str, pipeline_id: str, param: str = "pipeline_id") -> Pipeline:
    row = repository.get(session, project_id, pipeline_id)
    if row is None:
        raise NotFound(f"there is no pipeline {pipeline_id}", param=param)
    return row
