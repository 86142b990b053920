"""A gate compares: with what, is settled when the job is submitted and not when the exam begins."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy.orm import Session

from app.artifacts import references
from app.errors import AppError, BadRequest, Code
from app.jobs import kinds
from app.models import Artifact, Job
from app.settings import Settings

_LONGEST = 64


def settle(session: Session, settings: Settings, project_id: str, resolved: dict[str, Any]) -> list[str]:
    """Gives a gated evaluation of a whole model the base that it was made from; which jobs that waits for.

    An adapter is compared with its base anyhow. Raises BadRequest where nothing is known to compare with.
    """
    if resolved.get("gate") is None or resolved.get("baseline") is not None:
        return []
    search = _Search(session, settings, project_id)
    try:
        if search.is_adapter(resolved["model"]):
            return []
        made_from = search.made_from(resolved["model"])
        baseline = search.whole(made_from) if made_from else None
        found = references.resolve(session, settings, project_id, baseline, param="baseline") if baseline else None
    except AppError:
        found = None  # gone since: the user names another
    if found is None:
        raise BadRequest(
            "gate: there is nothing to compare with, because it is not known what this model was made from",
            param="baseline",
            code=Code.MISSING_FIELD,
            hint="Name a baseline: the model that this one has to be better than.",
        )
    resolved["baseline"] = found.pinned
    return [found.job_id] if found.job_id else []


class _Search:
    """Follows pinned references back; by jobs, which also know what has yet to be made."""

    def __init__(self, session: Session, settings: Settings, project_id: str) -> None:
        self._session = session
        self._settings = settings
        self._project = project_id

    def is_adapter(self, reference: str) -> bool:
        row = self._session.get(Artifact, reference.removeprefix("artifact:"))
        if row is not None:
            return row.kind == "adapter"
        job = self._job(reference)
        if job is not None:
            return kinds.left_by(job.type, job.algorithm, job.resolved_spec) == "adapter"
        return self._of_folder(reference)[0]

    def made_from(self, reference: str) -> str | None:
        """What the job behind a reference began with; None where no job of ours made it from one thing."""
        job = self._job(reference)
        spec: Mapping[str, Any] = job.resolved_spec if job is not None else {}
        if job is not None and job.type == "train":
            return str(spec["model"]["model_name_or_path"])
        if job is not None and job.type == "import" and spec.get("kind") == "adapter":
            return spec.get("base")
        if job is None or job.type != "merge":
            return None
        return spec.get("base_model") or spec.get("adapter") or next(iter(spec.get("adapters") or ()), None)

    def whole(self, reference: str) -> str | None:
        """The model at the root of an adapter; a whole model is its own."""
        for _ in range(_LONGEST):
            if not self.is_adapter(reference):
                return reference
            below = self.made_from(reference) or self._of_folder(reference)[1]
            if below is None:
                return None
            reference = below
        return None

    def _job(self, reference: str) -> Job | None:
        job_id: str | None = reference.removeprefix("job:")
        if reference.startswith("artifact:"):
            row = self._session.get(Artifact, reference.removeprefix("artifact:"))
            job_id = row.job_id if row is not None else None
        job = self._session.get(Job, job_id) if job_id else None
        return job if job is not None and job.project_id == self._project else None

    def _of_folder(self, reference: str) -> tuple[bool, str | None]:
        """Of what no job leads to: whether it is an adapter, and the root of its chain. Raises AppError."""
        found = references.resolve(self._session, self._settings, self._project, reference, param="model")
        root, _ = references.chain_of(self._session, self._settings, self._project, found, param="model")
        adapter = found.facts.get("kind") == "adapter" or root is not found
        return adapter, root.pinned if root is not found else None
