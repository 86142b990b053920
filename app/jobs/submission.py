"""From a validated spec to rows: references pinned, inputs checked, follow-ups added."""

import copy
import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app import fit
from app.artifacts import inspect, references
from app.artifacts import repository as artifacts
from app.catalog import Catalog
from app.deployments.adapters import check_free
from app.errors import BadRequest, Code, IdempotencyKeyReused, InsufficientStorage, NotFound
from app.files import repository as files
from app.files.rows import CHATS
from app.jobs import (
    asking,
    bases,
    continuing,
    estimate,
    exporting,
    gates,
    judges,
    kinds,
    merging,
    naming,
    pushing,
    repository,
)
from app.jobs.intake import Intake, validate_spec
from app.jobs.repository import Move
from app.jobs.schemas import JobOut
from app.jobs.show import show
from app.models import Artifact, Job, JobDependency, PipelineStep, SweepPoint, new_id, now
from app.projects.caller import Caller
from app.settings import Settings
from app.specs import DeploySpec, JobSpec, TrainSpec
from app.states import JobState
from app.storage import Storage

REPEATED_WITHIN = timedelta(minutes=10)


class Submission:
    """Turns a validated spec into rows: the job, and the jobs that follow it."""

    def __init__(self, session: Session, settings: Settings, catalog: Catalog, caller: Caller) -> None:
        self._session = session
        self._settings = settings
        self._catalog = catalog
        self._caller = caller

    def submit(self, intake: Intake, idempotency_key: str | None = None, *, again: bool = False) -> JobOut:
        """Stores the job and its follow-ups; the same key and body again give the same job.

        ``again``: the client says that it repeats a request whose answer it never got.
        """
        fingerprint = sha256_of(intake.submitted)
        if earlier := self._earlier(idempotency_key, fingerprint):
            return earlier
        if again and idempotency_key is None and (earlier := self._just_made(fingerprint)):
            return earlier
        check_disk(self._settings)
        try:
            with self._session.begin_nested():
                job = self._add(intake.spec, intake.submitted, [], idem=(idempotency_key, fingerprint))
        except IntegrityError:
            # Somebody sent the same key at the same moment and was faster.
            if earlier := self._earlier(idempotency_key, fingerprint):
                return earlier
            raise
        for warning in intake.warnings:
            repository.note(self._session, job.id, Move(JobState.QUEUED, "spec_warning", warning, "warn"))
        if isinstance(intake.spec, TrainSpec):
            self._follow_ups(intake.spec, job)
        return show(self._session, self._caller.project_id, job.id)

    def again(self, job: Job, made: Mapping[str, str], waits: list[str], done: list[str]) -> Job:
        """The job's spec as a new job; ``made`` says which jobs took the place of those that it names.

        It waits for ``waits``; ``done`` are its parents that succeeded already.
        """
        check_disk(self._settings)
        submitted = copy.deepcopy(job.spec)
        named = {"experiment_name": job.experiment_name}
        for path, _, value in references.references(validate_spec({**submitted, **named}, self._catalog).spec):
            if value.removeprefix("job:") in made:
                set_at(submitted, path, f"job:{made[value.removeprefix('job:')]}")
        intake = validate_spec({**submitted, **named}, self._catalog)
        new = self._add(
            intake.spec, submitted, waits, retry_of=job.id, pipeline_id=job.pipeline_id, sweep_id=job.sweep_id
        )
        # A pipeline's step, and a sweep's point, is its newest job.
        self._session.execute(update(PipelineStep).where(PipelineStep.job_id == job.id).values(job_id=new.id))
        self._session.execute(update(SweepPoint).where(SweepPoint.job_id == job.id).values(job_id=new.id))
        self._session.add_all(JobDependency(job_id=new.id, parent_id=parent) for parent in done)
        self._session.flush()
        return new

    def reproduce(self, intake: Intake, artifact_id: str) -> JobOut:
        """A run that is to make an artifact's bytes again; nothing follows it."""
        check_disk(self._settings)
        job = self._add(intake.spec, intake.submitted, [], reproduces=artifact_id)
        return show(self._session, self._caller.project_id, job.id)

    def _earlier(self, idempotency_key: str | None, fingerprint: str) -> JobOut | None:
        """The job that this key made already. Raises IdempotencyKeyReused when its body was another."""
        if idempotency_key is None:
            return None
        job = repository.by_idempotency_key(self._session, self._caller.project_id, idempotency_key)
        if job is None:
            return None
        if job.idem_sha256 != fingerprint:
            raise IdempotencyKeyReused(
                "this Idempotency-Key came before with another body",
                param="Idempotency-Key",
                hint="Use a new key for a new request.",
            )
        return show(self._session, self._caller.project_id, job.id)

    def _just_made(self, fingerprint: str) -> JobOut | None:
        """The job that the same API key made of the same body a moment ago."""
        row = self._session.scalar(
            select(Job)
            .where(
                Job.project_id == self._caller.project_id,
                Job.created_by == self._caller.key_id,
                Job.idem_sha256 == fingerprint,
                Job.created_at > now() - REPEATED_WITHIN,
            )
            .order_by(Job.created_at.desc())
            .limit(1)
        )
        return show(self._session, self._caller.project_id, row.id) if row is not None else None

    def add(
        self, intake: Intake, parents: list[str], *, pipeline_id: str | None = None, sweep_id: str | None = None
    ) -> Job:
        """One job of a pipeline or a sweep, with its follow-ups and warnings."""
        job = self._add(intake.spec, intake.submitted, parents, pipeline_id=pipeline_id, sweep_id=sweep_id)
        for warning in intake.warnings:
            repository.note(self._session, job.id, Move(JobState.QUEUED, "spec_warning", warning, "warn"))
        if isinstance(intake.spec, TrainSpec):
            self._follow_ups(intake.spec, job)
        return job

    def _follow_ups(self, spec: TrainSpec, job: Job) -> None:
        parent, model = job, job
        for step in spec.then:
            common: dict[str, Any] = {"type": step, "experiment_name": job.experiment_name, "priority": job.priority}
            if step == "merge":
                extra = {"adapter": f"job:{job.id}", "output_name": f"{job.experiment_name[:56]}_merged"}
            elif step == "validate":
                extra = {"model": f"job:{model.id}"}
            else:
                extra = {"model": f"job:{model.id}", "name": job.experiment_name}
            intake = validate_spec({**common, **extra}, self._catalog)
            parent = self._add(intake.spec, intake.submitted, [parent.id], pipeline_id=job.pipeline_id)
            model = parent if step == "merge" else model

    def _add(
        self,
        spec: JobSpec,
        submitted: dict[str, Any],
        parents: list[str],
        *,
        idem: tuple[str | None, str] = (None, ""),
        retry_of: str | None = None,
        reproduces: str | None = None,
        pipeline_id: str | None = None,
        sweep_id: str | None = None,
    ) -> Job:
        algorithm = spec.algorithm if isinstance(spec, TrainSpec) else None
        resolved = spec.model_dump(mode="json")
        waits = self._resolve(spec, resolved)
        if spec.asks_served and resolved["deployment"] and not (waits or parents):
            asking.check(self._session, self._settings, self._caller.project_id, resolved)
        name = spec.experiment_name or made_up_name(spec)
        resolved["experiment_name"] = name
        if retry_of is None and reproduces is None:  # a repetition cannot choose; the ledger says it when it is done
            naming.check(self._session, self._caller.project_id, spec, name)
        own_class = "control" if isinstance(spec, DeploySpec) else self._catalog.slot_class(spec)
        prepares = self._catalog.prepares(spec.type, algorithm)
        job = Job(
            id=new_id("ftjob" if spec.type == "train" else "job"),
            project_id=self._caller.project_id,
            created_by=self._caller.key_id,
            type=spec.type,
            algorithm=algorithm,
            experiment_name=name,
            spec=submitted,
            spec_sha256=sha256_of(resolved),
            resolved_spec=resolved,
            slot_class="light" if prepares else own_class,
            next_class=own_class if prepares else None,
            priority=spec.priority,
            gpus=spec.resources.gpus,
            min_vram_gb=spec.resources.min_vram_gb,
            memory_gb=estimate.memory_gb(self._session, self._settings, self._caller.project_id, spec, resolved),
            preemptible=spec.preemptible,
            queue_seconds=spec.limits.queue_seconds,
            wall_seconds=spec.limits.wall_seconds,
            max_attempts=spec.retry.max_attempts,
            labels=spec.metadata,
            idem_key=idem[0],
            idem_sha256=idem[1] or None,
            retry_of=retry_of,
            reproduces=reproduces,
            pipeline_id=pipeline_id,
            sweep_id=sweep_id,
        )
        repository.add(self._session, job, sorted({*parents, *waits}))
        return job

    def _resolve(self, spec: JobSpec, resolved: dict[str, Any]) -> list[str]:
        """Checks that every input exists, pins it in ``resolved``, and says which jobs must end first."""
        waits: list[str] = []
        known: list[tuple[references.Resolved, str, str]] = []
        for path, kind, value in references.references(spec):
            if kind == "file":
                self._check_file(value, path)
                continue
            revision = spec.model.revision if isinstance(spec, TrainSpec) and path.startswith("model.") else None
            self._check_source(spec, kind, value, path)
            found = references.resolve(
                self._session, self._settings, self._caller.project_id, value, param=path, revision=revision
            )
            if isinstance(spec, DeploySpec):
                self._check_deployable(found, path)
            if found.artifact is not None:
                kinds.check_artifact(spec, path, found.artifact.kind, value)
            if spec.type == "push_to_hub":
                pushing.check(self._settings, spec, found, path, value)
            set_at(resolved, path, found.pinned)
            bases.refuse_quantised_name(spec, found, path)
            if found.job_id:
                waits.append(found.job_id)
            elif found.folder and kind == "adapter":
                check_adapter(found, path)
            elif found.folder and spec.type in exporting.CHECKS and kind == "model":
                exporting.CHECKS[spec.type](found.folder, path, value)
            elif found.folder and spec.type == "merge":
                inspect.check_mergeable(found.folder, path, value)
            elif found.folder and kind == "reward":
                judges.check_reward(found, path)
            elif found.folder and isinstance(spec, TrainSpec):
                self._check_start(spec, found, path)
            known.append((found, kind, path))
        if spec.type == "merge":
            merging.check(self._session, self._settings, self._catalog, self._caller.project_id, resolved)
        for found, kind, path in known:
            bases.check_known(self._session, self._settings, self._caller.project_id, spec, found, kind, path)
        if spec.type == "evaluate":
            waits += gates.settle(self._session, self._settings, self._caller.project_id, resolved)
        if isinstance(spec, TrainSpec):
            judges.check(self._session, self._caller.project_id, spec, resolved)
        if isinstance(spec, TrainSpec) and spec.from_checkpoint is not None:
            storage = Storage(self._settings.data_dir)
            continuing.check(self._session, storage, self._caller.project_id, spec, resolved)
        if isinstance(spec, DeploySpec):
            self._catalog.check_engine(spec)
            check_free(self._session, self._caller.project_id, spec.name)
        return waits

    def _check_start(self, spec: TrainSpec, found: references.Resolved, path: str) -> None:
        """What a run starts from: a model, or an adapter whose base is known, which is folded into it first."""
        project = self._caller.project_id
        root, _ = references.chain_of(self._session, self._settings, project, found, param=path)
        if root.folder is not None:
            check_base(root, spec, path)
            file = files.get(self._session, project, spec.dataset.file)
            if spec.needs_template and file is not None and file.format in CHATS:
                check_template(root.folder, path)

    def _check_source(self, spec: JobSpec, kind: str, value: str, path: str) -> None:
        """A job that is named as an input must be of a kind that leaves one."""
        if not value.startswith("job:") or "\0" in value:
            return
        source = repository.get(self._session, self._caller.project_id, value.removeprefix("job:"))
        if source is None:
            return
        left = kinds.left_by(source.type, source.algorithm, source.resolved_spec)
        kinds.check(spec, path, kind, value, left, source.type)

    def _check_deployable(self, found: references.Resolved, path: str) -> None:
        """An engine serves what lies here."""
        if found.hub is None:
            return
        rows = artifacts.page(self._session, self._caller.project_id, 1000, None, [Artifact.kind == "model"])
        near = difflib.get_close_matches(found.hub, {row.name for row in rows}, 3)
        raise BadRequest(
            f"{path}: {found.hub} is no model of this service",
            param=path,
            code=Code.MODEL_NOT_FOUND,
            hint="Import the model first" + (f"; registered names: {', '.join(near)}." if near else "."),
        )

    def _check_file(self, file_id: str, path: str) -> None:
        if files.get(self._session, self._caller.project_id, file_id) is None:
            raise NotFound(f"{path}: there is no file {file_id}", param=path, hint="Upload it first with POST /files.")


def check_base(found: references.Resolved, spec: TrainSpec, path: str) -> None:
    """What can be known of a local base before any GPU time: readable, unquantised, has the target modules."""
    assert found.folder is not None
    if inspect.looks_like_adapter(found.folder):
        raise BadRequest(
            f"{path}: this is an adapter whose base is not known here",
            param=path,
            code=Code.MODEL_INVALID,
            hint="Merge it into its base first, and train on the merged model.",
        )
    config = inspect.read_json(found.folder / "config.json", path)
    peft, quantised = spec.model.peft_config, spec.model.quantization_config is not None
    purpose = "full fine-tuning" if peft is None else "QLoRA (it quantises by itself)" if quantised else "LoRA here"
    inspect.check_unquantised(config, path, purpose)
    shapes = inspect.tensor_shapes(found.folder, path)
    fault = fit.misfit(peft, config, shapes, quantised=quantised) if peft is not None else None
    if fault is not None:
        raise BadRequest(
            fault.message,
            param=f"model.peft_config.{fault.field}",
            code=Code.TARGET_MODULES_NOT_FOUND if fault.missing else Code.CONFLICTING_FIELDS,
            hint=fault.hint,
        )


def check_template(folder: Path, path: str) -> None:
    """Conversations are learnt through the model's own chat template."""
    if (folder / "tokenizer_config.json").is_file() and inspect.template_of(folder) is None:
        raise BadRequest(
            f"{path}: the model has no chat template, and the data are conversations",
            param=path,
            code=Code.CONFLICTING_FIELDS,
            hint="Use an instruct model, add a chat_template.jinja to the model, or give prompt/completion rows.",
        )


def check_adapter(found: references.Resolved, path: str) -> None:
    """An adapter field must lead to an adapter."""
    assert found.folder is not None
    if not inspect.looks_like_adapter(found.folder):
        raise BadRequest(
            f"{path}: there is no adapter_config.json, so this is not an adapter",
            param=path,
            code=Code.ADAPTER_INVALID,
            hint="Name the adapter that a LoRA or QLoRA run left.",
        )


def made_up_name(spec: JobSpec) -> str:
    """What a spec calls itself, in the letters that a name may have, and today's date."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", spec.default_name()).lstrip("._-")
    return f"{(plain or spec.type)[:54]}_{now():%Y%m%d}"


def check_disk(settings: Settings) -> None:
    """Refuses new work when the disk is nearly full. Raises InsufficientStorage."""
    free = Storage(settings.data_dir).free_bytes()
    if free < settings.min_free_bytes:
        raise InsufficientStorage(
            f"the disk has {free >> 20} MiB left; new work needs {settings.min_free_bytes >> 20} MiB",
            hint="Free space in the data directory; jobs that run go on.",
        )


def sha256_of(value: Any) -> str:
    """Fingerprint of a JSON value; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def set_at(target: Any, path: str, value: Any) -> None:
    """``graders.0.model`` is the field of a list's first object, ``adapters.0`` a list's first entry."""
    first, _, rest = path.partition(".")
    key: Any = int(first) if isinstance(target, list) else first
    if rest:
        set_at(target[key], rest, value)
    else:
        target[key] = value
