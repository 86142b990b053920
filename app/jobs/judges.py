"""Runs that are taught by a judge: refused without one, with the newest reward model that would do."""

from typing import Any

from sqlalchemy.orm import Session

from app.artifacts import inspect, references
from app.artifacts import repository as artifacts
from app.errors import BadRequest, Code
from app.models import Job
from app.specs import TrainSpec

FIELD = "reward_model"
_LONGEST_CHAIN = 64


def check(session: Session, project_id: str, spec: TrainSpec, resolved: dict[str, Any]) -> None:
    """Refuses a spec whose algorithm needs a judge and that names none. Raises BadRequest missing_field."""
    if not spec.judged or any(getattr(spec, field, None) is not None for field in (FIELD, "graders")):
        return
    root = _root(session, project_id, resolved["model"]["model_name_or_path"])
    newest = artifacts.newest_reward(session, project_id, root) if root is not None else None
    if newest is not None:
        hint = (
            f'Add "{FIELD}": "{newest.name}:v{newest.version}", the newest reward model trained on this base '
            f"(artifact:{newest.id}), or graders."
        )
    else:
        hint = (
            "There is no reward model for this base yet: train one with algorithm reward, or add graders, e.g. "
            '[{"type": "number_match"}]; docs/graders.md names them all.'
        )
    raise BadRequest(
        f"{spec.algorithm} needs a judge: {FIELD}, or graders", param=FIELD, code=Code.MISSING_FIELD, hint=hint
    )


def check_reward(found: references.Resolved, path: str) -> None:
    """A reward model ends in one number instead of a vocabulary."""
    assert found.folder is not None
    if inspect.looks_like_adapter(found.folder):
        config = inspect.read_json(found.folder / "adapter_config.json", path)
        judges = config.get("task_type") == "SEQ_CLS"
    else:
        names = inspect.read_json(found.folder / "config.json", path).get("architectures")
        judges = isinstance(names, list) and any(str(name).endswith("ForSequenceClassification") for name in names)
    if not judges:
        raise BadRequest(
            f"{path}: this is no reward model",
            param=path,
            code=Code.WRONG_KIND,
            hint="Train one first: type train, algorithm reward, on rows with chosen and rejected answers.",
        )


def _root(session: Session, project_id: str, reference: str) -> str | None:
    """The model at the root of what a pinned reference leads to; None where a job does not say it yet."""
    for _ in range(_LONGEST_CHAIN):
        if reference.startswith("artifact:"):
            artifact = artifacts.get(session, project_id, reference.removeprefix("artifact:"))
            return (artifact.base_chain or [reference])[0] if artifact is not None else None
        if not reference.startswith("job:"):
            return reference
        job = session.get(Job, reference.removeprefix("job:"))
        if job is None or job.type != "train":
            return None
        reference = job.resolved_spec["model"]["model_name_or_path"]
    return None
