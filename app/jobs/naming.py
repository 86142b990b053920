"""What the result of a job will be called, looked at before it is stored: an alias of that name would hide it."""

from sqlalchemy.orm import Session

from app.aliases import repository as aliases
from app.errors import Code, Conflict
from app.jobs import kinds
from app.specs import JobSpec


def check(session: Session, project_id: str, spec: JobSpec, experiment_name: str) -> None:
    """Refuses a result with the name of an alias, which goes before names of artifacts. Raises Conflict name_taken."""
    named = _named(spec, experiment_name)
    if named is None or aliases.get(session, project_id, named[1]) is None:
        return
    field, name = named
    raise Conflict(
        f"{field}: {name} is an alias, which would hide what this {spec.type} job leaves",
        param=field,
        code=Code.NAME_TAKEN,
        hint=f"Choose another name, or take the alias away first: DELETE /aliases/{name}.",
    )


def _named(spec: JobSpec, experiment_name: str) -> tuple[str, str] | None:
    """The field that names the result, and the name; None for a job that leaves no weights."""
    if spec.type == "import":
        return "name", str(getattr(spec, "name", experiment_name))
    if output := getattr(spec, "output_name", None):
        return "output_name", str(output)
    leaves = kinds.left_by(spec.type, getattr(spec, "algorithm", None), spec.model_dump(mode="json"))
    if leaves is not None or hasattr(spec, "output_name"):
        return "experiment_name", experiment_name
    return None
