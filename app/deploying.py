"""Deploy jobs, which compute nothing: makes what they ask for and watches it; a step of the reconciler.

A whole model gets a deployment of its own. An adapter is loaded into a deployment of its base, which is started where
none runs; an adapter that no engine can load is merged first, and the deploy job waits for that.
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from sqlalchemy import and_, or_, select
from sqlalchemy.orm import Session

from app.artifacts import inspect, references
from app.catalog import Catalog
from app.crashpoints import reached
from app.db import Database, after_commit
from app.deployments import adapters, hotload, loaded, replicas, service
from app.deployments.adapters import Looked
from app.errors import AppError, Code, Conflict
from app.jobs import claims
from app.jobs import repository as jobs
from app.jobs.intake import validate_spec
from app.jobs.repository import Move
from app.jobs.submission import Submission
from app.models import Deployment, DeploymentAdapter, Job, JobDependency, now
from app.projects.caller import Caller
from app.queue import AnyDoorbell
from app.settings import Settings
from app.specs import DeploymentOptions, DeploySpec
from app.states import DEPLOYMENT_LIVE, AdapterState, DeploymentState, JobState

log = logging.getLogger(__name__)
CONTROLLER = "reconciler"


class DeployJobs:
    """Every step is guarded: any number of processes may take it at once."""

    def __init__(self, settings: Settings, database: Database, catalog: Catalog, doorbell: AnyDoorbell) -> None:
        self._settings = settings
        self._database = database
        self._catalog = catalog
        self._doorbell = doorbell

    def tick(self) -> None:
        """One look at all of them."""
        open_ = (
            Job.slot_class == "control",
            Job.blocked_by == 0,
            or_(Job.state == JobState.RUNNING, and_(Job.state == JobState.QUEUED, Job.paused_at.is_(None))),
        )
        with self._database.read() as session:
            waiting = session.scalars(select(Job).where(*open_)).all()
        if not waiting:
            return
        self._start({job.id: self._look(job) for job in waiting if job.state == JobState.QUEUED})
        self._settle()

    def _look(self, job: Job) -> Looked | AppError | None:
        """What a job's adapter is like; None for a whole model. Reads files, so no transaction is open."""
        try:
            spec = DeploySpec.model_validate(job.resolved_spec)
            with self._database.read() as session:
                found = references.resolve(session, self._settings, job.project_id, spec.model, param="model")
            if found.folder is None or not inspect.looks_like_adapter(found.folder):
                return None
            with self._database.read() as session:
                candidate = hotload.find(session, self._settings, job.project_id, spec.model, param="model")
            return Looked(candidate, spec.name, hotload.fault(candidate))
        except AppError as error:
            return error

    def _start(self, looked: dict[str, Looked | AppError | None]) -> None:
        while looked:
            with self._database.write() as session:
                job = claims.claim(session, CONTROLLER, "control", ["control"])
                if job is None:
                    return
                if job.id not in looked:  # it came after the look
                    session.rollback()
                    return
                after_commit(session, self._doorbell.ring)
                found = looked.pop(job.id)
                try:
                    with session.begin_nested():
                        self._make(session, job, found)
                except AppError as error:
                    _fail(session, job, str(error.code), error.message, error.hint)
                except (OSError, ValueError) as error:  # one model that cannot be read must not hold up the others
                    log.exception("deploy job %s cannot start", job.id)
                    _fail(session, job, "model_invalid", f"the model cannot be read: {error}", None)
                reached("deploy.before_commit")

    def _make(self, session: Session, job: Job, found: Looked | AppError | None) -> None:
        if isinstance(found, AppError):
            raise found
        spec = DeploySpec.model_validate(job.resolved_spec)
        if found is None:
            row = self._deployment(session, job, spec.name, spec.model, spec)
        elif found.fault is not None or spec.hot_load is False or spec.task == "embed":
            asked = "task is embed" if spec.task == "embed" else "hot_load is false"
            self._merge_first(session, job, spec, found.fault or asked)
            return
        else:
            adapters.check_free(session, job.project_id, spec.name)
            row = self._of_base(session, job, spec, found)
            adapters.attach(session, row, found, job.created_by, param="model")
            if row.status == DeploymentState.SLEEPING:
                replicas.wake(session, row)
        session.get_one(Job, job.id).deployment_id = row.id

    def _deployment(self, session: Session, job: Job, name: str, model: str, options: DeploymentOptions) -> Deployment:
        return service.create(
            session,
            self._settings,
            self._catalog,
            project_id=job.project_id,
            key_id=job.created_by,
            name=name,
            model=model,
            options=options,
        )

    def _of_base(self, session: Session, job: Job, spec: DeploySpec, found: Looked) -> Deployment:
        """The deployment of the adapter's base that is nearest to answering, else a new one."""
        assert found.candidate.adapter.folder is not None
        rank = hotload.rank_of(found.candidate.adapter.folder)
        running = adapters.nearest(session, job.project_id, found.candidate, rank, spec)
        if running is not None:
            return running
        root = found.candidate.root
        options = DeploymentOptions.model_validate(
            {
                **spec.model_dump(include=set(DeploymentOptions.model_fields)),
                "hot_load": True,
                "max_lora_rank": hotload.room_for(rank, spec.max_lora_rank),
            }
        )
        plain = root.artifact.name if root.artifact is not None else Path(root.pinned).name
        name = self._free_name(session, job.project_id, re.sub(r"[^A-Za-z0-9._-]+", "-", plain).lstrip("._-")[:56])
        row = self._deployment(session, job, name, root.pinned, options)
        message = f"A deployment of the base is started as {name}; the adapter is loaded into it."
        jobs.note(session, job.id, Move(JobState.RUNNING, "base_started", message, data={"deployment_id": row.id}))
        return row

    def _free_name(self, session: Session, project_id: str, name: str) -> str:
        for candidate in (name or "base", f"{name}_base", *(f"{name}_b{number}" for number in range(2, 100))):
            try:
                adapters.check_free(session, project_id, candidate)
            except Conflict:
                continue
            return candidate
        raise Conflict(f"there is no free name like {name}")

    def _merge_first(self, session: Session, job: Job, spec: DeploySpec, why: str) -> None:
        """The job waits for a merge, and deploys what that leaves."""
        body = {
            "type": "merge",
            "adapter": spec.model,
            "output_name": f"{spec.name[:56]}_merged",
            "experiment_name": job.experiment_name,
            "priority": job.priority,
        }
        caller = Caller(job.project_id, job.created_by or "", frozenset())
        submission = Submission(session, self._settings, self._catalog, caller)
        merge = submission.add(validate_spec(body, self._catalog), [], pipeline_id=job.pipeline_id)
        merge.created_by = job.created_by
        session.add(JobDependency(job_id=job.id, parent_id=merge.id))
        message = f"{spec.model} cannot be loaded into a running engine: {why}. It is merged first."
        values = {
            **jobs.back_in_queue(),
            "resolved_spec": {**job.resolved_spec, "model": f"job:{merge.id}"},
            "blocked_by": 1,
            "eligible_at": None,
            "attempt": 0,
            "deployment_id": None,
        }
        move = Move(JobState.QUEUED, "merged_first", message, "warn", {"merge": merge.id, "reason": why}, values)
        jobs.transition(session, job.id, JobState.RUNNING, move, Job.fence == job.fence)

    def _settle(self) -> None:
        mine = (Job.slot_class == "control", Job.state == JobState.RUNNING)
        with self._database.write() as session:
            running = session.scalars(select(Job).where(*mine)).all()
            rows = _rows_of(session, running)
            for job in list(running):
                row = rows.get(job.deployment_id or "")
                if row is None:
                    _fail(session, job, "internal_error", "the deployment is gone", None)
                elif row.name == job.resolved_spec["name"]:
                    self._settle_model(session, job, row)
                else:
                    self._settle_adapter(session, job, row)
            # Only for a change: a ring brings everybody here again.
            if len(session.scalars(select(Job.id).where(*mine)).all()) != len(running):
                after_commit(session, self._doorbell.ring)

    def _settle_model(self, session: Session, job: Job, row: Deployment) -> None:
        if job.cancel_requested_at is not None:
            service.stop(session, row.project_id, row.id)
            _cancelled(session, job, "The deployment was stopped.")
        elif row.status == DeploymentState.READY:
            self._succeed(session, job, row)
        elif not self._failed_with(session, job, row) and self._waited_in_vain(row, job):
            service.stop(session, row.project_id, row.id)
            self._no_capacity(session, job, row)

    def _settle_adapter(self, session: Session, job: Job, row: Deployment) -> None:
        name = job.resolved_spec["name"]
        adapter = loaded.get(session, row.id, name)
        if job.cancel_requested_at is not None:
            loaded.drop(session, row.id, name)
            if self._started_for(session, row, job):
                service.stop(session, row.project_id, row.id)
            _cancelled(session, job, "The adapter was taken off.")
        elif self._failed_with(session, job, row):
            return
        elif adapter is None:
            _fail(session, job, str(Code.WRONG_STATE), f"the adapter was taken off {row.name}", None)
        elif adapter.status == AdapterState.READY and row.status == DeploymentState.READY:
            self._succeed(session, job, row, adapter)
        elif adapter.status == AdapterState.FAILED:
            reason = str((adapter.error or {}).get("message"))
            loaded.drop(session, row.id, name)
            try:
                with session.begin_nested():
                    self._merge_first(session, job, DeploySpec.model_validate(job.resolved_spec), reason)
            except AppError as error:
                _fail(session, job, str(error.code), error.message, error.hint)
        elif self._waited_in_vain(row, job):
            loaded.drop(session, row.id, name)
            if self._started_for(session, row, job):
                service.stop(session, row.project_id, row.id)
            self._no_capacity(session, job, row)

    @staticmethod
    def _started_for(session: Session, row: Deployment, job: Job) -> bool:
        """Whether nobody but this job has had anything of a deployment."""
        others = [entry for entry in loaded.of(session, [row.id])[row.id] if entry.name != job.resolved_spec["name"]]
        began = job.started_at or job.created_at
        return row.ready_at is None and not others and row.created_at >= began

    def _succeed(self, session: Session, job: Job, row: Deployment, adapter: DeploymentAdapter | None = None) -> None:
        name = row.name if adapter is None else adapter.name
        result = {"deployment_id": row.id, "name": name, "endpoint": f"{self._settings.base_url}/v1"}
        if adapter is not None:
            result["adapter_of"] = row.name
        move = Move(JobState.SUCCEEDED, "job_complete", f"{name} answers.", values={"result": result})
        jobs.transition(session, job.id, JobState.RUNNING, move, Job.fence == job.fence)

    def _failed_with(self, session: Session, job: Job, row: Deployment) -> bool:
        if row.status in DEPLOYMENT_LIVE:
            return False
        error = row.last_error or {"code": "engine_error", "message": f"the deployment is {row.status}"}
        _fail(session, job, str(error["code"]), str(error["message"]), error.get("hint"))
        return True

    @staticmethod
    def _waited_in_vain(row: Deployment, job: Job) -> bool:
        """Whether an engine has had no place to start for as long as a start may take."""
        if row.status != DeploymentState.QUEUED or row.restarts:
            return False
        waited: float = (now() - max(row.created_at, job.started_at or row.created_at)).total_seconds()
        return waited > float(row.options["start_timeout"])

    @staticmethod
    def _no_capacity(session: Session, job: Job, row: Deployment) -> None:
        message = f"no worker had a slot for an engine within {row.options['start_timeout']} s"
        hint = "GET /jobs shows what holds the slots; see TUNESMITH_SLOTS."
        _fail(session, job, "no_capacity", message, hint)


def _rows_of(session: Session, running: Sequence[Job]) -> dict[str, Deployment]:
    ids = [job.deployment_id for job in running if job.deployment_id]
    return {row.id: row for row in session.scalars(select(Deployment).where(Deployment.id.in_(ids)))}


def _cancelled(session: Session, job: Job, message: str) -> None:
    move = Move(JobState.CANCELLED, "job_cancelled", message, "warn")
    jobs.transition(session, job.id, JobState.RUNNING, move, Job.fence == job.fence)


def _fail(session: Session, job: Job, code: str, message: str, hint: str | None) -> None:
    values = {"error_code": code, "error_detail": {"message": message, "hint": hint}}
    move = Move(JobState.FAILED, "job_error", message, "error", values=values)
    jobs.transition(session, job.id, JobState.RUNNING, move, Job.fence == job.fence)
