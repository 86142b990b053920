"""Who makes a request."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Caller:
    """A key's project, id and scopes."""

    project_id: str
    key_id: str
    scopes: frozenset[str]
