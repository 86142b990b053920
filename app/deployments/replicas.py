"""Rows of a deployment's replicas: their moves, and what the deployment is by what they do."""

from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import Select, delete, func, select, update
from sqlalchemy.orm import Session

from app.deployments import loaded
from app.jobs import repository as jobs
from app.jobs.repository import Move
from app.models import Deployment, DeploymentAdapter, DeploymentReplica, Job, new_id, now
from app.specs import ServeSpec
from app.states import DEPLOYMENT_LIVE, DEPLOYMENT_MOVES, TERMINAL, WAKING, DeploymentState, Desired, JobState

MAX_RESTARTS = 10_000  # a replica's attempts are counted on its own row
ANSWER = (DeploymentState.READY, DeploymentState.UNHEALTHY)
_BEST_FIRST = (
    *ANSWER,
    DeploymentState.STARTING,
    DeploymentState.QUEUED,
    DeploymentState.SLEEPING,
)


def add(session: Session, row: Deployment, generation: int, model: str, artifact_id: str | None, options: Any) -> str:
    """One more engine of a deployment: its row, and the job that keeps it alive. Returns its id."""
    spec = ServeSpec.model_validate(
        {**options, "model": model, "name": row.name, "deployment_id": row.id, "experiment_name": row.name}
    ).model_dump(mode="json")
    job = Job(
        id=new_id("job"),
        project_id=row.project_id,
        created_by=row.created_by,
        type="serve",
        algorithm=None,
        experiment_name=row.name,
        spec=spec,
        spec_sha256="",
        resolved_spec=spec,
        slot_class="serve",
        gpus=int(options.get("tensor_parallel_size") or 1),
        min_vram_gb=options.get("min_vram_gb"),
        max_attempts=MAX_RESTARTS,
        deployment_id=row.id,
    )
    jobs.add(session, job)
    session.flush()
    session.add(
        DeploymentReplica(id=job.id, deployment_id=row.id, generation=generation, artifact_id=artifact_id, loaded={})
    )
    session.flush()
    return job.id


def of(session: Session, deployment_ids: Collection[str]) -> dict[str, list[DeploymentReplica]]:
    """By deployment those that are not over, oldest first."""
    found: dict[str, list[DeploymentReplica]] = {deployment_id: [] for deployment_id in deployment_ids}
    query = select(DeploymentReplica).where(
        DeploymentReplica.deployment_id.in_(deployment_ids), DeploymentReplica.status.in_(DEPLOYMENT_LIVE)
    )
    for row in session.scalars(query.order_by(DeploymentReplica.created_at, DeploymentReplica.id)):
        found[row.deployment_id].append(row)
    return found


def answering(row: Deployment, every: Sequence[DeploymentReplica]) -> list[DeploymentReplica]:
    """Of a deployment's replicas those to which requests go now, in the same order."""
    return [
        one
        for one in every
        if one.generation == row.generation and not one.retiring and one.status in ANSWER and one.socket is not None
    ]


def move(
    session: Session,
    replica_id: str,
    to: DeploymentState,
    *,
    only_from: Collection[DeploymentState] | None = None,
    unused_since: Any = ...,
    **values: Any,
) -> bool:
    """A step of one engine, if the table allows it from where it is; its deployment follows.

    ``unused_since``: only while the deployment's ``used_at`` is still this.
    """
    row = _locked(session, replica_id)
    if row is None or (unused_since is not ... and row.used_at != unused_since):
        return False
    origins = {state for state, targets in DEPLOYMENT_MOVES.items() if to in targets or state == to}
    if to in (DeploymentState.STOPPED, DeploymentState.FAILED):
        values["socket"] = None
    if to != DeploymentState.READY and to != DeploymentState.UNHEALTHY:
        values["loaded"] = {}
    if to == DeploymentState.READY:
        values["ready_at"] = now()
    guards = [
        DeploymentReplica.id == replica_id,
        DeploymentReplica.status.in_(origins & set(only_from or origins)),
    ]
    if to == DeploymentState.STARTING:
        guards.append(DeploymentReplica.retiring.is_(False))
    moved = session.scalar(
        update(DeploymentReplica).where(*guards).values({"status": to, **values}).returning(DeploymentReplica.id)
    )
    session.expire_all()
    if moved is None:
        return False
    if to in (DeploymentState.STARTING, DeploymentState.QUEUED):
        loaded.what_is_gone_is_waited_for(session, row.id)
    if to == DeploymentState.READY:
        session.execute(update(Job).where(Job.id == replica_id, Job.phase == WAKING).values(phase=None))
    if "last_error" in values and session.get_one(DeploymentReplica, replica_id).generation == row.generation:
        row.last_error = values["last_error"]
    settle(session, row)
    return True


def _locked(session: Session, replica_id: str) -> Deployment | None:
    """The replica's deployment: two replicas that move at once must see each other."""
    own = select(DeploymentReplica.deployment_id).where(DeploymentReplica.id == replica_id).scalar_subquery()
    return session.scalar(select(Deployment).where(Deployment.id == own).with_for_update())


def lock(session: Session, deployment_id: str) -> Deployment | None:
    """The deployment, for a transaction that moves several rows: always this one before its jobs."""
    return session.get(Deployment, deployment_id, with_for_update=True)


def settle(session: Session, row: Deployment) -> None:
    """The deployment is what the best of its replicas is; over when all of them are. The row is locked."""
    if row.status not in DEPLOYMENT_LIVE:
        return
    session.flush()
    every = session.scalars(select(DeploymentReplica).where(DeploymentReplica.deployment_id == row.id)).all()
    serving = [replica for replica in every if replica.generation == row.generation]
    living = [replica.status for replica in serving if replica.status in DEPLOYMENT_LIVE]
    # What is on its way out, or on its way in, serves nobody: it counts only while there is nothing else.
    first = [replica.status for replica in serving if replica.status in DEPLOYMENT_LIVE and not replica.retiring]
    if living:
        status = next(state for state in _BEST_FIRST if state in (first or living))
    elif any(replica.status in DEPLOYMENT_LIVE and not replica.retiring for replica in every):
        status = DeploymentState.QUEUED
    else:
        failed = row.desired != Desired.STOPPED and any(one.status == DeploymentState.FAILED for one in serving)
        status = DeploymentState.FAILED if failed else DeploymentState.STOPPED
    if status == DeploymentState.READY and row.status != DeploymentState.READY:
        row.ready_at = max((one.ready_at for one in serving if one.ready_at is not None), default=now())
    row.status = status
    row.restarts = sum(replica.restarts for replica in serving)
    row.parity = next((replica.parity for replica in serving if replica.parity is not None), row.parity)
    if status not in DEPLOYMENT_LIVE:
        row.stopped_at, row.coming = now(), None
        # Their names are free again.
        session.execute(delete(DeploymentAdapter).where(DeploymentAdapter.deployment_id == row.id))
    session.flush()
    session.expire_all()


def next_generation(session: Session, row: Deployment) -> int:
    """A number that no replica of the deployment has had."""
    query = select(func.max(DeploymentReplica.generation)).where(DeploymentReplica.deployment_id == row.id)
    return (session.scalar(query) or row.generation) + 1


def stop(session: Session, replica: DeploymentReplica, why: str = "The deployment was stopped.") -> bool:
    """Cancels its job, at once if that only waits; an engine that runs finishes what it computes, and is ended.

    False: that was asked for before.
    """
    job = session.get(Job, replica.id)
    cancelled = Move(JobState.CANCELLED, "job_cancelled", why)
    if job is None or JobState(job.state).terminal or jobs.transition(session, job.id, JobState.QUEUED, cancelled):
        return move(session, replica.id, DeploymentState.STOPPED)
    asked = Move(JobState.RUNNING, "cancel_requested", why, values={"cancel_requested_at": now()})
    return jobs.note(session, job.id, asked, Job.state == JobState.RUNNING, Job.cancel_requested_at.is_(None))


def orphans() -> Select[DeploymentReplica, Job]:
    """Replicas that are not over though their job is."""
    return (
        select(DeploymentReplica, Job)
        .join(Job, Job.id == DeploymentReplica.id)
        .where(DeploymentReplica.status.in_(DEPLOYMENT_LIVE), Job.state.in_([str(state) for state in TERMINAL]))
    )


def wake(session: Session, row: Deployment) -> bool:
    """Those of a deployment's replicas that sleep are to serve again; their jobs go on. False when none sleeps."""
    if lock(session, row.id) is None:
        return False
    asleep = [replica.id for replica in of(session, [row.id])[row.id] if replica.status == DeploymentState.SLEEPING]
    woken = [one for one in asleep if move(session, one, DeploymentState.QUEUED)]
    if woken:
        # Who was asked again was not idle after all: the job that it was to make room for goes no longer before it.
        woken_values = {"paused_at": None, "eligible_at": now(), "phase": WAKING, "preempt_for": None}
        # Whatever a job is doing: a replica that is still ending finds its row awake, and starts again.
        session.execute(update(Job).where(Job.id.in_(woken)).values(**woken_values))
        session.expire_all()
    return bool(woken)


def wakes(session: Session, every: Sequence[DeploymentReplica]) -> bool:
    """Whether one of them was woken and is on its way back."""
    own = [one.id for one in every]
    return session.scalar(select(Job.id).where(Job.id.in_(own), Job.phase == WAKING).limit(1)) is not None


def has_loaded(session: Session, replica_id: str, name: str, model: str | None) -> None:
    """What one engine has: ``model`` under ``name``, or with None nothing any more."""
    row = session.get(DeploymentReplica, replica_id, with_for_update=True)
    if row is None:
        return
    kept = {other: reference for other, reference in row.loaded.items() if other != name}
    row.loaded = kept | ({name: model} if model is not None else {})
    session.flush()


def asks_for_parity(session: Session, replica_id: str) -> bool:
    """Whether this one is to find out if the engine says what the model says: the oldest of its generation, once."""
    own = session.get(DeploymentReplica, replica_id)
    if own is None:
        return False
    peers = [one for one in of(session, [own.deployment_id])[own.deployment_id] if one.generation == own.generation]
    return peers[:1] == [own] and all(one.parity is None for one in peers)


def certify(session: Session, replica_id: str, certificate: dict[str, Any]) -> None:
    """Keeps whether its engine says what the model says; its deployment shows it."""
    row = _locked(session, replica_id)
    if row is not None:
        session.execute(update(DeploymentReplica).where(DeploymentReplica.id == replica_id).values(parity=certificate))
        session.expire_all()
        settle(session, row)
