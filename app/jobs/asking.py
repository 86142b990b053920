"""Jobs that ask a model that is being served: refused where nobody serves it, before they take a slot."""

from typing import Any

from sqlalchemy.orm import Session

from app.artifacts import references
from app.deployments.whose import names_for
from app.settings import Settings

FIELDS = {"model": "deployment", "baseline": "baseline_deployment"}
"""What is asked, and the field of the spec that says where."""


def check(session: Session, settings: Settings, project_id: str, resolved: dict[str, Any]) -> None:
    """``deployment`` serves exactly ``model``, and something serves what it is compared with.

    A job that waits for others is not checked here: what it asks may be deployed by then. Raises NotFound, BadRequest.
    """
    name = resolved["deployment"]
    names_for(session, project_id, resolved["model"], name, param=FIELDS["model"])
    base = resolved.get("baseline")
    if base is None:
        found = references.resolve(session, settings, project_id, resolved["model"], param="model")
        root, _ = references.chain_of(session, settings, project_id, found, param="model")
        if root is found:
            return
        base = root.pinned
    names_for(session, project_id, base, resolved.get(FIELDS["baseline"]), param=FIELDS["baseline"], beside=name)
