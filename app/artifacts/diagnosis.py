"""Why a job failed, or why what it left is not what was hoped for: findings, each with the patch to apply.

Four rows, as a user meets them: a package is missing, memory ran out, an adapter does not load, a merged model is poor.
All is told from the record: rows, manifests, sizes of files, certificates. Nothing is loaded, no weights are read.
"""

import copy
import re
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, Field
from sqlalchemy.orm import Session

from app.artifacts import inspect, references, repository
from app.artifacts.service import existing
from app.errors import AppError, Code, NotFound
from app.models import Artifact, Job
from app.settings import Settings
from app.storage import Storage

Row = Literal[
    "missing_package", "out_of_memory", "adapter_does_not_load", "merged_model_poor", "learnt_nothing", "other"
]
_MISSING = re.compile(r"No module named '([\w.]+)'")
_LEAST_RANK = 8
_KEPT = 0.9


class Finding(BaseModel):
    """One thing that was found."""

    row: Row = Field(description="Which trouble it belongs to.")
    level: Literal["error", "warning"]
    message: str
    hint: str | None = Field(None, description="What to do.")
    patch: dict[str, Any] | None = Field(
        None, description="Put over the spec of the job in `patches` it makes the spec to submit instead."
    )
    patches: str | None = Field(None, description="The job whose spec `patch` is for.")


class Diagnosis(BaseModel):
    """What was looked at and what was found; no findings: nothing is wrong that the record would show."""

    object: Literal["diagnosis"] = "diagnosis"
    id: str
    looked_at: list[str] = Field(description="Ids of the jobs and artifacts whose records were read.")
    findings: list[Finding] = Field(description="Errors first.")


def of_job(session: Session, settings: Settings, project_id: str, job_id: str) -> Diagnosis:
    """Of a job, and of what it left. Raises NotFound."""
    job = session.get(Job, job_id)
    if job is None or job.project_id != project_id:
        raise NotFound(f"there is no job {job_id}", param="job_id")
    left = [artifact for artifact in repository.of_job(session, job_id) if artifact.kind != "report"]
    if left:
        return of_artifact(session, settings, project_id, left[-1].id, asked=job_id)
    return _diagnosis(job_id, [job_id], list(_of_failure(job)))


def of_artifact(
    session: Session, settings: Settings, project_id: str, artifact_id: str, *, asked: str | None = None
) -> Diagnosis:
    """Of an artifact, of the job that made it, and of the adapter that it was merged of. Raises NotFound."""
    row = existing(session, project_id, artifact_id)
    looked, findings = [row.id], [*_of_files(session, settings, project_id, row)]
    job = session.get(Job, row.job_id) if row.job_id else None
    if job is not None:
        looked.append(job.id)
        findings += _of_failure(job)
        if job.type == "merge":
            findings += _of_merge(job)
            for adapter in _merged(session, project_id, job):
                looked.append(adapter.id)
                findings += _of_learning(adapter)
    findings += _of_learning(row)
    return _diagnosis(asked or artifact_id, looked, findings)


def _diagnosis(asked: str, looked: list[str], findings: list[Finding]) -> Diagnosis:
    findings.sort(key=lambda finding: finding.level != "error")
    return Diagnosis(id=asked, looked_at=looked, findings=findings)


def _of_failure(job: Job) -> Iterator[Finding]:
    """What the job's own error says."""
    if job.error_code is None:
        return
    detail = job.error_detail or {}
    message, hint = str(detail.get("message", job.error_code)), detail.get("hint")
    if missing := _MISSING.search(message):
        package = missing[1].partition(".")[0]
        hint = f"Run make setup, which installs what is locked; for a package of your own: pip install {package}."
        yield Finding(row="missing_package", level="error", message=f"{package} is not installed: {message}", hint=hint)
    elif job.error_code in (Code.OUT_OF_MEMORY, Code.HOST_OUT_OF_MEMORY):
        patch = smaller(job.resolved_spec) if job.type == "train" else None
        told = hint or "Train with fewer rows at a time, in 4 bit, or with a smaller rank."
        yield Finding(
            row="out_of_memory",
            level="error",
            message=message,
            hint=told,
            patch=patch,
            patches=job.id if patch else None,
        )
    elif job.error_code in (Code.ADAPTER_INVALID, Code.BASE_MISMATCH, Code.QUANTISED_BASE):
        patch = {"base_model": None} if job.error_code != Code.ADAPTER_INVALID and job.spec.get("base_model") else None
        told = hint or "Merge it into the base that it was trained on: leave base_model out."
        yield Finding(
            row="adapter_does_not_load",
            level="error",
            message=message,
            hint=told,
            patch=patch,
            patches=patch and job.id,
        )
    elif job.error_code in (Code.EFFECT_LOST, Code.NON_FINITE_WEIGHTS) and job.type == "merge":
        patch = {"torch_dtype": "float32"} if job.resolved_spec.get("torch_dtype") != "float32" else None
        yield Finding(
            row="merged_model_poor", level="error", message=message, hint=hint, patch=patch, patches=patch and job.id
        )
    else:
        yield Finding(row="other", level="error", message=f"{job.error_code}: {message}", hint=hint)


def smaller(spec: dict[str, Any]) -> dict[str, Any] | None:
    """What makes a training spec need less memory, the mildest first; None where nothing is left."""
    model, training = spec.get("model") or {}, spec.get("training") or {}
    rows = training.get("per_device_train_batch_size") or 1
    if rows > 1:
        steps = training.get("gradient_accumulation_steps") or 1
        halved = {"per_device_train_batch_size": rows // 2, "gradient_accumulation_steps": steps * 2}
        return {"training": {**halved, "gradient_checkpointing": True}}
    if not training.get("gradient_checkpointing"):
        return {"training": {"gradient_checkpointing": True}}
    peft = model.get("peft_config")
    if peft is None:
        return {"model": {"use_peft": True, "peft_config": {"r": 16, "lora_alpha": 32}}}
    if model.get("quantization_config") is None:
        return {"model": {"quantization_config": {"load_in_4bit": True}}}
    rank = peft.get("r") or 16
    if rank > _LEAST_RANK:
        return {
            "model": {"peft_config": {"r": rank // 2, "lora_alpha": max(1, (peft.get("lora_alpha") or 2 * rank) // 2)}}
        }
    length = training.get("max_length") or 0
    return {"training": {"max_length": length // 2}} if length > 256 else None


def patched(spec: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    """The spec with the patch over it; None takes a field out."""
    found = copy.deepcopy(spec)
    for name, value in patch.items():
        if value is None:
            found.pop(name, None)
        elif isinstance(value, dict) and isinstance(found.get(name), dict):
            found[name] = patched(found[name], value)
        else:
            found[name] = value
    return found


def _of_files(session: Session, settings: Settings, project_id: str, row: Artifact) -> Iterator[Finding]:
    """Is it whole on the disk, and is the base of an adapter still there?"""
    broken: Row = "adapter_does_not_load" if row.kind in ("adapter", "reward") else "merged_model_poor"
    storage = Storage(settings.data_dir)
    faults = storage.verify(row.id, read=False)
    if faults:
        yield Finding(
            row=broken,
            level="error",
            message=f"{len(faults)} files are not as they were published, e.g. {faults[0]}",
            hint=f"Make it again: POST /artifacts/{row.id}/reproduce, or take it from a backup.",
        )
        return
    folder = storage.artifact_dir(row.id)
    if not inspect.looks_like_adapter(folder):
        return
    found = references.from_artifact(settings, row)
    try:
        root, _ = references.chain_of(session, settings, project_id, found, param="base")
    except AppError as error:
        yield Finding(
            row=broken,
            level="error",
            message=f"what it was trained on is gone: {error.message}",
            hint="Import that base again, or merge with base_model: a model of the same weights.",
        )
        return
    if root is found:
        yield Finding(
            row=broken,
            level="warning",
            message="it does not say which base it was trained on",
            hint="Name base_model when it is merged; a base of other shapes is refused.",
        )


def _of_merge(job: Job) -> Iterator[Finding]:
    """What the certificate says."""
    certificate = (job.result or {}).get("certificate") or {}
    wide = job.resolved_spec.get("torch_dtype") == "float32" or certificate.get("dtype") == "float32"
    retained = certificate.get("retained")
    if retained is not None and retained < _KEPT:
        yield Finding(
            row="merged_model_poor",
            level="warning",
            message=f"the merge kept {retained:.1%} of the adapter's effect in {certificate.get('dtype')}",
            hint="Merge in a wider dtype." if not wide else "Check that the adapter belongs to this base.",
            patch=None if wide else {"torch_dtype": "float32"},
            patches=None if wide else job.id,
        )
    if certificate.get("verdict") == "no_effect_to_measure":
        message = "the adapter changes the base by less than can be measured: the merged model is the base"
        yield Finding(
            row="merged_model_poor", level="warning", message=message, hint="Train longer, or at a higher rate."
        )
    proof = certificate.get("bytes") or {}
    if dead := proof.get("dead_modules"):  # cut to the first of them
        message = (
            f"at least {len(dead)} of {proof.get('modules')} modules of the adapter change nothing, e.g. {dead[0]}"
        )
        hint = "Training never reached them: look at its target_modules, or train again with all-linear."
        yield Finding(row="merged_model_poor", level="warning", message=message, hint=hint)
    if (certificate.get("base") or {}).get("mismatch_allowed"):
        yield Finding(
            row="merged_model_poor",
            level="warning",
            message="allow_base_mismatch was set: the base may have other weights than the adapter was trained on",
            hint="Merge into the base that it was trained on.",
            patch={"allow_base_mismatch": False, "base_model": None},
            patches=job.id,
        )


def _merged(session: Session, project_id: str, job: Job) -> list[Artifact]:
    """The adapters that a merge took, those that are still here."""
    spec = job.resolved_spec
    named = [spec.get("adapter"), *(spec.get("adapters") or [])]
    ids = [name.removeprefix("artifact:") for name in named if isinstance(name, str) and name.startswith("artifact:")]
    jobs = [name.removeprefix("job:") for name in named if isinstance(name, str) and name.startswith("job:")]
    found = [repository.get(session, project_id, artifact_id) for artifact_id in ids]
    return [row for row in found if row is not None] + [
        row for job_id in jobs for row in repository.of_job(session, job_id) if row.kind != "report"
    ]


def _of_learning(row: Artifact) -> Iterator[Finding]:
    """Did the run that made it learn anything?"""
    verdict = (row.learning or {}).get("verdict")
    if verdict in ("no_effect", "worse"):
        what = (
            "did no better on the held-out rows than its base" if verdict == "no_effect" else "did worse than its base"
        )
        yield Finding(
            row="learnt_nothing",
            level="warning",
            message=f"{row.name}:v{row.version} {what}",
            hint="More steps, a higher learning_rate, target_modules: all-linear, or more rows: docs/evaluation.md.",
            patch={"model": {"peft_config": {"target_modules": "all-linear"}}} if row.kind == "adapter" else None,
            patches=row.job_id if row.kind == "adapter" else None,
        )
