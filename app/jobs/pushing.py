"""Pushes to the hub, looked at before they are stored: may this repository be named, and is it an artifact?"""

import fnmatch

from app.artifacts.references import Resolved
from app.errors import BadRequest, Code
from app.settings import Settings
from app.specs import JobSpec


def check(settings: Settings, spec: JobSpec, found: Resolved, path: str, reference: str) -> None:
    """Refuses what is no artifact of ours, and a repository that the operator does not allow. Raises BadRequest."""
    repo = str(getattr(spec, "repo_id", ""))
    if not any(fnmatch.fnmatchcase(repo, pattern) for pattern in settings.allowed_hub_repos):
        raise BadRequest(
            f"repo_id: {repo} is not on the list of allowed hub repositories",
            param="repo_id",
            code=Code.MODEL_NOT_ALLOWED,
            hint="The operator sets TUNESMITH_ALLOWED_HUB_REPOS.",
        )
    if found.artifact is None and found.job_id is None:
        raise BadRequest(
            f"{path}: {reference} is no artifact, so there is no record to write its card from",
            param=path,
            code=Code.WRONG_KIND,
            hint="Import the folder first (type import); of a checkpoint, extract_adapter makes an artifact.",
        )
    if found.artifact is not None and found.artifact.kind == "report":
        raise BadRequest(
            f"{path}: {reference} is a report",
            param=path,
            code=Code.WRONG_KIND,
            hint="Name an adapter, a model, a reward model or a GGUF file.",
        )
